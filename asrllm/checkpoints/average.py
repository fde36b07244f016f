"""The mean of several checkpoints, and which weights an evaluation takes."""

from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock
from torch import Tensor

from asrllm.checkpoints.consolidate import read_weights, save_state
from asrllm.errors import UserError
from asrllm.training.manifest import EPOCH_TAG, STEP_TAG, list_checkpoints


def average_weights(checkpoints: Sequence[Path]) -> dict[str, Tensor]:
    """The plain mean of the checkpoints' weights, float32; two of them are in memory at a time."""
    mean = read_weights(checkpoints[0])
    for checkpoint in checkpoints[1:]:
        for name, tensor in read_weights(checkpoint).items():
            mean[name] = mean[name] + tensor
    return {name: tensor / len(checkpoints) for name, tensor in mean.items()}


def last_checkpoints(exp_dir: Path, *, iteration: int = 0, epoch: int = 0, avg: int) -> list[Path]:
    """The last `avg` step checkpoints up to `iteration`, or epoch checkpoints up to `epoch`."""
    pattern, end, key = (STEP_TAG, iteration, "iter") if iteration else (EPOCH_TAG, epoch, "epoch")
    found = list_checkpoints(exp_dir, pattern)
    there = ", ".join(map(str, found)) or "none"
    if end not in found:
        raise UserError(f"exp_dir={str(exp_dir)!r} has no complete checkpoint for {key}={end}; there are: {there}")
    chosen = [path for number, path in found.items() if number <= end]
    if len(chosen) < avg:
        raise UserError(f"avg={avg} is more than the {len(chosen)} checkpoints up to {key}={end} in {str(exp_dir)!r}; there are: {there}")
    return chosen[-avg:]


def average(exp_dir: Path, *, iteration: int = 0, epoch: int = 0, avg: int, output: Path | None = None) -> Path:
    """Write the averaged weights, to exp_dir/averaged-{iter|epoch}-N-avg-K.pt by default."""
    name = f"averaged-iter-{iteration}-avg-{avg}.pt" if iteration else f"averaged-epoch-{epoch}-avg-{avg}.pt"
    checkpoints = last_checkpoints(exp_dir, iteration=iteration, epoch=epoch, avg=avg)
    return save_state(average_weights(checkpoints), output or exp_dir / name)


def resolve_weights(exp_dir: Path, *, filename: str | None, iteration: int, epoch: int, avg: int) -> Path:
    """The weights file that an evaluation takes; an averaged one is made where its checkpoints are newer or it is missing.

    In this order: filename (absolute, or below exp_dir); iter and avg; epoch and avg; exp_dir/pretrained.pt.
    """
    if not exp_dir.is_dir():
        raise UserError(f"exp_dir={str(exp_dir)!r} does not exist: give the directory of a trained run")
    if filename:
        path = exp_dir / filename  # an absolute filename stays as it is
        if not path.is_file():
            raise UserError(f"checkpoint.model.filename={filename!r} does not exist, nor is it in {str(exp_dir)!r}: check the path")
        return path
    if (iteration > 0 or epoch > 0) != (avg > 0):
        raise UserError(f"checkpoint.model: iter={iteration}, epoch={epoch}, avg={avg}: give iter and avg, or epoch and avg")
    if avg > 0:
        kind, end = ("iter", iteration) if iteration > 0 else ("epoch", epoch)
        made = exp_dir / f"averaged-{kind}-{end}-avg-{avg}.pt"
        sources = last_checkpoints(exp_dir, iteration=iteration, epoch=epoch, avg=avg)
        newest = max((path / "asrllm.json").stat().st_mtime for path in sources)
        with FileLock(exp_dir / ".averaging.lock"):  # of several ranks the first one averages
            if made.is_file() and made.stat().st_mtime > newest:
                return made
            return average(exp_dir, iteration=iteration, epoch=epoch, avg=avg)
    path = exp_dir / "pretrained.pt"
    if not path.is_file():
        there = ", ".join(map(str, list_checkpoints(exp_dir))) or "none"
        raise UserError(
            f"exp_dir={str(exp_dir)!r} has no pretrained.pt: train to the end, or give checkpoint.model.iter and checkpoint.model.avg "
            f"(checkpoints there: {there})"
        )
    return path
