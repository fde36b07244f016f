"""The mean of several checkpoints, and which weights an evaluation takes."""

import itertools
import logging
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from asrllm.atomic import sigterm_raises
from asrllm.checkpoints.consolidate import checkpoint_weights
from asrllm.errors import UserError
from asrllm.locks import FileLock
from asrllm.models.asr_llm.checks import read_config
from asrllm.models.asr_llm.serialization import main_weight_file
from asrllm.tensor_files import PIECE, Spec, TensorSource, read_about, write_file
from asrllm.training.checkpoint.manifest import (
    EPOCH_TAG,
    MANIFEST,
    STEP_TAG,
    check_run,
    complete_checkpoints,
    list_checkpoints,
    read_manifest,
)
from asrllm.training.checkpoint.zero_files import AVERAGE

LoraMean = Literal["product", "factors"]
FACTOR = re.compile(r"\.lora_(?:embedding_)?([AB])\.")
STACKED = {"A": 0, "B": 1}  # the dimension of the rank, in PEFT's factors


@dataclass(frozen=True, kw_only=True)
class Average:
    """What is averaged: the last `avg` step checkpoints up to `iteration`, or epoch checkpoints up to `epoch`.

    running: the mean over every step between the checkpoint before those and the last one, from their running averages (icefall's
    use_averaged_model), instead of the mean of the checkpoints themselves. lora: see mean_weights.
    """

    iteration: int = 0
    epoch: int = 0
    avg: int
    running: bool = False
    lora: LoraMean = "product"

    @property
    def suffix(self) -> str:
        last = f"iter-{self.iteration}" if self.iteration else f"epoch-{self.epoch}"
        how = (
            "-use-averaged-model"
            if self.running
            else "-lora-factors"
            if self.lora == "factors"
            else ""
        )
        return f"{last}-avg-{self.avg}{how}"

    def sources(self, exp_dir: Path) -> list[Path]:
        """The checkpoints, in ascending order; with `running` the one before them too, but where they begin with the training."""
        check_run(exp_dir)
        pattern, end, key = (
            (STEP_TAG, self.iteration, "iter")
            if self.iteration
            else (EPOCH_TAG, self.epoch, "epoch")
        )
        found = list_checkpoints(exp_dir, pattern)
        there = ", ".join(map(str, found)) or "none"
        if end not in found:
            raise UserError(
                f"exp_dir={str(exp_dir)!r} has no complete checkpoint for {key}={end}; there are: {there}"
            )
        chosen = [path for number, path in found.items() if number <= end]
        wanted = self.avg + (self.running and not (self.epoch and self.avg == end))
        if len(chosen) < wanted:
            what = f"avg={self.avg}" + (
                " and the one before, which use_averaged_model needs," if wanted > self.avg else ""
            )
            raise UserError(
                f"{what} is more than the {len(chosen)} checkpoints up to {key}={end} in {str(exp_dir)!r}; there are: {there}"
            )
        return chosen[-wanted:]

    def weights(self, exp_dir: Path) -> TensorSource:
        """The averaged weights, float32, made piece by piece: the number of checkpoints takes no memory."""
        sources = self.sources(exp_dir)
        if self.running:
            return mean_between(sources[0] if len(sources) > self.avg else None, sources[-1])
        return mean_weights(sources, lora=self.lora, rslora=adapters_with_rslora(exp_dir))


def adapters_with_rslora(exp_dir: Path) -> tuple[str, ...]:
    """The parts whose adapters are scaled by the root of their rank (PEFT's use_rslora)."""
    config = read_config(exp_dir)
    options = {"llm": config.lora, "audio_encoder": config.audio_encoder_lora}
    return tuple(part for part, chosen in options.items() if (chosen or {}).get("use_rslora"))


