"""Read weight files of torch.save and safetensors without executing code in them."""

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from asrllm.errors import UserError
from asrllm.integrity import verify_weights
from asrllm.tensor_files import BAD_TENSORS
from asrllm.text_files import first_words


def load_plain_tensors(file: Path, what: str, fix: str, *, mapped: bool = False) -> Any:
    """Return the content of a file.

    Args:
        file: a safetensors file, or one that torch.save wrote.
        what: how error messages call it.
        fix: what to do if it cannot be read.
        mapped: map a file of torch.save into memory if its format allows it, so that a tensor is
            read when it is used.

    Raises:
        UserError: the file is corrupted, or contains more than tensors.
    """
    try:
        verify_weights(file)
        if file.suffix == ".safetensors":
            return load_file(file)
        mapped = mapped and zipfile.is_zipfile(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except (*BAD_TENSORS, OSError) as error:
        raise UserError(
            f"{what} cannot be read as plain tensors: {first_words(error)}. {fix}"
        ) from error


@contextlib.contextmanager
def open_tensors(file: Path) -> Iterator[safe_open]:
    """Open a safetensors file as a memory map, from which single tensors can be read.

    Raises:
        UserError: the file cannot be read. Errors of reading in the block are converted too.
    """
    try:
        verify_weights(file)
        with safe_open(file, "pt") as tensors:
            yield tensors
    except (*BAD_TENSORS, OSError) as error:
        raise UserError(
            f"the weights {str(file)!r} cannot be read: {first_words(error)}. "
            "Copy or download the file again."
        ) from error
