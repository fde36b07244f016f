"""What a rank's optimizer holds of every trained weight, and filling it from a checkpoint of another number of ranks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import Tensor, nn

from asrllm import distributed
from asrllm.training.checkpoint.zero_files import MASTERS, ZeroFiles


class Segment(NamedTuple):
    """A stretch of a weight in one of the optimizer's float32 vectors: it begins at `start` in the weight and at `offset` in the vector."""

    name: str
    start: int
    offset: int
    numel: int


def partitions(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[Tensor, list[Segment]]]:
    """This rank's float32 vectors with what lies in them; padding apart. At stage 0 every vector is a whole weight."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    yield from {0: _whole, 1: _flat, 2: _flat, 3: _sub_groups}[engine.zero_optimization_stage()](
        engine.optimizer, names
    )


def parameter_names(engine: deepspeed.DeepSpeedEngine) -> list[list[str]]:
    """The trained weights by parameter group, in the order in which DeepSpeed holds them."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    held = next(
        (key for key in ("bf16_groups", "bit16_groups", "fp16_groups") if hasattr(optimizer, key)),
        None,
    )
    groups = (
        getattr(optimizer, held) if held else [group["params"] for group in optimizer.param_groups]
    )
    return [[names[parameter] for parameter in group] for group in groups]


def full_shape(parameter: nn.Parameter) -> list[int]:
    """The shape of a parameter that ZeRO-3 may hold in parts."""
    return list(getattr(parameter, "ds_shape", parameter.shape))


def _whole(optimizer: Any, names: dict[Any, str]) -> Iterator[tuple[Tensor, list[Segment]]]:
    if hasattr(optimizer, "fp32_groups"):
        groups = zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True)
    else:  # in float32 the weights are the masters
        groups = zip(*2 * [[group["params"] for group in optimizer.param_groups]], strict=True)
    for masters, parameters in groups:
        for master, parameter in zip(masters, parameters, strict=True):
            yield master, [Segment(names[parameter], 0, 0, master.numel())]


def _flat(optimizer: Any, names: dict[Any, str]) -> Iterator[tuple[Tensor, list[Segment]]]:
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # DeepSpeed's bf16 optimizer
        vectors, groups = optimizer.fp32_groups_flat_partition, optimizer.bf16_groups
    else:
        vectors, groups = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups
    for vector, parameters in zip(vectors, groups, strict=True):
        held = [(names[p], p._hp_mapping) for p in parameters if p._hp_mapping is not None]
        yield (
            vector,
            [
                Segment(
                    name,
                    m.lp_fragment_address.start,
                    m.hp_fragment_address.start,
                    m.hp_fragment_address.numel,
                )
                for name, m in held
            ],
        )


def _sub_groups(optimizer: Any, names: dict[Any, str]) -> Iterator[tuple[Tensor, list[Segment]]]:
    for vector, parameters in zip(
        optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True
    ):
        segments, offset = [], 0
        for parameter in parameters:
            part = parameter.partition_numel()
            start = part * distributed.rank()
            if (numel := min(part, parameter.ds_numel - start)) > 0:
                segments.append(Segment(names[parameter], start, offset, numel))
            offset += part
        yield vector, segments


@torch.no_grad()
def load_from_other_ranks(
    engine: deepspeed.DeepSpeedEngine, checkpoint: Path, manifest: dict[str, Any]
) -> None:
    """Fill this rank's partitions of weights and optimizer from the files of another number of ranks; each reads what it keeps."""
    files, optimizer = ZeroFiles(checkpoint, manifest), engine.optimizer
    staged = engine.zero_optimization_stage() == 3
    if staged:
        optimizer.checkpoint_event_prologue()
    for number, (vector, segments) in enumerate(partitions(engine)):
        state = optimizer.optimizer.state[vector]
        state.update(
            {key: _like(value, state.get(key)) for key, value in files.shared_state(number).items()}
        )
        for key in (MASTERS, *files.state_keys()):
            target = (
                vector.data if key == MASTERS else state.setdefault(key, torch.zeros_like(vector))
            )
            fill(target, segments, files, key)
    if staged:
        for working, vector in zip(
            optimizer.fp16_partitioned_groups_flat,
            optimizer.fp32_partitioned_groups_flat,
            strict=True,
        ):
            working.copy_(vector)
        optimizer.checkpoint_event_epilogue()
    else:
        for name, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(files.read(name))
    for key in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, key, files.model[key])
    if "loss_scaler" in files.optimizers[0]:
        optimizer.loss_scaler = files.optimizers[0]["loss_scaler"]


def fill(vector: Tensor, segments: list[Segment], files: ZeroFiles, key: str) -> None:
    for name, start, offset, numel in segments:
        vector[offset : offset + numel].copy_(files.read_range(name, start, numel, key))


def _like(value: Any, there: Any) -> Any:
    """On the device of what is there."""
    return (
        value.to(there.device) if isinstance(value, Tensor) and isinstance(there, Tensor) else value
    )
