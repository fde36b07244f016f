"""The mean of several checkpoints, and which weights an evaluation takes."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from torch import Tensor

from asrllm.checkpoints.consolidate import checkpoint_weights
from asrllm.errors import UserError
from asrllm.models.description import read_config
from asrllm.tensor_files import Spec, TensorSource, read_about, write_file
from asrllm.training.manifest import EPOCH_TAG, STEP_TAG, list_checkpoints, read_manifest
from asrllm.training.zero_files import AVERAGE

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


def mean_weights(checkpoints: Sequence[Path], *, lora: LoraMean = "product", rslora: Sequence[str] = ()) -> TensorSource:
    """The mean of the checkpoints' weights, float32.

    lora="product": of adapters, the mean of the products B A, exactly: the checkpoints' factors one after another, so that the rank is as
    many times as great; a model that is loaded with them scales by alpha / that rank. "factors": of each factor by itself, as the other
    weights; it is no mean of what the adapters do. rslora: the parts whose adapters are scaled by alpha / sqrt(rank).
    """
    parts = [checkpoint_weights(path) for path in checkpoints]
    count, first = len(parts), parts[0]
    for path, part in zip(checkpoints, parts, strict=True):
        if part.specs != first.specs:
            name = min(name for name in first.specs.keys() | part.specs.keys() if first.specs.get(name) != part.specs.get(name))
            raise UserError(f"{str(path)!r} and {str(checkpoints[0])!r} differ in {name!r}: they are of different runs")
    stacked: dict[str, int] = {}
    if lora == "product" and count > 1:
        if dora := next((name for name in first.specs if "lora_magnitude" in name), None):
            raise UserError(f"adapters with magnitudes (DoRA, {dora!r}) have no exact mean: average their factors (--lora factors)")
        stacked = {name: STACKED[match.group(1)] for name in first.specs if (match := FACTOR.search(name))}

    def pieces(name: str) -> Iterator[Tensor]:
        if name not in stacked:
            running = [iter(part.pieces(name)) for part in parts]
            while (total := next(running[0], None)) is not None:
                for others in running[1:]:
                    total = total + next(others)  # one piece of one checkpoint at a time
                yield total / count
            return
        factors = [torch.cat([*part.pieces(name)]).view(first.specs[name].shape) for part in parts]
        scale = count**-0.5 if name.startswith(tuple(rslora)) else 1.0  # of B: 1 / count against the greater rank in alpha / rank
        if factors[0].ndim == 1:  # the bias of B, which is scaled with it
            yield sum(factors[1:], start=factors[0]) * scale
        else:
            yield (torch.cat(factors, dim=stacked[name]) * (scale if stacked[name] else 1.0)).flatten()

    specs = {name: _stacked(spec, stacked[name], count) if name in stacked else spec for name, spec in first.specs.items()}
    return TensorSource(specs, pieces, {"sources": _sources(parts), "mean": "checkpoints", "lora": lora})


def _stacked(spec: Spec, dim: int, count: int) -> Spec:
    if len(spec.shape) == 1:
        return spec
    return Spec(tuple(size * count if i == dim else size for i, size in enumerate(spec.shape)), spec.dtype)


def _sources(parts: Sequence[TensorSource]) -> list[dict[str, Any]]:
    return [source for part in parts for source in part.about["sources"]]


def mean_between(start: Path | None, end: Path) -> TensorSource:
    """The mean of the weights over the steps after `start` (None: all) up to `end`, float32: (end * average - start * average) / steps.

    Adapters' factors are averaged as such: so the running average has them.
    """
    for path in (start, end):
        if path is not None and not read_manifest(path)["running_average"]:
            raise UserError(f"{str(path)!r} has no running average: train with trainer.use_averaged_model=true, or evaluate without it")
    until = checkpoint_weights(end, AVERAGE)
    before = checkpoint_weights(start, AVERAGE) if start is not None else None
    last, first = read_manifest(end)["step"], read_manifest(start)["step"] if start is not None else 0

    def pieces(name: str) -> Iterator[Tensor]:
        for average, earlier in zip(until.pieces(name), before.pieces(name) if before else itertools.repeat(None)):  # noqa: B905
            yield (average if earlier is None else average + (average - earlier) * (first / (last - first))).float()

    specs = {name: Spec(spec.shape, torch.float32) for name, spec in until.specs.items()}
    about = {"sources": _sources([before, until] if before else [until]), "mean": "every step between", "lora": "factors"}
    return TensorSource(specs, pieces, about)


def average(exp_dir: Path, what: Average, output: Path | None = None) -> Path:
    """Write the averaged weights, to exp_dir/averaged-{iter|epoch}-N-avg-K.pt by default; the file names its sources."""
    return write_file(what.weights(exp_dir), output or exp_dir / f"averaged-{what.suffix}.pt")


def resolve_weights(exp_dir: Path, *, filename: str | None, what: Average) -> Path:
    """The weights file that an evaluation takes; an averaged one is made where it is missing or of other checkpoints.

    In this order: filename (absolute, or below exp_dir); iter and avg; epoch and avg; exp_dir/pretrained.pt.
    """
    if not exp_dir.is_dir():
        raise UserError(f"exp_dir={str(exp_dir)!r} does not exist: give the directory of a trained run")
    if filename:
        path = exp_dir / filename  # an absolute filename stays as it is
        if not path.exists():
            raise UserError(f"checkpoint.model.filename={filename!r} does not exist, nor is it in {str(exp_dir)!r}: check the path")
        return path
    if (what.iteration > 0 or what.epoch > 0) != (what.avg > 0):
        raise UserError(f"checkpoint.model: iter={what.iteration}, epoch={what.epoch}, avg={what.avg}: give iter and avg, or epoch and avg")
    if what.avg > 0:
        made, weights = exp_dir / f"averaged-{what.suffix}.pt", what.weights(exp_dir)
        with FileLock(exp_dir / ".averaging.lock"):  # of several ranks the first one averages
            return made if read_about(made) == weights.about else write_file(weights, made)
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
