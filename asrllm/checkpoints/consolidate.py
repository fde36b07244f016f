"""One ZeRO checkpoint -> the trained weights as a plain state dict in float32."""

from pathlib import Path

import torch
from torch import Tensor

from asrllm.errors import UserError
from asrllm.training.checkpoint import read_carried
from asrllm.training.manifest import read_manifest
from asrllm.training.zero_files import MASTERS, ZeroFiles
from asrllm.writing import sync


def consolidate(checkpoint: str | Path, output: str | Path) -> Path:
    """Write the trained weights of `checkpoint` to `output`; the file appears when it is complete."""
    return save_state(read_weights(Path(checkpoint)), Path(output))


def save_state(state: dict[str, Tensor], output: Path) -> Path:
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"the output {str(output)!r} is a directory, or its directory does not exist: give a file's path")
    partial = output.with_name(output.name + ".partial")
    torch.save(state, partial)
    sync(partial)
    partial.replace(output)
    return output


def read_weights(checkpoint: Path, key: str = MASTERS) -> dict[str, Tensor]:
    """The trained weights by name, float32, and the carried ones; with key=AVERAGE their running average, float64.

    Raises UserError naming the missing file, key or shape.
    """
    manifest = read_manifest(checkpoint)
    files = ZeroFiles(checkpoint, manifest)
    if unknown := sorted(set(files.names) - files.shapes.keys()):
        raise UserError(f"{checkpoint}: {unknown[0]!r} is not in its manifest: the checkpoint is damaged")
    carried = read_carried(checkpoint, manifest)
    return {name: files.read(name, key).clone() for name in files.shapes} | {name: tensor.float() for name, tensor in carried.items()}
