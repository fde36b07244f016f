"""Convert one ZeRO checkpoint to the trained weights in float32."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from asrllm.atomic import new_folder
from asrllm.defaults import MAX_SHARD_SIZE
from asrllm.errors import UserError
from asrllm.models.state_dict import check_finite, is_finite
from asrllm.tensor_files import PIECE, Spec, TensorSource, write_file, write_sharded
from asrllm.text_files import JsonObject
from asrllm.training.checkpoint.manifest import MANIFEST, read_manifest
from asrllm.training.checkpoint.saver import INHERITED, read_inherited
from asrllm.training.checkpoint.zero_files import (
    AVERAGE,
    MASTERS,
    ZeroFiles,
    verify_storages,
)

DTYPE_OF_STATE = {MASTERS: torch.float32, AVERAGE: torch.float64}
FILE_SUFFIXES = (".pt", ".bin", ".safetensors")
# suffixes of files, so that a directory is not written under such a name by mistake
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
)


def consolidate(
    checkpoint: str | Path, output: str | Path, *, max_shard_size: int | str = MAX_SHARD_SIZE
) -> Path:
    """Write the trained weights of a checkpoint, using less than 100 MB of memory beside imports.

    The output appears when it is complete and all bytes that were read match their checksums.

    Args:
        checkpoint: the ZeRO checkpoint.
        output: a file if it ends in .pt, .bin or .safetensors, otherwise a directory of safetensors
            files.
        max_shard_size: maximum size of each file in the directory.

    Returns:
        The output.

    Raises:
        UserError: the output has the suffix of another format, the checkpoint is corrupted, or a
            weight is not finite.
    """
    output = Path(output)
    if output.suffix in OTHER_SUFFIXES:
        raise UserError(
            f"the output {str(output)!r} has an unsupported suffix. Use a file that ends in "
            f"{', '.join(FILE_SUFFIXES)}, or a directory."
        )
    source = checkpoint_weights(Path(checkpoint))
    if output.suffix in FILE_SUFFIXES:
        return write_file(source, output)
    with new_folder(output) as partial:
        write_sharded(source, partial, max_shard_size=max_shard_size)
        source.check()
    return output


def checkpoint_weights(checkpoint: Path, key: str = MASTERS) -> TensorSource:
    """Return the trained and the inherited weights of a checkpoint by name.

    Args:
        checkpoint: the ZeRO checkpoint.
        key: MASTERS for the weights in float32, AVERAGE for their running average in float64.

    Returns:
        The weights. Their pieces may be requested in another size, and raise UserError if a weight
        is not finite. The check verifies the bytes.

    Raises:
        UserError: a file, key or shape is missing or does not match; the message names it.
    """
    manifest = read_manifest(checkpoint)
    files = ZeroFiles(checkpoint, manifest)
    # An average opens many checkpoints at once.
    files.drop_optimizer_states()
    inherited = read_inherited(checkpoint, manifest)
    dtype = DTYPE_OF_STATE[key]
    specs = {name: Spec(files.locations[name].shape, dtype) for name in manifest["trainable"]}
    for name, tensor in inherited.items():
        specs[name] = Spec(tensor.shape, dtype)

    def pieces(name: str, size: int = PIECE) -> Iterator[Tensor]:
        found: Iterable[Tensor] = files.pieces(name, key, size)
        if name in inherited:
            found = inherited[name].flatten().split(size)
        for piece in found:
            if not is_finite(piece):
                check()  # the values may be those of a corrupted file
                check_finite(name, piece, checkpoint)
            yield piece.to(dtype)

    def check() -> None:
        files.check(key)
        verify_storages(checkpoint.parent / INHERITED, inherited.values())

    about = {"sources": [describe_source(checkpoint, manifest)]}
    return TensorSource(specs, pieces, about, check)


def describe_source(checkpoint: Path, manifest: JsonObject) -> JsonObject:
    """Return the record of a source checkpoint in a weights file.

    The manifest's digest identifies the checkpoint's content, because it contains the digests of
    all its files.
    """
    digest = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()[:16]
    return {"checkpoint": checkpoint.name, "step": manifest["step"], "manifest": digest}
