"""Average several checkpoints, and choose the weights of an evaluation."""

import itertools
import logging
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from asrllm.atomic import sigterm_raises
from asrllm.checkpoints.consolidate import checkpoint_weights
from asrllm.defaults import LoraMean
from asrllm.errors import UserError
from asrllm.locks import FileLock
from asrllm.models.asr_llm.checks import read_config
from asrllm.models.asr_llm.weight_files import main_weight_file
from asrllm.models.auto import has_saved_weights
from asrllm.progress import waiting
from asrllm.tensor_files import PIECE, Spec, TensorSource, read_about, write_file
from asrllm.text_files import JsonObject
from asrllm.training.checkpoint.manifest import (
    EPOCH_TAG,
    MANIFEST,
    STEP_TAG,
    check_exp_dir,
    complete_checkpoints,
    list_checkpoints,
    read_manifest,
)
from asrllm.training.checkpoint.zero_files import AVERAGE

FACTOR = re.compile(r"\.lora_(?:embedding_)?([AB])\.")
RANK_DIMENSION = {"A": 0, "B": 1}  # the dimension of PEFT's factors that has the rank
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CheckpointSelection:
    """The choice of the checkpoints to average, and how to average them.

    Attributes:
        iteration: the last step checkpoint; 0 to choose by epoch.
        epoch: the last epoch checkpoint; 0 to choose by step.
        avg: the number of checkpoints.
        running: average over every step between the checkpoint before the chosen ones and the last
            one, by their running averages (icefall's use_averaged_model), instead of averaging the
            checkpoints themselves.
        lora: how adapters are averaged, see `mean_weights`.
    """

    iteration: int = 0
    epoch: int = 0
    avg: int
    running: bool = False
    lora: LoraMean = "product"

    @property
    def suffix(self) -> str:
        """The part of result file names that identifies these weights."""
        last = f"iter-{self.iteration}" if self.iteration else f"epoch-{self.epoch}"
        method = ""
        if self.running:
            method = "-use-averaged-model"
        elif self.lora == "factors":
            method = "-lora-factors"
        return f"{last}-avg-{self.avg}{method}"

    def sources(self, exp_dir: Path) -> list[Path]:
        """Return the checkpoints to read, in ascending order.

        With `running` the checkpoint before the chosen ones is included, unless they begin with
        the training.

        Raises:
            UserError: exp_dir does not have these checkpoints.
        """
        check_exp_dir(exp_dir)
        key = "iter" if self.iteration else "epoch"
        end = self.iteration or self.epoch
        found = list_checkpoints(exp_dir, STEP_TAG if self.iteration else EPOCH_TAG)
        available = f"Available: {', '.join(map(str, found)) or 'none'}."
        if end not in found:
            raise UserError(
                f"exp_dir={str(exp_dir)!r} has no complete checkpoint for {key}={end}. {available}"
            )
        chosen = [path for number, path in found.items() if number <= end]
        begins_with_training = bool(self.epoch) and self.avg == end
        needed = self.avg
        if self.running and not begins_with_training:
            needed += 1
        if len(chosen) < needed:
            running = " with use_averaged_model" if self.running else ""
            raise UserError(
                f"avg={self.avg}{running} needs {needed} checkpoints up to {key}={end}, but "
                f"{str(exp_dir)!r} has {len(chosen)}. Use a smaller avg. {available}"
            )
        return chosen[-needed:]

    def weights(self, exp_dir: Path) -> TensorSource:
        """Return the averaged weights in float32.

        They are computed piece by piece, so memory does not grow with the number of checkpoints.
        """
        sources = self.sources(exp_dir)
        if not self.running:
            return mean_weights(sources, lora=self.lora, rslora=adapters_with_rslora(exp_dir))
        start = sources[0] if len(sources) > self.avg else None
        return mean_between(start, sources[-1])


