"""The weight files of a saved directory."""

from pathlib import Path

import torch
from torch import Tensor

from asrllm.errors import UserError
from asrllm.models.plain_tensors import open_tensors
from asrllm.models.state_dict import (
    StateDict,
    check_finite,
)
from asrllm.text_files import read_json_object

# A directory with neither of these files does not contain a complete model.
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
REOPEN_BYTES = 1 << 26  # bytes read from a file before its memory-mapped pages are released


def indexed_files(index: Path) -> list[Path]:
    """Return the weight files that an index names (transformers' *.index.json).

    Raises:
        UserError: the index is corrupted, or names a file outside of its directory.
    """
    weight_map = read_json_object(index, "the index of the weights").get("weight_map")
    values = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not all(isinstance(name, str) for name in values):
        raise UserError(f"{str(index)!r} has no 'weight_map' of file names. Copy it again.")
    names = sorted(set(values))
    for name in names:
        is_outside = Path(name).is_absolute() or ".." in Path(name).parts
        if is_outside or name.endswith(".json"):
            raise UserError(
                f"{str(index)!r} names {name!r}, which is not a weight file in the directory of "
                "the index. Copy it again."
            )
    return [index.parent / name for name in names]


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a directory that `save_pretrained` wrote.

    Raises:
        UserError: the directory is incomplete, or contains the weights of two models.
    """
    single = folder / SINGLE
    index = folder / INDEX
    if single.exists() and index.exists():
        raise UserError(
            f"{str(folder)!r} contains both {SINGLE} and {INDEX}. Remove the outdated one."
        )
    if single.exists():
        return [single]
    if not index.exists():
        raise UserError(
            f"{str(folder)!r} contains neither {SINGLE} nor {INDEX}. Give a directory that "
            "'asrllm export' has completed."
        )
    files = indexed_files(index)
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise UserError(f"{str(folder)!r} has no {missing[0]}, which {INDEX} names. Copy it again.")
    return files


def main_weight_file(folder: Path) -> Path:
    """Return the only weight file of a saved directory, or the index if there are several."""
    weight_files(folder)
    single = folder / SINGLE
    return single if single.exists() else folder / INDEX


def read_tensors(file: Path, dtype: torch.dtype | None = None) -> StateDict:
    """Read a safetensors file into memory.

    The tensors are copies, so that the file may be replaced while the model is in use. The file's
    memory-mapped pages are released on the way, so that they do not take the memory of a second
    model.

    Args:
        file: the file.
        dtype: dtype of the floating-point tensors; by default as saved.

    Raises:
        UserError: the file cannot be read, or a weight is not finite.
    """
    state: StateDict = {}
    with open_tensors(file) as tensors:
        names = list(tensors.keys())
    while len(state) < len(names):
        taken = 0
        with open_tensors(file) as tensors:
            for name in names[len(state) :]:
                tensor = tensors.get_tensor(name)
                check_finite(name, tensor, file)
                taken += tensor.nbytes
                state[name] = _copied(tensor, dtype)
                if taken > REOPEN_BYTES:
                    break
            del tensor
    return state


def _copied(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        dtype = tensor.dtype
    return tensor.to(dtype, copy=True)
