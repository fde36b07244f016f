"""One ZeRO checkpoint -> the trained weights as a plain state dict in float32.

The optimizer's float32 masters are read, not the rounded working copies. Where they lie depends on the stage:
0: whole, in `mp_rank_00_model_states.pt`. 1, 2: one flat vector a parameter group, cut into equal parts over the ranks.
3: every parameter cut into equal parts over the ranks, the last one padded; a rank's parts lie one after another.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asrllm.errors import UserError
from asrllm.training.checkpoint import read_carried, read_manifest, trusted_unpickling

RANK_FILE = re.compile(r".*zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


def consolidate(checkpoint: str | Path, output: str | Path) -> Path:
    """Write the trained weights of `checkpoint` to `output`; the file appears when it is complete."""
    return save_state(read_weights(Path(checkpoint)), Path(output))


def save_state(state: dict[str, Tensor], output: Path) -> Path:
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"the output {str(output)!r} is a directory, or its directory does not exist: give a file's path")
    partial = output.with_name(output.name + ".partial")
    torch.save(state, partial)
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    partial.replace(output)
    return output


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The trained weights by name, float32. Raises UserError naming the missing file, key or shape."""
    manifest = read_manifest(checkpoint)
    readers = {0: _stage_0, 1: _stage_1_2, 2: _stage_1_2, 3: _stage_3}
    expected = manifest["trainable"]
    state = dict(readers[manifest["zero_stage"]](checkpoint, manifest["world_size"], list(expected)))
    for name in sorted(expected.keys() | state.keys()):
        if name not in state or name not in expected:
            raise UserError(
                f"{checkpoint}: {name!r} is {'missing' if name not in state else 'not in its manifest'}: the checkpoint is damaged"
            )
        if list(state[name].shape) != expected[name]["shape"]:
            raise UserError(f"{checkpoint}: {name!r} has the shape {list(state[name].shape)}, its manifest says {expected[name]['shape']}")
    carried = read_carried(checkpoint.parent, manifest)
    return {name: state[name] for name in expected} | {name: tensor.float() for name, tensor in carried.items()}


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"the checkpoint file {str(path)!r} is missing: the checkpoint is damaged")
    try:
        with trusted_unpickling():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"the checkpoint file {str(path)!r} cannot be read: {' '.join(str(error).split())[:200]}") from error


def _rank_states(checkpoint: Path, world_size: int) -> list[dict[str, Any]]:
    """The optimizer states of all ranks, in their order."""
    files = {int(match.group(1)): path for path in checkpoint.glob("*.pt") if (match := RANK_FILE.fullmatch(path.name))}
    if sorted(files) != list(range(world_size)):
        raise UserError(
            f"{checkpoint}: optimizer files of ranks {sorted(files)}, but the run had {world_size} ranks: the checkpoint is damaged"
        )
    return [_load(files[rank])["optimizer_state_dict"] for rank in range(world_size)]


def _stage_0(checkpoint: Path, world_size: int, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    saved = _load(checkpoint / "mp_rank_00_model_states.pt")
    groups = saved["optimizer"].get("fp32_groups")
    if groups is None:  # trained in float32: the weights are the masters
        yield from ((name, tensor) for name, tensor in saved["module"].items() if name in names)  # not the second names of tied weights
        return
    masters = [tensor for group in groups for tensor in group]
    for name, tensor in zip(names, masters, strict=True):
        yield name, tensor.detach()


def _stage_1_2(checkpoint: Path, world_size: int, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    shapes = _load(checkpoint / "mp_rank_00_model_states.pt")["param_shapes"]
    parts = [state["single_partition_of_fp32_groups"] for state in _rank_states(checkpoint, world_size)]
    for group, named in enumerate(shapes):
        flat, at = torch.cat([part[group] for part in parts]), 0
        for name, shape in named.items():
            yield name, flat[at : at + shape.numel()].view(shape).clone()
            at += shape.numel()


def _stage_3(checkpoint: Path, world_size: int, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    shapes = _load(checkpoint / "zero_pp_rank_0_mp_rank_00_model_states.pt")["param_shapes"]
    parts = [torch.cat(list(state["fp32_flat_groups"])) for state in _rank_states(checkpoint, world_size)]
    at = 0
    for named in shapes:
        for name, shape in named.items():
            size = -(-shape.numel() // world_size)
            whole = torch.cat([part[at : at + size] for part in parts])
            yield name, whole[: shape.numel()].view(shape)
            at += size
