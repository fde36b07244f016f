"""Write weights to files piece by piece, so that memory does not grow with the model's size."""

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
from typing import IO, Any, NamedTuple

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor

from asrllm.atomic import new_file, sync
from asrllm.defaults import MAX_SHARD_SIZE
from asrllm.errors import UserError
from asrllm.integrity import BAD_ARCHIVE, NO_SHA256, SHA256_KEY
from asrllm.progress import ProgressBar
from asrllm.text_files import JsonObject

PIECE = 1 << 17  # elements; small enough for the allocator to reuse the memory of earlier pieces
# what torch.load and safetensors raise for files that are corrupted, of another kind, or contain
# more than tensors
BAD_TENSORS = (
    *BAD_ARCHIVE,
    pickle.UnpicklingError,
    AttributeError,
    TypeError,
    SafetensorError,
)
DESCRIPTOR = b"PK\x07\x08"  # begins the data descriptor that follows a record's bytes in a zip file
PROVENANCE_KEY = "about"  # attribute of a .pt file's dict, and key of a safetensors file's metadata
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
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
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """The number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class TensorSource:
    """A state dict whose tensors are computed on request.

    Attributes:
        specs: shape and dtype of each tensor by name.
        pieces: returns the flat pieces of the tensor with a name, in order and in its dtype.
        about: a JSON object to store in the file, which describes where the weights come from.
        check: called after everything has been read; raises UserError if something was corrupted.
    """

    specs: Mapping[str, Spec]
    pieces: Callable[..., Iterable[Tensor]]
    about: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[], None] = lambda: None

    def load(self) -> dict[str, Tensor]:
        """Return the whole state dict in memory."""
        state: dict[str, Tensor] = {}
        for name, spec in self.specs.items():
            state[name] = torch.cat([*self.pieces(name)]).view(spec.shape)
        return state


def write_file(source: TensorSource, path: Path) -> Path:
    """Write weights to one file, which appears when it is complete.

    Args:
        source: the weights.
        path: the file: safetensors if it has that suffix, otherwise a state dict for
            torch.load(weights_only=True).

    Returns:
        The file.

    Raises:
        UserError: the path is a directory, its parent does not exist, or the source is corrupted.
    """
    write = _write_safetensors if path.suffix == ".safetensors" else _write_torch
    with new_file(path) as partial, ProgressBar(f"writing {path.name}", len(source.specs)) as bar:
        write(source, list(source.specs), partial, bar)
        source.check()
    return path


def write_sharded(
    source: TensorSource,
    folder: Path,
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    what: str = "safetensors",
) -> None:
    """Write weights to a directory in the format of transformers.

    The file is model.safetensors, or model-0000i-of-0000n.safetensors with an index.

    Args:
        source: the weights.
        folder: an empty directory. The caller removes it if writing fails.
        max_shard_size: maximum size of each file.
        what: label of the progress bar.
    """
    meta = _empty_tensors(source, source.specs, device="meta")
    plan = split_torch_state_dict_into_shards(meta, max_shard_size=max_shard_size)
    with ProgressBar(f"writing {what}", len(meta)) as bar:
        for file, names in plan.filename_to_tensors.items():
            _write_safetensors(source, names, folder / file, bar)
            sync(folder / file)
    if plan.is_sharded:
        _write_index(plan, folder / "model.safetensors.index.json")


def _write_index(plan: StateDictSplit, path: Path) -> None:
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    path.write_text(text)


def _write_safetensors(
    source: TensorSource, names: list[str], path: Path, bar: ProgressBar
) -> None:
    """Write a safetensors file: the header's length, the header as JSON, the tensors without gaps.

    See https://github.com/huggingface/safetensors.
    """
    # sorted by size of the elements, so that each tensor begins at a multiple of it
    names = sorted(names, key=lambda name: (-source.specs[name].dtype.itemsize, name))
    header = _safetensors_header(source, names)
    digest = hashlib.sha256(header)
    with path.open("wb") as file:
        file.write(header)
        for name in names:
            for piece in _bytes_of(source, name):
                file.write(piece)
                digest.update(piece)
            bar.advance()
        file.seek(header.index(NO_SHA256.encode()))
        file.write(digest.hexdigest().encode())


def _safetensors_header(source: TensorSource, names: Sequence[str]) -> bytes:
    """Return the bytes before the tensors, with zeros in place of the SHA-256."""
    metadata = {"format": "pt", SHA256_KEY: NO_SHA256}
    if source.about:
        metadata[PROVENANCE_KEY] = json.dumps(source.about)
    content: JsonObject = {"__metadata__": metadata}
    end = 0
    for name in names:
        spec = source.specs[name]
        start = end
        end += spec.nbytes
        content[name] = {
            "dtype": SAFETENSORS[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(content, separators=(",", ":")).encode()
    # The tensors begin at a multiple of 8 bytes after the length of the header.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _empty_tensors(
    source: TensorSource, names: Iterable[str], device: str = "cpu"
) -> OrderedDict[str, Tensor]:
    """Return uninitialized tensors with the shapes and dtypes of the weights."""
    state: OrderedDict[str, Tensor] = OrderedDict()
    for name in names:
        spec = source.specs[name]
        state[name] = torch.empty(spec.shape, dtype=spec.dtype, device=device)
    return state


def _write_torch(source: TensorSource, names: list[str], path: Path, bar: ProgressBar) -> None:
    """Write a state dict of torch.save.

    torch.save takes all tensors at once, which for a model of 7B parameters in bfloat16 is 15 GB of
    memory. Therefore it only lays out the file, with `skip_data` and without touching the memory of
    the tensors, and their bytes are written piece by piece. zipfile could write records piece by
    piece, but it does not align them to 64 bytes, as torch.load(mmap=True) expects, and it would
    need a pickler of torch's own format. `skip_data` leaves the checksums of the records at 0,
    and `integrity.verify_weights` compares them with zipfile, so that they are written as well.
    See https://docs.pytorch.org/docs/stable/notes/serialization.html.
    """
    state = _empty_tensors(source, names)
    setattr(state, PROVENANCE_KEY, dict(source.about))
    with torch.serialization.skip_data():
        torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        directory = archive.start_dir
    headers = _header_offsets(records)
    checksums: dict[int, int] = {}
    with path.open("r+b") as file:
        for number, name in enumerate(names):
            file.seek(begin_of_record(file, headers[number]))
            checksums[headers[number]] = _write_tensor(file, source, name)
            bar.advance()
        in_order = [checksums.get(record.header_offset) for record in records]
        _write_checksums(file, directory, in_order)


def _header_offsets(records: Iterable[zipfile.ZipInfo]) -> dict[int, int]:
    """Return the offset of each tensor's record in a file of torch.save, by its number."""
    headers: dict[int, int] = {}
    for record in records:
        if "/data/" in record.filename:
            number = int(record.filename.rpartition("/")[2])
            headers[number] = record.header_offset
    return headers


