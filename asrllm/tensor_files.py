"""Weights written to files piece by piece: memory holds one piece, whatever the model's size."""

import contextlib
import hashlib
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor

from asrllm.atomic import new_file, sync
from asrllm.errors import UserError
from asrllm.integrity import NO_SHA256, SHA256_KEY
from asrllm.progress import ProgressBar

PIECE = 1 << 17  # elements: so small that freed ones are used again
DAMAGED = (
    RuntimeError,
    EOFError,
    ValueError,
    pickle.UnpicklingError,
)  # what torch.load says of a damaged file
DESCRIPTOR = b"PK\x07\x08"  # begins what stands behind a record's bytes in a zip file
ABOUT = "about"  # attribute of a .pt file's dict, and key of a safetensors file's metadata
SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Spec(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class TensorSource:
    """A state dict whose tensors are made when they are wanted.

    pieces: name -> the flat pieces of that tensor in order, of its dtype; together as many elements as its shape has. about: what the file
    is to say of itself, as JSON has it. check: raises UserError, after all has been read, where something of it was damaged.
    """

    specs: Mapping[str, Spec]
    pieces: Callable[..., Iterable[Tensor]]
    about: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[], None] = lambda: None

    def load(self) -> dict[str, Tensor]:
        """All of it, in memory."""
        return {
            name: torch.cat([*self.pieces(name)]).view(spec.shape)
            for name, spec in self.specs.items()
        }


def write_file(source: TensorSource, path: Path) -> Path:
    """One file, safetensors by its suffix or else a state dict for torch.load(weights_only=True); it appears when it is complete."""
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(
            f"the output {str(path)!r} is a directory, or its directory does not exist: give a file's path"
        )
    write = _write_safetensors if path.suffix == ".safetensors" else _write_torch
    with new_file(path) as partial, ProgressBar(f"writing {path.name}", len(source.specs)) as bar:
        write(source, list(source.specs), partial, bar)
        source.check()
    return path


def write_sharded(
    source: TensorSource,
    folder: Path,
    *,
    max_shard_size: int | str = "5GB",
    what: str = "safetensors",
) -> None:
    """Safetensors and, of several, their index, in transformers' form (model.safetensors, or model-0000i-of-0000n.safetensors).

    folder: an empty directory, which the caller makes and removes where writing fails. what: is written, as the progress bar says it.
    """
    meta = {
        name: torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        for name, spec in source.specs.items()
    }
    plan = split_torch_state_dict_into_shards(meta, max_shard_size=max_shard_size)
    with ProgressBar(f"writing {what}", len(meta)) as bar:
        for file, names in plan.filename_to_tensors.items():
            _write_safetensors(source, names, folder / file, bar)
            sync(folder / file)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n"
        )


def _write_safetensors(
    source: TensorSource, names: list[str], path: Path, bar: ProgressBar
) -> None:
    """https://github.com/huggingface/safetensors: the header's length, the header as JSON, the tensors without gaps."""
    names = sorted(
        names, key=lambda name: (-source.specs[name].dtype.itemsize, name)
    )  # each begins at a multiple of its elements' size
    metadata = {"format": "pt", SHA256_KEY: NO_SHA256}
    if source.about:
        metadata[ABOUT] = json.dumps(source.about)
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in names:
        spec, start = source.specs[name], end
        end += spec.nbytes
        header[name] = {
            "dtype": SAFETENSORS[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(begin)
    with path.open("wb") as file:
        file.write(begin)
        for name in names:
            for piece in _bytes_of(source, name):
                file.write(piece)
                digest.update(piece)
            bar.advance()
        file.seek(begin.index(NO_SHA256.encode()))
        file.write(digest.hexdigest().encode())


def _write_torch(source: TensorSource, names: list[str], path: Path, bar: ProgressBar) -> None:
    """torch lays the file out around memory that nobody touches; the tensors are put in their places after it."""
    specs = source.specs
    state: OrderedDict[str, Tensor] = OrderedDict(
        (name, torch.empty(specs[name].shape, dtype=specs[name].dtype)) for name in names
    )
    setattr(state, ABOUT, dict(source.about))
    with torch.serialization.skip_data():
        torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        records, directory = archive.infolist(), archive.start_dir
    headers = {
        int(record.filename.rpartition("/")[2]): record.header_offset
        for record in records
        if "/data/" in record.filename
    }
    checksums: dict[int, int] = {}
    with path.open("r+b") as file:
        for number, name in enumerate(names):
            file.seek(begin_of_record(file, headers[number]))
            checksums[headers[number]] = _write_record(file, source, name)
            bar.advance()
        _write_checksums(
            file, directory, [checksums.get(record.header_offset) for record in records]
        )


def _write_record(file: BinaryIO, source: TensorSource, name: str) -> int:
    """The bytes of a tensor, and their CRC-32 in the descriptor that stands behind them; gives it (PKWARE's APPNOTE, 4.3.9)."""
    checksum = 0
    for piece in _bytes_of(source, name):
        checksum = zlib.crc32(piece, checksum)
        file.write(piece)
    if source.specs[name].nbytes:  # nothing stands behind an empty one
        file.seek(len(DESCRIPTOR), os.SEEK_CUR)
        file.write(checksum.to_bytes(4, "little"))
    return checksum


def _write_checksums(file: BinaryIO, directory: int, checksums: Sequence[int | None]) -> None:
    """Into the entries of the central directory, in their order; None: as it is (PKWARE's APPNOTE, 4.3.12)."""
    at = directory
    for checksum in checksums:
        file.seek(at + 28)
        name, extra, comment = struct.unpack("<3H", file.read(6))
        if checksum is not None:
            file.seek(at + 16)
            file.write(checksum.to_bytes(4, "little"))
        at += 46 + name + extra + comment


def begin_of_record(file: BinaryIO, header: int) -> int:
    """Where a record's bytes begin: behind its local header of 30 bytes, its name and its extra field (PKWARE's APPNOTE, 4.3.7)."""
    file.seek(header + 26)
    return (
        header
        + 30
        + int.from_bytes(file.read(2), "little")
        + int.from_bytes(file.read(2), "little")
    )


def _bytes_of(source: TensorSource, name: str) -> Iterator[memoryview]:
    spec, count = source.specs[name], 0
    for piece in source.pieces(name):
        assert piece.dtype == spec.dtype, (name, piece.dtype, spec.dtype)
        count += piece.numel()
        yield piece.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    assert count == spec.numel, name


def read_about(path: Path) -> dict[str, Any]:
    """What a weights file says of itself; empty where it says nothing or cannot be read."""
    with contextlib.suppress(*DAMAGED, OSError, TypeError, SafetensorError):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                return dict(json.loads((tensors.metadata() or {}).get(ABOUT, "{}")))
        return dict(
            getattr(torch.load(path, map_location="cpu", weights_only=True, mmap=True), ABOUT, {})
        )
    return {}
