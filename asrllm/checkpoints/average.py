"""The mean of several checkpoints, and which weights an evaluation takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from torch import Tensor

from asrllm.checkpoints.consolidate import read_weights, save_state
from asrllm.errors import UserError
from asrllm.training.manifest import EPOCH_TAG, MANIFEST, STEP_TAG, list_checkpoints, read_manifest
from asrllm.training.zero_files import AVERAGE


@dataclass(frozen=True, kw_only=True)
class Average:
    """What is averaged: the last `avg` step checkpoints up to `iteration`, or epoch checkpoints up to `epoch`.

    running: the mean over every step between the checkpoint before those and the last one, from their running averages (icefall's
    use_averaged_model), instead of the mean of the checkpoints themselves.
    """

    iteration: int = 0
    epoch: int = 0
    avg: int
    running: bool = False

    @property
    def suffix(self) -> str:
        last = f"iter-{self.iteration}" if self.iteration else f"epoch-{self.epoch}"
        return f"{last}-avg-{self.avg}{'-use-averaged-model' if self.running else ''}"

    def sources(self, exp_dir: Path) -> list[Path]:
        """The checkpoints, in ascending order; with `running` the one before them too, but where they begin with the training."""
        pattern, end, key = (STEP_TAG, self.iteration, "iter") if self.iteration else (EPOCH_TAG, self.epoch, "epoch")
        found = list_checkpoints(exp_dir, pattern)
        there = ", ".join(map(str, found)) or "none"
        if end not in found:
            raise UserError(f"exp_dir={str(exp_dir)!r} has no complete checkpoint for {key}={end}; there are: {there}")
        chosen = [path for number, path in found.items() if number <= end]
        wanted = self.avg + (self.running and not (self.epoch and self.avg == end))
        if len(chosen) < wanted:
            what = f"avg={self.avg}" + (" and the one before, which use_averaged_model needs," if wanted > self.avg else "")
            raise UserError(f"{what} is more than the {len(chosen)} checkpoints up to {key}={end} in {str(exp_dir)!r}; there are: {there}")
        return chosen[-wanted:]

    def weights(self, exp_dir: Path) -> dict[str, Tensor]:
        sources = self.sources(exp_dir)
        if not self.running:
            return mean_weights(sources)
        return mean_between(sources[0] if len(sources) > self.avg else None, sources[-1])


def mean_weights(checkpoints: Sequence[Path]) -> dict[str, Tensor]:
    """The plain mean of the checkpoints' weights, float32; two of them are in memory at a time."""
    mean = read_weights(checkpoints[0])
    for checkpoint in checkpoints[1:]:
        for name, tensor in read_weights(checkpoint).items():
            mean[name] = mean[name] + tensor
    return {name: tensor / len(checkpoints) for name, tensor in mean.items()}


def mean_between(start: Path | None, end: Path) -> dict[str, Tensor]:
    """The mean of the weights over the steps after `start` (None: all) up to `end`, float32: (end * average - start * average) / steps."""
    for path in (start, end):
        if path is not None and not read_manifest(path)["running_average"]:
            raise UserError(f"{str(path)!r} has no running average: train with trainer.use_averaged_model=true, or evaluate without it")
    last = read_manifest(end)["step"]
    mean = read_weights(end, AVERAGE)
    if start is not None:
        first, before = read_manifest(start)["step"], read_weights(start, AVERAGE)
        mean = {name: tensor + (tensor - before[name]) * (first / (last - first)) for name, tensor in mean.items()}
    return {name: tensor.float() for name, tensor in mean.items()}


def average(exp_dir: Path, what: Average, output: Path | None = None) -> Path:
    """Write the averaged weights, to exp_dir/averaged-{iter|epoch}-N-avg-K.pt by default."""
    return save_state(what.weights(exp_dir), output or exp_dir / f"averaged-{what.suffix}.pt")


def resolve_weights(exp_dir: Path, *, filename: str | None, what: Average) -> Path:
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
    if (what.iteration > 0 or what.epoch > 0) != (what.avg > 0):
        raise UserError(f"checkpoint.model: iter={what.iteration}, epoch={what.epoch}, avg={what.avg}: give iter and avg, or epoch and avg")
    if what.avg > 0:
        made = exp_dir / f"averaged-{what.suffix}.pt"
        newest = max((path / MANIFEST).stat().st_mtime for path in what.sources(exp_dir))
        with FileLock(exp_dir / ".averaging.lock"):  # of several ranks the first one averages
            if made.is_file() and made.stat().st_mtime > newest:
                return made
            return average(exp_dir, what)
    if what.running:
        raise UserError("checkpoint.model.use_averaged_model=true needs iter and avg, or epoch and avg")
    path = exp_dir / "pretrained.pt"
    if not path.is_file():
        there = ", ".join(map(str, list_checkpoints(exp_dir))) or "none"
        raise UserError(
            f"exp_dir={str(exp_dir)!r} has no pretrained.pt: train to the end, or give checkpoint.model.iter and checkpoint.model.avg "
            f"(checkpoints there: {there})"
        )
    return path
