"""Read a file of torch.save without loading it: its objects, and where its tensors are.

Nothing in the file is executed.
"""

import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from asrllm.errors import UserError
from asrllm.tensor_files import PIECE, begin_of_record
from asrllm.text_files import check_file, first_words, open_regular

PlainClasses = Mapping[tuple[str, str], Callable[..., object]]


class Storage:
    """The storage of one or more tensors: a record of a zip file.

    If it is read from its beginning to its end, it is compared with its checksum in the file.

    Args:
        path: the zip file.
        record: the record in it.
    """

    def __init__(self, path: Path, record: zipfile.ZipInfo) -> None:
        self.path = path
        self.header = record.header_offset
        self.nbytes = record.file_size
        self.expected_crc = record.CRC
        self.begin: int | None = None  # offset of the bytes in the file
        self.crc = 0  # of the first `verified` bytes
        self.verified = 0

    def read(self, start: int, nbytes: int) -> Tensor:
        """Return (nbytes,) uint8 from `start` on.

        Raises:
            UserError: the file is truncated, does not match its checksum, or no longer exists.
        """
        piece = torch.empty(nbytes, dtype=torch.uint8)
        view = memoryview(piece.numpy())
        with self._open() as file:
            if self.begin is None:
                self.begin = begin_of_record(file, self.header)
            file.seek(self.begin + start)
            count = 0
            while count < nbytes:
                more = file.readinto(view[count:])
                if not more:
                    raise UserError(damaged(self.path, "it is truncated"))
                count += more
        if start == self.verified:
            self.crc = zlib.crc32(view, self.crc)
            self.verified = start + nbytes
            if self.verified == self.nbytes and self.crc != self.expected_crc:
                raise UserError(damaged(self.path, "it does not match its checksum"))
        return piece

    def _open(self) -> FileIO:
        try:
            return self.path.open("rb", buffering=0)
        except FileNotFoundError as error:
            raise UserError(
                f"the file {str(self.path)!r} was removed while it was read, perhaps because of "
                "trainer.keep_last_k. Choose checkpoints that remain."
            ) from error

    def check(self) -> None:
        """Verify the bytes that have not been verified yet."""
        while self.verified < self.nbytes:
            self.read(self.verified, min(PIECE, self.nbytes - self.verified))


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        storage: its storage.
        dtype: its dtype.
        offset: elements before it in its storage.
        shape: its shape.
        strides: its strides in elements; None if it is contiguous.
    """

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def numel(self) -> int:
        """Return the number of elements."""
        return torch.Size(self.shape).numel()

    def read(self, start: int = 0, numel: int | None = None) -> Tensor:
        """Return up to `numel` elements of the flattened tensor from `start` on; default: all."""
        count = max(self.numel() - start, 0)
        if numel is not None:
            count = min(numel, count)
        if self.strides is None:
            return self._elements(start, count)
        # elements from the tensor's first to its last one in the storage
        span = 1
        for size, stride in zip(self.shape, self.strides, strict=True):
            span += (size - 1) * stride
        strided = self._elements(0, span).as_strided(self.shape, self.strides)
        return strided.flatten()[start : start + count]

    def _elements(self, start: int, count: int) -> Tensor:
        size = self.dtype.itemsize
        return self.storage.read((self.offset + start) * size, count * size).view(self.dtype)

    def load(self) -> Tensor:
        """Read the whole tensor."""
        return self.read().view(self.shape)

    def pieces(self, size: int = PIECE) -> Iterator[Tensor]:
        """Yield the flattened tensor, `size` elements at a time."""
        for start in range(0, max(self.numel(), 1), size):
            yield self.read(start, size)


def read_stored(path: Path, plain: PlainClasses | None = None) -> Any:
    """Return the content of a file of torch.save, with StoredTensors in place of tensors.

    Args:
        path: the file.
        plain: further classes that the file may use, by module and name. Those of a state dict are
            always allowed.

    Raises:
        UserError: the file is missing or corrupted, or uses other classes.
    """
    check_file(path, "the file")
    try:
        with open_regular(path) as whole, zipfile.ZipFile(whole) as archive:
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
        raise UserError(damaged(path, first_words(error))) from error


def damaged(path: Path, problem: str) -> str:
    """Return a message about a corrupted file."""
    return f"the file {str(path)!r} is corrupted: {problem}. Copy it again, or do without it."


class _Unpickler(pickle.Unpickler):
    """Builds StoredTensors, containers and the plain classes, and rejects everything else."""

    def __init__(
        self,
        file: IO[bytes],
        path: Path,
        records: Mapping[str, zipfile.ZipInfo],
        plain: PlainClasses,
    ) -> None:
        super().__init__(file)
        self.path = path
        self.records = records
        self.plain = plain
        self.storages: dict[str, Storage] = {}

    def persistent_load(
        self, saved: tuple[object, torch.dtype, str, object, object]
    ) -> tuple[Storage, torch.dtype]:
        _, dtype, key, _, _ = saved
        if key not in self.storages:
            self.storages[key] = Storage(self.path, self.records[f"data/{key}"])
        return self.storages[key], dtype

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in BUILT:
            return BUILT[module, name]
        if (module, name) in self.plain:
            return self.plain[module, name]
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"it uses {module}.{name}, which weights do not need")


def _tensor(
    stored: tuple[Storage, torch.dtype],
    offset: int,
    shape: Sequence[int],
    strides: Sequence[int],
    *_: object,
) -> StoredTensor:
    """Stand in for torch's function that builds a tensor from its storage."""
    storage, dtype = stored
    expected = 1
    contiguous = True
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        contiguous = contiguous and (size == 1 or stride == expected)
        expected *= size
    own_strides = None if contiguous else tuple(strides)
    return StoredTensor(storage, dtype, offset, tuple(shape), own_strides)


def _parameter(tensor: StoredTensor, *_: object) -> StoredTensor:
    return tensor


# dtypes of storages by the names of torch's storage classes
STORAGES = {
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
# what a state dict is built from, by module and name
BUILT: dict[tuple[str, str], Callable[..., object]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
}
