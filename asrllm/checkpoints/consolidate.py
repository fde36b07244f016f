"""One ZeRO checkpoint -> the trained weights in float32."""

import hashlib
from collections.abc import Iterator
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asrllm.atomic import new_folder
from asrllm.errors import UserError
from asrllm.tensor_files import PIECE, Spec, TensorSource, write_file, write_sharded
from asrllm.training.checkpoint.manifest import MANIFEST, read_manifest
from asrllm.training.checkpoint.saver import read_inherited
from asrllm.training.checkpoint.zero_files import AVERAGE, MASTERS, ZeroFiles

DTYPES = {MASTERS: torch.float32, AVERAGE: torch.float64}
FILE_SUFFIXES = (".pt", ".bin", ".safetensors")
OTHER_SUFFIXES = (
    ".pth",
    ".ckpt",
    ".th",
    ".pkl",
    ".safetensor",
    ".npz",
    ".h5",
    ".gguf",
    ".onnx",
    ".zip",
    ".tar",
)  # no directory's name


def consolidate(
    checkpoint: str | Path, output: str | Path, *, max_shard_size: int | str = "5GB"
) -> Path:
    """Write the trained weights of `checkpoint` to `output`, which appears when it is complete and what was read is what was saved.

    A name that ends in .pt, .bin or .safetensors is one file; another is a directory of safetensors of at most max_shard_size each.
    Beyond its imports it takes less than 100 MB of memory.
    """
    output = Path(output)
    if output.suffix in OTHER_SUFFIXES:
        raise UserError(
            f"the output {str(output)!r}: give a file that ends in {', '.join(FILE_SUFFIXES)}, or a directory's name"
        )
    source = checkpoint_weights(Path(checkpoint))
    if output.suffix in FILE_SUFFIXES:
        return write_file(source, output)
    with new_folder(output) as partial:
        write_sharded(source, partial, max_shard_size=max_shard_size)
        source.check()
    return output


def checkpoint_weights(checkpoint: Path, key: str = MASTERS) -> TensorSource:
    """The trained weights by name, float32, and the inherited ones; with key=AVERAGE their running average, float64.

    Its pieces may be asked for in another size. Raises UserError naming the missing file, key or shape; its check a file whose bytes are
    not those that were written.
    """
    manifest = read_manifest(checkpoint)
    files = ZeroFiles(checkpoint, manifest)
    files.keep_weights_alone()
    inherited, dtype = read_inherited(checkpoint, manifest), DTYPES[key]
    shapes = {name: files.places[name].shape for name in manifest["trainable"]} | {
        name: tensor.shape for name, tensor in inherited.items()
    }

    def pieces(name: str, size: int = PIECE) -> Iterator[Tensor]:
        found = inherited[name].pieces(size) if name in inherited else files.pieces(name, key, size)
        return map(methodcaller("to", dtype), found)

    def check() -> None:
        files.check(key)
        for tensor in inherited.values():
            tensor.storage.check()

    about = {"sources": [describe_source(checkpoint, manifest)]}
    return TensorSource(
        {name: Spec(shape, dtype) for name, shape in shapes.items()}, pieces, about, check
    )


def describe_source(checkpoint: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What a weights file says of a checkpoint that it is made of; the manifest has its files' digests."""
    digest = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()[:16]
    return {"checkpoint": checkpoint.name, "step": manifest["step"], "manifest": digest}