def adapters_with_rslora(exp_dir: Path) -> tuple[str, ...]:
    """Return the parts whose adapters are scaled by alpha / sqrt(rank) (PEFT's use_rslora)."""
    config = read_config(exp_dir)
    options = {"llm": config.lora, "audio_encoder": config.audio_encoder_lora}
    return tuple(part for part, chosen in options.items() if (chosen or {}).get("use_rslora"))


def mean_weights(
    checkpoints: Sequence[Path], *, lora: LoraMean = "product", rslora: Sequence[str] = ()
) -> TensorSource:
    """Average the weights of checkpoints, in float32.

    Args:
        checkpoints: ZeRO checkpoints of one run.
        lora: "product" averages the products B A of the adapters exactly. It concatenates the
            checkpoints' factors, so the rank is multiplied by their number; a model that is loaded
            with them scales by alpha / that rank. "factors" averages each factor by itself, like
            the other weights, which is not the mean of what the adapters do.
        rslora: the parts whose adapters are scaled by alpha / sqrt(rank).

    Raises:
        UserError: the checkpoints differ in a name or shape, or the adapters have no exact mean.
    """
    parts = _matching_weights(checkpoints)
    count = len(parts)
    specs = parts[0].specs
    stacked: dict[str, int] = {}
    if lora == "product" and count > 1:
        stacked = _stacked_dimensions(specs)
    readers = [part.pieces for part in parts]

    def pieces(name: str) -> Iterator[Tensor]:
        if name not in stacked:
            streams = [read(name) for read in readers]
            return (total.div_(count) for total in _sums(streams))
        # The rank is `count` times as large, so alpha / rank already divides by `count`. With
        # alpha / sqrt(rank), B is divided by the other sqrt(count).
        scale = 1.0
        if name.startswith(tuple(rslora)):
            scale = count**-0.5
        if len(specs[name].shape) == 1:  # the bias of B, which is scaled like B
            streams = [read(name) for read in readers]
            return (total.mul_(scale) for total in _sums(streams))
        if stacked[name] == 0:
            return itertools.chain.from_iterable(read(name) for read in readers)
        width = specs[name].numel // specs[name].shape[0]
        # The blocks of all checkpoints together have about PIECE elements.
        rows = max(PIECE // (width * count), 1)
        blocks = [read(name, rows * width) for read in readers]
        return _side_by_side(blocks, width, scale)

    about: JsonObject = {"sources": _source_records(parts), "mean": "checkpoints"}
    if any(map(FACTOR.search, specs)):
        about["lora"] = lora
    mean_specs = dict(specs)
    for name, dimension in stacked.items():
        mean_specs[name] = _stacked_spec(specs[name], dimension, count)
    return TensorSource(mean_specs, pieces, about, _check_all(parts))


def _matching_weights(checkpoints: Sequence[Path]) -> list[TensorSource]:
    """Return the weights of checkpoints after checking that names and shapes are the same."""
    parts: list[TensorSource] = []
    for path in checkpoints:
        part = checkpoint_weights(path)
        if parts:
            check_same_weights(checkpoints[0], parts[0], path, part)
            # one copy of the specs in memory for any number of checkpoints
            part = replace(part, specs=parts[0].specs)
        parts.append(part)
    return parts


def _stacked_dimensions(specs: Mapping[str, Spec]) -> dict[str, int]:
    """Return the dimension in which each adapter factor is concatenated, by name."""
    stacked: dict[str, int] = {}
    for name in specs:
        if "lora_magnitude" in name:
            raise UserError(
                f"{name!r} belongs to adapters with magnitudes (DoRA), which have no exact mean. "
                "Average their factors with --lora factors, or checkpoint.model.lora=factors."
            )
        match = FACTOR.search(name)
        if match:
            stacked[name] = RANK_DIMENSION[match.group(1)]
    return stacked


def check_same_weights(
    first: Path, weights: TensorSource, second: Path, others: TensorSource
) -> None:
    """Check that two checkpoints have the same weights.

    Args:
        first: a checkpoint.
        weights: its weights.
        second: another checkpoint.
        others: the other's weights.

    Raises:
        UserError: they differ in a name or a shape.
    """
    mine = weights.specs
    theirs = others.specs
    if mine == theirs:
        return
    names = mine.keys() | theirs.keys()
    different = min(name for name in names if mine.get(name) != theirs.get(name))
    raise UserError(
        f"{str(second)!r} and {str(first)!r} differ in {different!r}. "
        "Choose checkpoints of the same run."
    )


def _sums(streams: Sequence[Iterable[Tensor]]) -> Iterator[Tensor]:
    """Add tensors that come in equal pieces, with one piece of one tensor in memory at a time."""
    for first, *others in zip(*streams, strict=True):
        total = first.clone()  # it may be mapped to a file
        for other in others:
            total += other
        yield total


def _side_by_side(
    streams: Sequence[Iterable[Tensor]], width: int, scale: float
) -> Iterator[Tensor]:
    """Concatenate matrices along their rows and scale them.

    Args:
        streams: one matrix each, in flat blocks of whole rows, which are equal for all matrices.
        width: elements in a row of one matrix.
        scale: factor of every element.
    """
    for blocks in zip(*streams, strict=True):
        rows = [block.view(-1, width) for block in blocks]
        yield torch.cat(rows, dim=1).mul_(scale).flatten()


def _check_all(parts: Sequence[TensorSource]) -> Callable[[], None]:
    checks = [part.check for part in parts]

    def check() -> None:
        for check_part in checks:
            check_part()

    return check


def _stacked_spec(spec: Spec, dimension: int, count: int) -> Spec:
    """Return the spec of `count` factors that are concatenated; a bias keeps its shape."""
    if len(spec.shape) == 1:
        return spec
    shape = list(spec.shape)
    shape[dimension] *= count
    return Spec(tuple(shape), spec.dtype)


def _source_records(parts: Sequence[TensorSource]) -> list[JsonObject]:
    return [source for part in parts for source in part.about["sources"]]


def mean_between(start: Path | None, end: Path) -> TensorSource:
    """Average the weights over the steps after `start` up to `end`, in float32.

    The mean is (end * average(end) - start * average(start)) / (end - start) in steps. Adapters are
    averaged factor by factor, because the running average is.

    Args:
        start: the checkpoint before the first step; None: all steps up to `end`.
        end: the checkpoint of the last step.

    Raises:
        UserError: a checkpoint has no running average, or they differ in a name or shape.
    """
    for path in (start, end):
        if path is not None and not read_manifest(path)["running_average"]:
            raise UserError(
                f"{str(path)!r} has no running average. Train with "
                "trainer.use_averaged_model=true, or evaluate without use_averaged_model."
            )
    until = checkpoint_weights(end, AVERAGE)
    last = read_manifest(end)["step"]
    before: TensorSource | None = None
    first = 0
    parts = [until]
    if start is not None:
        before = checkpoint_weights(start, AVERAGE)
        first = read_manifest(start)["step"]
        check_same_weights(start, before, end, until)
        parts = [before, until]

    def pieces(name: str) -> Iterator[Tensor]:
        earlier: Iterable[Tensor | None] = before.pieces(name) if before else itertools.repeat(None)
        for average, start_average in zip(until.pieces(name), earlier, strict=before is not None):
            if start_average is not None:
                # (last * average - first * start_average) / (last - first), without large products
                average = average + (average - start_average) * (first / (last - first))
            yield average.float()

    specs: dict[str, Spec] = {}
    for name, spec in until.specs.items():
        specs[name] = Spec(spec.shape, torch.float32)
    about: JsonObject = {"sources": _source_records(parts), "mean": "every step between"}
    if any(map(FACTOR.search, specs)):
        about["lora"] = "factors"
    return TensorSource(specs, pieces, about, _check_all(parts))


def average(exp_dir: Path, selection: CheckpointSelection, output: Path | None = None) -> Path:
    """Write averaged weights to a file that names its source checkpoints.

    Args:
        exp_dir: the run's directory.
        selection: the checkpoints, and how to average them.
        output: the file; default: exp_dir/averaged-{iter|epoch}-N-avg-K.pt.

    Returns:
        The file.

    Raises:
        UserError: the checkpoints cannot be averaged, or the default file exists and could not be
            made again.
    """
    if output:
        return write_file(selection.weights(exp_dir), output)
    return averaged_file(exp_dir, selection, overwrite=True)


def averaged_file(
    exp_dir: Path, selection: CheckpointSelection, *, overwrite: bool = False
) -> Path:
    """Return exp_dir/averaged-{suffix}.pt, and write it if it is absent or outdated.

    Args:
        exp_dir: the run's directory.
        selection: the checkpoints, and how to average them.
        overwrite: write it even if it is up to date.

    Raises:
        UserError: the checkpoints cannot be averaged, or the file could not be made again.
    """
    path = exp_dir / f"averaged-{selection.suffix}.pt"
    try:
        with waiting("reading the checkpoints to average"):
            weights = selection.weights(exp_dir)
    except UserError as error:
        if not path.is_file():
            raise
        problem = str(error).rstrip(".")
        raise UserError(
            f"{problem}. To use the existing {path.name}, set "
            f"checkpoint.model.filename={path.name}."
        ) from error
    with FileLock(exp_dir / ".averaging.lock"):  # the first of several ranks averages
        existing = read_about(path)
        if existing == weights.about and not overwrite:
            return path
        check_replaceable(path, existing, weights.about)
        with sigterm_raises():
            return write_file(weights, path)


def check_replaceable(
    path: Path, existing: Mapping[str, object], wanted: Mapping[str, object]
) -> None:
    """Check that an averaged file may be overwritten, and log why it is.

    Args:
        path: the file.
        existing: the record in the file; empty if it has none or is incomplete.
        wanted: the record that the new file will have.

    Raises:
        UserError: the file has no record of its checkpoints, or one of them no longer exists.
    """
    if existing == wanted or not path.exists():
        return
    fix = f"Set checkpoint.model.filename={path.name} to use it, or move it away to average again."
    # A complete file without a record was written by someone else. An incomplete one is useless.
    if not existing and zipfile.is_zipfile(path):
        raise UserError(
            f"{str(path)!r} does not name the checkpoints that it averages, so it is not "
            f"overwritten. {fix}"
        )
    before = _checkpoint_names(existing)
    for name in before:
        if not (path.parent / name).exists():
            raise UserError(
                f"{str(path)!r} averages {', '.join(before)}, but {name} no longer exists, so the "
                f"file is not overwritten. {fix}"
            )
    logger.warning("%s is averaged again: %s", path.name, _difference(existing, wanted))


def _difference(existing: Mapping[str, object], wanted: Mapping[str, object]) -> str:
    """Return how the record of an averaged file differs from that of the new one."""
    if not existing:
        return "it is incomplete"
    before = _checkpoint_names(existing)
    after = _checkpoint_names(wanted)
    if before != after:
        return f"it averages {', '.join(before)} instead of {', '.join(after)}"
    if existing["sources"] == wanted["sources"]:
        return "it was averaged with other options"
    return "its checkpoints have changed"


def _checkpoint_names(about: Mapping[str, object]) -> list[str]:
    sources = about.get("sources", [])
    assert isinstance(sources, list)
    return [source["checkpoint"] for source in sources]


def resolve_weights(exp_dir: Path, *, filename: str | None, selection: CheckpointSelection) -> Path:
    """Return the weights file of an evaluation. An averaged file is written if it is outdated.

    The first of these that is given is used: `filename`; the average by step or by epoch; the
    weights of an exported directory; exp_dir/pretrained.pt.

    Args:
        exp_dir: a run's directory, or an exported directory.
        filename: a weights file, absolute or relative to exp_dir.
        selection: the checkpoints to average.

    Raises:
        UserError: the choice is incomplete or contradictory, or the file does not exist.
    """
    check_exp_dir(exp_dir)
    if filename:
        if selection.iteration or selection.epoch or selection.avg or selection.running:
            logger.warning(
                "checkpoint.model.iter, epoch, avg and use_averaged_model are not used, because "
                "checkpoint.model.filename=%r comes first. Remove one of the two choices.",
                filename,
            )
        return _named_file(exp_dir, filename)
    if is_exported(exp_dir):
        if selection.iteration or selection.epoch or selection.avg or selection.running:
            raise UserError(
                f"exp_dir={str(exp_dir)!r} is an exported model, which has no checkpoints. "
                "Leave out checkpoint.model.iter, epoch, avg and use_averaged_model, or give the "
                "exp_dir of the run."
            )
        return main_weight_file(exp_dir)
    if (selection.iteration > 0 or selection.epoch > 0) != (selection.avg > 0):
        raise UserError(_incomplete_choice(exp_dir, selection))
    if selection.avg > 0:
        return averaged_file(exp_dir, selection)
    if selection.running:
        raise UserError(
            "checkpoint.model.use_averaged_model=true needs the checkpoints to average. "
            "Set checkpoint.model.avg, and checkpoint.model.iter or checkpoint.model.epoch."
        )
    return _pretrained_file(exp_dir)


def _pretrained_file(exp_dir: Path) -> Path:
    """Return the weights at the end of training."""
    path = exp_dir / "pretrained.pt"
    if not path.is_file():
        available = ", ".join(map(str, list_checkpoints(exp_dir))) or "none"
        raise UserError(
            f"exp_dir={str(exp_dir)!r} has no pretrained.pt. Train to the end, or set "
            f"checkpoint.model.iter and checkpoint.model.avg. Available: {available}."
        )
    return path


def _incomplete_choice(exp_dir: Path, selection: CheckpointSelection) -> str:
    """Return a message about a choice of checkpoints with only the last one or only the number."""
    if selection.avg > 0:
        return (
            f"checkpoint.model.avg={selection.avg} needs checkpoint.model.iter or "
            "checkpoint.model.epoch. Set one of them to the last checkpoint to average."
        )
    key = "iter" if selection.iteration > 0 else "epoch"
    number = selection.iteration if selection.iteration > 0 else selection.epoch
    return (
        f"checkpoint.model.{key}={number} needs checkpoint.model.avg, the number of checkpoints to "
        f"average. Use checkpoint.model.avg=1 for this checkpoint alone, or leave out {key} to "
        f"evaluate {str(exp_dir / 'pretrained.pt')!r}."
    )


def is_exported(exp_dir: Path) -> bool:
    """Return whether a directory is a whole model of save_pretrained and not a run."""
    if (exp_dir / "pretrained.pt").is_file() or complete_checkpoints(exp_dir):
        return False
    return has_saved_weights(exp_dir)


def _named_file(exp_dir: Path, filename: str) -> Path:
    """Return the path of a weights file that the user named."""
    path = exp_dir / filename  # an absolute filename stays as it is
    given = f"checkpoint.model.filename={filename!r}"
    if not path.exists():
        raise UserError(
            f"{given} does not exist, and {str(exp_dir)!r} has no such file. Check the path."
        )
    if (path / MANIFEST).is_file():
        raise UserError(
            f"{given} is a ZeRO checkpoint. Use checkpoint.model.{_choice_of(path.name)} "
            "checkpoint.model.avg=1 instead, or convert it with "
            f"'asrllm consolidate {path.parent} --tag {path.name}'."
        )
    return path


def _choice_of(tag: str) -> str:
    """Return the key and value that choose a checkpoint."""
    step = STEP_TAG.fullmatch(tag)
    if step:
        return f"iter={step[1]}"
    epoch = EPOCH_TAG.fullmatch(tag)
    if epoch:
        return f"epoch={epoch[1]}"
    return "iter=N"
