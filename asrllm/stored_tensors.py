"""What torch.save wrote, read without loading it: the objects in a file, and where its tensors lie. Nothing in it is executed."""

import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asrllm.errors import UserError
from asrllm.tensor_files import PIECE, begin_of_record


class Storage:
    """A record of a file. Read from its beginning to its end, it is compared with the checksum that was written with it."""

    def __init__(self, path: Path, record: zipfile.ZipInfo) -> None:
        self.path, self.header, self.nbytes, self.written = (
            path,
            record.header_offset,
            record.file_size,
            record.CRC,
        )
        self.begin: int | None = None
        self.summed, self.sum = 0, 0

    def read(self, start: int, nbytes: int) -> Tensor:
        """(nbytes,) uint8. Raises UserError where the file is cut short or holds other bytes than were written."""
        piece = torch.empty(nbytes, dtype=torch.uint8)
        view = memoryview(piece.numpy())
        with self._open() as file:
            if self.begin is None:
                self.begin = begin_of_record(file, self.header)
            file.seek(self.begin + start)
            got = 0
            while got < nbytes:
                if not (more := file.readinto(view[got:])):
                    raise UserError(damaged(self.path, "it is cut short"))
                got += more
        if start == self.summed:
            self.sum, self.summed = zlib.crc32(view, self.sum), start + nbytes
            if self.summed == self.nbytes and self.sum != self.written:
                raise UserError(damaged(self.path, "it holds other bytes than were written"))
        return piece

    def _open(self) -> FileIO:
        try:
            return self.path.open("rb", buffering=0)
        except FileNotFoundError as error:
            raise UserError(
                f"the file {str(self.path)!r} was removed while it was read (trainer.keep_last_k?): choose checkpoints that stay"
            ) from error

    def check(self) -> None:
        """Read what has not been compared yet."""
        while self.summed < self.nbytes:
            self.read(self.summed, min(PIECE, self.nbytes - self.summed))


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor in a file. offset: elements before it in its storage. strides: None where it is contiguous."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def read(self, start: int = 0, numel: int | None = None) -> Tensor:
        """(numel,) elements from `start` on, as many as there are; all of them by default."""
        left = max(self.numel() - start, 0)
        count = left if numel is None else min(numel, left)
        if self.strides is None:
            return self._elements(start, count)
        span = 1 + sum(
            (size - 1) * step for size, step in zip(self.shape, self.strides, strict=True)
        )
        return (
            self._elements(0, span)
            .as_strided(self.shape, self.strides)
            .flatten()[start : start + count]
        )

    def _elements(self, start: int, count: int) -> Tensor:
        size = self.dtype.itemsize
        return self.storage.read((self.offset + start) * size, count * size).view(self.dtype)

    def load(self) -> Tensor:
        return self.read().view(self.shape)

    def pieces(self, size: int = PIECE) -> Iterator[Tensor]:
        """All of it, flat, `size` elements at a time."""
        for start in range(0, max(self.numel(), 1), size):
            yield self.read(start, size)


def read_stored(path: Path, plain: Mapping[tuple[str, str], Any] | None = None) -> Any:
    """What a file of torch.save holds, StoredTensors in the place of tensors.

    plain: classes, by module and name, that the file may build beside those of a state dict. Raises UserError where it is missing or
    damaged, or asks for others.
    """
    if not path.is_file():
        raise UserError(f"the file {str(path)!r} is missing: copy it again")
    try:
        with zipfile.ZipFile(path) as archive:
            records = {record.filename.partition("/")[2]: record for record in archive.infolist()}
            with archive.open(records["data.pkl"]) as file:
                return _Unpickler(file, path, records, plain or {}).load()
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        EOFError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:
        raise UserError(damaged(path, " ".join(str(error).split())[:200])) from error


def damaged(path: Path, why: str) -> str:
    return f"the file {str(path)!r} is damaged ({why}): copy it again, or go without it"


class _Unpickler(pickle.Unpickler):
    """Builds tensors' places, containers and the plain classes; refuses all else."""

    def __init__(
        self,
        file: Any,
        path: Path,
        records: Mapping[str, zipfile.ZipInfo],
        plain: Mapping[tuple[str, str], Any],
    ) -> None:
        super().__init__(file)
        self.path, self.records, self.plain = path, records, plain
        self.storages: dict[str, Storage] = {}

    def persistent_load(self, saved: Any) -> tuple[Storage, torch.dtype]:
        _, dtype, key, _, _ = saved
        if key not in self.storages:
            self.storages[key] = Storage(self.path, self.records[f"data/{key}"])
        return self.storages[key], dtype

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in BUILT:
            return BUILT[module, name]
        if (module, name) in self.plain:
            return self.plain[module, name]
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which weights have no use for")


def _tensor(
    stored: tuple[Storage, torch.dtype], offset: int, shape: Any, stride: Any, *_: Any
) -> StoredTensor:
    storage, dtype = stored
    expected, contiguous = 1, True
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        contiguous, expected = contiguous and (size == 1 or step == expected), expected * size
    return StoredTensor(storage, dtype, offset, tuple(shape), None if contiguous else tuple(stride))


def _parameter(tensor: StoredTensor, *_: Any) -> StoredTensor:
    return tensor


STORAGES = {  # torch's names for records of a dtype
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
BUILT = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
}