def mean_weights(
    checkpoints: Sequence[Path], *, lora: LoraMean = "product", rslora: Sequence[str] = ()
) -> TensorSource:
    """The mean of the checkpoints' weights, float32.

    lora="product": of adapters, the mean of the products B A, exactly: the checkpoints' factors one after another, so that the rank is as
    many times as great; a model that is loaded with them scales by alpha / that rank. "factors": of each factor by itself, as the other
    weights; it is no mean of what the adapters do. rslora: the parts whose adapters are scaled by alpha / sqrt(rank).
    """
    parts: list[TensorSource] = []
    for path in checkpoints:
        part = checkpoint_weights(path)
        check_same_weights(checkpoints[0], parts[0] if parts else part, path, part)
        parts.append(
            replace(part, specs=parts[0].specs) if parts else part
        )  # one copy, however many there are
    count, specs = len(parts), parts[0].specs
    adapted = [name for name in specs if FACTOR.search(name)]
    stacked: dict[str, int] = {}
    if lora == "product" and count > 1:
        if dora := next((name for name in specs if "lora_magnitude" in name), None):
            raise UserError(
                f"adapters with magnitudes (DoRA, {dora!r}) have no exact mean: average their factors (--lora factors, or "
                "checkpoint.model.lora=factors)"
            )
        stacked = {
            name: STACKED[match.group(1)] for name in adapted if (match := FACTOR.search(name))
        }
    readers = [part.pieces for part in parts]

    def pieces(name: str) -> Iterator[Tensor]:
        scale = (
            count**-0.5 if name.startswith(tuple(rslora)) else 1.0
        )  # of B: 1 / count against the greater rank in alpha / rank
        if name not in stacked:
            return (total.div_(count) for total in _sums([pieces(name) for pieces in readers]))
        if len(specs[name].shape) == 1:  # the bias of B, which is scaled with it
            return (total.mul_(scale) for total in _sums([pieces(name) for pieces in readers]))
        if stacked[name] == 0:
            return itertools.chain.from_iterable(pieces(name) for pieces in readers)
        width = specs[name].numel // specs[name].shape[0]
        rows = max(PIECE // (width * count), 1)
        return _side_by_side([pieces(name, rows * width) for pieces in readers], width, scale)

    about = {"sources": _sources(parts), "mean": "checkpoints"} | (
        {"lora": lora} if adapted else {}
    )
    made = {
        name: _stacked(spec, stacked[name], count) if name in stacked else spec
        for name, spec in specs.items()
    }
    return TensorSource(made, pieces, about, _all_checks(parts))


def check_same_weights(
    first: Path, weights: TensorSource, second: Path, others: TensorSource
) -> None:
    """Raises UserError where two checkpoints' weights differ in a name or a shape."""
    mine, theirs = weights.specs, others.specs
    if mine != theirs:
        name = min(
            name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)
        )
        raise UserError(
            f"{str(second)!r} and {str(first)!r} differ in {name!r}: they are of different runs"
        )


def _sums(running: Sequence[Iterable[Tensor]]) -> Iterator[Tensor]:
    """Of tensors in equal pieces, one piece of one of them at a time."""
    first, *others = map(iter, running)
    for total in first:
        for other in others:
            total += next(other)
        yield total


def _side_by_side(
    running: Sequence[Iterable[Tensor]], width: int, scale: float
) -> Iterator[Tensor]:
    """Matrices that come in equal blocks of whole rows, `width` elements each, next to each other."""
    for blocks in zip(*running, strict=True):
        yield torch.cat([block.view(-1, width) for block in blocks], dim=1).mul_(scale).flatten()


def _all_checks(parts: Sequence[TensorSource]) -> Callable[[], None]:
    checks = [part.check for part in parts]

    def check() -> None:
        for one in checks:
            one()

    return check


def _stacked(spec: Spec, dim: int, count: int) -> Spec:
    if len(spec.shape) == 1:
        return spec
    return Spec(
        tuple(size * count if i == dim else size for i, size in enumerate(spec.shape)), spec.dtype
    )


def _sources(parts: Sequence[TensorSource]) -> list[dict[str, Any]]:
    return [source for part in parts for source in part.about["sources"]]


def mean_between(start: Path | None, end: Path) -> TensorSource:
    """The mean of the weights over the steps after `start` (None: all) up to `end`, float32: (end * average - start * average) / steps.

    Adapters' factors are averaged as such: so the running average has them.
    """
    for path in (start, end):
        if path is not None and not read_manifest(path)["running_average"]:
            raise UserError(
                f"{str(path)!r} has no running average: train with trainer.use_averaged_model=true, or evaluate without it"
            )
    until = checkpoint_weights(end, AVERAGE)
    before = checkpoint_weights(start, AVERAGE) if start is not None else None
    if start is not None and before is not None:
        check_same_weights(start, before, end, until)
    parts = [before, until] if before else [until]
    last, first = (
        read_manifest(end)["step"],
        read_manifest(start)["step"] if start is not None else 0,
    )

    def pieces(name: str) -> Iterator[Tensor]:
        earlier: Iterable[Tensor | None] = before.pieces(name) if before else itertools.repeat(None)
        for average, start_average in zip(until.pieces(name), earlier, strict=before is not None):
            if start_average is not None:
                average = average + (average - start_average) * (first / (last - first))
            yield average.float()

    specs = {name: Spec(spec.shape, torch.float32) for name, spec in until.specs.items()}
    about = {"sources": _sources(parts), "mean": "every step between"} | (
        {"lora": "factors"} if any(map(FACTOR.search, specs)) else {}
    )
    return TensorSource(specs, pieces, about, _all_checks(parts))


def average(exp_dir: Path, what: Average, output: Path | None = None) -> Path:
    """Write the averaged weights, to exp_dir/averaged-{iter|epoch}-N-avg-K.pt by default; the file names its sources.

    By default it raises UserError where what is there by that name cannot be made again.
    """
    return (
        write_file(what.weights(exp_dir), output)
        if output
        else averaged_file(exp_dir, what, again=True)
    )


