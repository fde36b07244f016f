"""A rank's partition of the trained weights and optimizer state, and loading it from a checkpoint.

The checkpoint may have been written by any number of ranks.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import Tensor, nn

from asrllm import distributed
from asrllm.training.checkpoint.manifest import Manifest
from asrllm.training.checkpoint.zero_files import MASTERS, ZeroFiles

ZeroOptimizer = Any  # one of DeepSpeed's optimizers, which have no common base class
BIT16_GROUPS = ("bf16_groups", "bit16_groups", "fp16_groups")  # depends on optimizer and stage


class WeightSlice(NamedTuple):
    """A range of a weight in one of the optimizer's flat float32 vectors.

    Attributes:
        name: name of the weight.
        start: first element in the flattened weight.
        offset: first element in the vector.
        numel: number of elements.
    """

    name: str
    start: int
    offset: int
    numel: int


# a flat float32 vector and its weights without padding
Partition = tuple[Tensor, list[WeightSlice]]
ParameterNames = Mapping[nn.Parameter, str]


def partitions(engine: deepspeed.DeepSpeedEngine) -> Iterator[Partition]:
    """Yield this rank's flat float32 vectors. At stage 0 every vector is a whole weight."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    stage = engine.zero_optimization_stage()
    by_stage: dict[int, Callable[[ZeroOptimizer, ParameterNames], Iterator[Partition]]] = {
        0: _whole_weights,
        1: _group_vectors,
        2: _group_vectors,
        3: _sub_group_vectors,
    }
    yield from by_stage[stage](engine.optimizer, names)


def parameter_names(engine: deepspeed.DeepSpeedEngine) -> list[list[str]]:
    """Return the names of the trained weights by parameter group, in DeepSpeed's order."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    for attribute in BIT16_GROUPS:
        if hasattr(optimizer, attribute):
            groups = getattr(optimizer, attribute)
            break
    else:
        # a plain optimizer of torch: stage 0 in float32
        groups = [group["params"] for group in optimizer.param_groups]
    result = []
    for group in groups:
        result.append([names[parameter] for parameter in group])
    return result


def full_shape(parameter: nn.Parameter) -> list[int]:
    """Return the shape of a whole parameter, which ZeRO-3 may have partitioned."""
    return list(getattr(parameter, "ds_shape", parameter.shape))


def _whole_weights(optimizer: ZeroOptimizer, names: ParameterNames) -> Iterator[Partition]:
    """Yield the partitions of stage 0."""
    if hasattr(optimizer, "fp32_groups"):
        masters = optimizer.fp32_groups
        groups = optimizer.fp16_groups
    else:  # in float32 the weights are the master weights
        groups = [group["params"] for group in optimizer.param_groups]
        masters = groups
    for group_masters, parameters in zip(masters, groups, strict=True):
        for master, parameter in zip(group_masters, parameters, strict=True):
            yield master, [WeightSlice(names[parameter], 0, 0, master.numel())]


def _group_vectors(optimizer: ZeroOptimizer, names: ParameterNames) -> Iterator[Partition]:
    """Yield the partitions of stages 1 and 2."""
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # DeepSpeed's bf16 optimizer
        vectors = optimizer.fp32_groups_flat_partition
        groups = optimizer.bf16_groups
    else:
        vectors = optimizer.single_partition_of_fp32_groups
        groups = optimizer.bit16_groups
    for vector, parameters in zip(vectors, groups, strict=True):
        slices = []
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:  # this rank has a part of the weight
                start = mapping.lp_fragment_address.start
                address = mapping.hp_fragment_address
                slices.append(WeightSlice(names[parameter], start, address.start, address.numel))
        yield vector, slices


def _sub_group_vectors(optimizer: ZeroOptimizer, names: ParameterNames) -> Iterator[Partition]:
    """Yield the partitions of stage 3."""
    vectors = optimizer.fp32_partitioned_groups_flat
    for vector, parameters in zip(vectors, optimizer.fp16_groups, strict=True):
        slices = []
        offset = 0
        for parameter in parameters:
            part = parameter.partition_numel()
            start = part * distributed.rank()
            numel = min(part, parameter.ds_numel - start)
            # The last ranks may have nothing but padding of a small weight.
            if numel > 0:
                slices.append(WeightSlice(names[parameter], start, offset, numel))
            offset += part
        yield vector, slices


@torch.no_grad()
def load_from_other_ranks(
    engine: deepspeed.DeepSpeedEngine, checkpoint: Path, manifest: Manifest
) -> None:
    """Load weights and optimizer from a checkpoint of another number of ranks.

    Each rank reads only its own partition.
    """
    files = ZeroFiles(checkpoint, manifest)
    optimizer = engine.optimizer
    is_stage_3 = engine.zero_optimization_stage() == 3
    if is_stage_3:
        # DeepSpeed gathers small weights permanently. It partitions them until the epilogue.
        optimizer.checkpoint_event_prologue()
    for number, (vector, slices) in enumerate(partitions(engine)):
        state = optimizer.optimizer.state[vector]
        for key, value in files.shared_state(number).items():
            state[key] = _to_device_of(state.get(key), value)
        fill(vector.data, slices, files, MASTERS)
        for key in files.state_keys():
            values = state.setdefault(key, torch.zeros_like(vector))
            fill(values, slices, files, key)
    if is_stage_3:
        _copy_to_working_weights(optimizer)
        optimizer.checkpoint_event_epilogue()
    else:
        for name, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(files.read(name))
    for key in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, key, files.model[key])
    if "loss_scaler" in files.optimizers[0]:
        optimizer.loss_scaler = files.optimizers[0]["loss_scaler"]


def _copy_to_working_weights(optimizer: ZeroOptimizer) -> None:
    """Copy the master weights of stage 3 to the working weights."""
    working = optimizer.fp16_partitioned_groups_flat
    masters = optimizer.fp32_partitioned_groups_flat
    for weights, vector in zip(working, masters, strict=True):
        weights.copy_(vector)


def fill(vector: Tensor, slices: list[WeightSlice], files: ZeroFiles, key: str) -> None:
    """Fill a flat vector from a checkpoint.

    Args:
        vector: (n,), this rank's part of the weights or of their optimizer state.
        slices: the weights in the vector.
        files: files of the checkpoint.
        key: MASTERS, AVERAGE or one of `files.state_keys()`.
    """
    for name, start, offset, numel in slices:
        vector[offset : offset + numel].copy_(files.read_range(name, start, numel, key))


def _to_device_of(current: object, value: Any) -> Any:
    """Return a value, moved to the device of the current one if both are tensors."""
    if isinstance(value, Tensor) and isinstance(current, Tensor):
        return value.to(current.device)
    return value