def _write_tensor(file: IO[bytes], source: TensorSource, name: str) -> int:
    """Write the bytes of a tensor, and their CRC-32 to the data descriptor that follows them.

    See PKWARE's APPNOTE, 4.3.9.

    Returns:
        The CRC-32.
    """
    checksum = 0
    for piece in _bytes_of(source, name):
        checksum = zlib.crc32(piece, checksum)
        file.write(piece)
    if source.specs[name].nbytes:  # an empty record has no descriptor
        file.seek(len(DESCRIPTOR), os.SEEK_CUR)
        file.write(checksum.to_bytes(4, "little"))
    return checksum


def _write_checksums(file: IO[bytes], directory: int, checksums: Sequence[int | None]) -> None:
    """Write CRC-32s to the central directory of a zip file (PKWARE's APPNOTE, 4.3.12).

    Args:
        file: the zip file.
        directory: offset of the central directory.
        checksums: checksums of its entries in order; None leaves the one in the file.
    """
    entry = directory
    for checksum in checksums:
        # lengths of the name, the extra field and the comment
        file.seek(entry + 28)
        name, extra, comment = struct.unpack("<3H", file.read(6))
        if checksum is not None:
            # CRC-32 of the entry
            file.seek(entry + 16)
            file.write(checksum.to_bytes(4, "little"))
        entry += 46 + name + extra + comment


def begin_of_record(file: IO[bytes], header: int) -> int:
    """Return the offset of a record's bytes in a zip file.

    They follow the local header of 30 bytes, the name and the extra field (PKWARE's APPNOTE,
    4.3.7).

    Args:
        file: the zip file.
        header: offset of the local header.
    """
    file.seek(header + 26)
    name = int.from_bytes(file.read(2), "little")
    extra = int.from_bytes(file.read(2), "little")
    return header + 30 + name + extra


def is_finite(tensor: Tensor) -> bool:
    """Return whether a weight has neither NaN nor infinite values.

    The smallest and the largest value take 0.09 s per GB on one core, isfinite() takes 5 s.
    """
    if not tensor.numel() or tensor.dtype not in WEIGHT_DTYPES:
        return True
    smallest, largest = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(smallest) and torch.isfinite(largest))


def _bytes_of(source: TensorSource, name: str) -> Iterator[memoryview]:
    """Yield the bytes of a tensor, and check its dtype, number of elements and values.

    Raises:
        UserError: a value is not finite.
    """
    spec = source.specs[name]
    count = 0
    for piece in source.pieces(name):
        assert piece.dtype == spec.dtype, (name, piece.dtype, spec.dtype)
        if not is_finite(piece):
            raise UserError(
                f"the weight {name!r} has values that are not finite in {spec.dtype}. "
                "Write it in bfloat16 or float32. If it was not finite before, use other weights."
            )
        count += piece.numel()
        yield piece.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    assert count == spec.numel, name


def read_about(path: Path) -> JsonObject:
    """Return the record that describes where a weights file comes from.

    It is empty if the file has none or cannot be read.
    """
    if not path.is_file():  # a FIFO would be waited for
        return {}
    with contextlib.suppress(*BAD_TENSORS, OSError):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                metadata = tensors.metadata() or {}
                return dict(json.loads(metadata.get(PROVENANCE_KEY, "{}")))
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return dict(getattr(state, PROVENANCE_KEY, {}))
    return {}