def averaged_file(exp_dir: Path, what: Average, *, again: bool = False) -> Path:
    """The file of that name in exp_dir; made where it is missing or of other checkpoints, or `again`."""
    made = exp_dir / f"averaged-{what.suffix}.pt"
    try:
        weights = what.weights(exp_dir)
    except UserError as error:
        if not made.is_file():
            raise
        raise UserError(
            f"{error}; {made.name} is there, checkpoint.model.filename={made.name} takes it as it is"
        ) from error
    with FileLock(exp_dir / ".averaging.lock"):  # of several ranks the first one averages
        there = read_about(made)
        if there == weights.about and not again:
            return made
        check_replaceable(made, there, weights.about)
        with sigterm_raises():
            return write_file(weights, made)


def check_replaceable(made: Path, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Say why an averaged file is made again. Raises UserError where it is of somebody else's, or of checkpoints that are gone."""
    if there == now or not made.exists():
        return
    take = f"give checkpoint.model.filename={made.name} to take it, or move it away to have the mean made"
    if not there and zipfile.is_zipfile(made):  # one that is cut short is no loss
        raise UserError(
            f"{str(made)!r} does not say of which checkpoints it is the mean, so it is not written over: {take}"
        )
    before, after = _names(there), _names(now)
    if gone := [name for name in before if not (made.parent / name).exists()]:
        raise UserError(
            f"{str(made)!r} is the mean of {', '.join(before)}, of which {gone[0]} is gone, so it is not written over: {take}"
        )
    if not there:
        why = "it was cut short"
    elif before != after:
        why = f"it is the mean of {', '.join(before)}, and is to be that of {', '.join(after)}"
    else:
        why = (
            "it was averaged otherwise"
            if there["sources"] == now["sources"]
            else "its checkpoints have changed since"
        )
    logging.getLogger(__name__).warning("%s is made again: %s", made.name, why)


def _names(about: Mapping[str, Any]) -> list[str]:
    return [source["checkpoint"] for source in about.get("sources", [])]


def resolve_weights(exp_dir: Path, *, filename: str | None, what: Average) -> Path:
    """The weights file that an evaluation takes; an averaged one is made where it is missing or of other checkpoints.

    In this order: filename (absolute, or below exp_dir); iter and avg; epoch and avg; exp_dir/pretrained.pt; an exported directory's own.
    """
    check_run(exp_dir)
    if filename:
        return _named(exp_dir, filename)
    if is_exported(exp_dir):
        if what.iteration or what.epoch or what.avg or what.running:
            raise UserError(
                f"exp_dir={str(exp_dir)!r} is an exported model, which has no checkpoints. Leave out checkpoint.model.iter, epoch, avg "
                "and use_averaged_model, or give the exp_dir of the run."
            )
        return main_weight_file(exp_dir)
    if (what.iteration > 0 or what.epoch > 0) != (what.avg > 0):
        raise UserError(_half_a_choice(exp_dir, what))
    if what.avg > 0:
        return averaged_file(exp_dir, what)
    if what.running:
        raise UserError(
            "checkpoint.model.use_averaged_model=true needs iter and avg, or epoch and avg"
        )
    path = exp_dir / "pretrained.pt"
    if not path.is_file():
        there = ", ".join(map(str, list_checkpoints(exp_dir))) or "none"
        raise UserError(
            f"exp_dir={str(exp_dir)!r} has no pretrained.pt: train to the end, or give checkpoint.model.iter and checkpoint.model.avg "
            f"(checkpoints there: {there})"
        )
    return path


def _half_a_choice(exp_dir: Path, what: Average) -> str:
    """Return what is missing to a choice of checkpoints."""
    if what.avg > 0:
        return f"checkpoint.model.avg={what.avg} needs checkpoint.model.iter or checkpoint.model.epoch, the last checkpoint of the mean."
    key, number = ("iter", what.iteration) if what.iteration > 0 else ("epoch", what.epoch)
    return (
        f"checkpoint.model.{key}={number} needs checkpoint.model.avg, the number of checkpoints to average: 1 takes that one alone. "
        f"Without {key}, {str(exp_dir / 'pretrained.pt')!r} is taken."
    )


def is_exported(exp_dir: Path) -> bool:
    """Return whether a directory is a whole model of save_pretrained and not a run."""
    if (exp_dir / "pretrained.pt").is_file() or complete_checkpoints(exp_dir):
        return False
    return any(exp_dir.glob("model*.safetensors"))


def _named(exp_dir: Path, filename: str) -> Path:
    path = exp_dir / filename  # an absolute filename stays as it is
    given = f"checkpoint.model.filename={filename!r}"
    if not path.exists():
        raise UserError(f"{given} does not exist, nor is it in {str(exp_dir)!r}: check the path")
    if (path / MANIFEST).is_file():
        step, epoch = STEP_TAG.fullmatch(path.name), EPOCH_TAG.fullmatch(path.name)
        choice = f"iter={step[1]} " if step else f"epoch={epoch[1]} " if epoch else "iter=N "
        raise UserError(
            f"{given} is a ZeRO checkpoint: give checkpoint.model.{choice}checkpoint.model.avg=1 instead, or make weights of it with "
            f"'asrllm consolidate {path.parent} --tag {path.name}'"
        )
    return path
