"""Verify that the bytes of a model's files are those that were written.

torch.save writes a CRC-32 with every record of its zip file. Our safetensors files have the SHA-256
of themselves in their metadata, computed with zeros in its place. A file without a checksum, for
example a safetensors file of another program, cannot be verified.

A flipped bit in a weight changes texts and causes no error, so files are verified before they are
used. This takes about half a second per GB, once in a process.

A saved directory has the SHA-256 of its other files in asrllm.sha256, and a run's directory those
of config.json and of the tokenizer's files.
"""

import errno
import functools
import hashlib
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from asrllm.errors import CorruptedError, UserError
from asrllm.escape import escape
from asrllm.text_files import check_no_pointer, parse_json, read_text

CHECKSUMS = "asrllm.sha256"  # in the format of the program sha256sum
NOT_LISTED = (CHECKSUMS, "README.md")  # people edit the model card, which changes no text
SHA256_KEY = "sha256"  # in the metadata of a safetensors file
NO_SHA256 = "0" * 64
MAX_SAFETENSORS_HEADER = 100_000_000  # bytes, as in the safetensors library
# MS-DOS bit of a record's attributes: torch.load fills the tensor of a directory with anything
DIRECTORY_BIT = 0x10
PICKLE = b"\x80"  # begins a pickle
HASHED_BYTES = 1 << 20  # bytes
# what zipfile raises for a corrupted file
BAD_ARCHIVE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    ValueError,
    LookupError,
    NotImplementedError,
    RuntimeError,
)


def verify_weights(path: Path) -> None:
    """Verify a .pt or .safetensors file.

    Raises:
        CorruptedError: the file does not match its checksum.
        UserError: the file is a git-LFS pointer, or a directory, pipe or device.
        OSError: the file cannot be read.
    """
    check_no_pointer(path)
    about = os.stat(path)
    _verify(path, about.st_size, about.st_mtime_ns, about.st_ino)


@functools.lru_cache(maxsize=1024)
def _verify(path: Path, size: int, mtime_ns: int, inode: int) -> None:
    """Verify a file, unless this process has verified the same file already."""
    if path.suffix == ".safetensors":
        _verify_safetensors(path, size)
    else:
        _verify_archive(path, size)


def _verify_archive(path: Path, size: int) -> None:
    try:
        if not zipfile.is_zipfile(path):
            _check_pickle(path)
            return
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            for record in records:
                # torch.save does not compress; a compressed record could unpack to any size
                if record.compress_type != zipfile.ZIP_STORED or record.file_size > size:
                    raise zipfile.BadZipFile(f"the record {record.filename!r} is compressed")
                if record.external_attr & DIRECTORY_BIT:
                    raise zipfile.BadZipFile(f"the record {record.filename!r} is a directory")
            # zipfile would check one of two records with the same name
            if len(set(archive.namelist())) < len(records):
                raise zipfile.BadZipFile("two records have the same name")
            bad = archive.testzip()
        _check_central_directory(path)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a seek before the beginning of the file
            raise
        raise corrupted(path, "a record is outside the file") from error
    except BAD_ARCHIVE as error:
        raise corrupted(path, str(error)) from error
    if bad is not None:
        raise corrupted(path, f"the record {bad!r} does not match its CRC-32")


def _check_central_directory(path: Path) -> None:
    """Read all headers of an archive as torch.load does, which rejects more than zipfile does.

    Raises:
        RuntimeError: torch.load would not read the archive.
    """
    import torch  # the other checksums do not need it

    with open(path, "rb") as file:  # a path must be UTF-8
        reader = torch._C.PyTorchFileReader(file)
        for name in reader.get_all_records():
            reader.get_record_offset(name)


def _check_pickle(path: Path) -> None:
    """Check the beginning of torch.save's format before 1.6, which has no checksums.

    Raises:
        CorruptedError: the file does not begin with a pickle.
    """
    with open(path, "rb") as file:
        begin = file.read(2)
    if begin == b"PK":
        raise corrupted(path, "it is truncated")
    if begin[:1] != PICKLE:
        raise corrupted(path, "torch.save did not write it")


def _verify_safetensors(path: Path, size: int) -> None:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, MAX_SAFETENSORS_HEADER):
            raise corrupted(path, f"its header has {length} bytes")
        header = file.read(length)
        written = _written_sha256(path, header)
        _check_tensor_bytes(path, header, size - 8 - length)
        if written is None:
            return
        digest = hashlib.sha256(length.to_bytes(8, "little"))
        digest.update(header.replace(written.encode(), NO_SHA256.encode(), 1))
        _hash_file(digest, file)
    if digest.hexdigest() != written:
        raise corrupted(path, "it does not match the SHA-256 in its header")


def _written_sha256(path: Path, header: bytes) -> str | None:
    try:
        content = parse_json(header)
        metadata = content.get("__metadata__", {})
        written = metadata.get(SHA256_KEY)
    except (ValueError, AttributeError) as error:
        raise corrupted(path, f"its header is not a JSON object: {error}") from error
    if not isinstance(written, str):
        return None
    return written


def _check_tensor_bytes(path: Path, header: bytes, found: int) -> None:
    """Check the length of a safetensors file, which also detects truncation without a checksum.

    Args:
        path: the file.
        header: its header, a JSON object.
        found: number of bytes after the header.

    Raises:
        CorruptedError: the header describes more or fewer bytes.
    """
    content = parse_json(header)
    content.pop("__metadata__", None)
    try:
        ends = [entry["data_offsets"][1] for entry in content.values()]
        expected = max(ends, default=0)
        if expected == found:
            return
    except (LookupError, TypeError) as error:
        raise corrupted(path, f"its header is not that of safetensors: {error}") from error
    raise corrupted(path, f"it has {found} bytes of tensors, but its header describes {expected}")


def _hash_file(digest: "hashlib._Hash", file: BinaryIO) -> None:
    while chunk := file.read(HASHED_BYTES):
        digest.update(chunk)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    check_no_pointer(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of every file in a directory except weights, which contain their own."""
    lines: list[str] = []
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and file.suffix != ".safetensors" and name not in NOT_LISTED:
            lines.append(f"{file_sha256(file)}  {name}\n")
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def verify_folder(folder: Path) -> None:
    """Verify the files that `write_checksums` listed. Further files may be in the directory.

    Earlier versions wrote no list, so a directory without one is not verified.

    Raises:
        CorruptedError: a file has changed or does not exist, or the list is empty or corrupted.
        UserError: the list cannot be read.
    """
    checksums = _checksums(folder)
    while checksums is not None:
        try:
            _verify_listed(folder, checksums)
            return
        except CorruptedError:
            # A run that starts or resumes writes its files again, and their list last.
            newer = _checksums(folder)
            if newer == checksums:
                raise
            checksums = newer


def _checksums(folder: Path) -> str | None:
    """Return the list of checksums of a directory, or None if there is none."""
    path = folder / CHECKSUMS
    if not path.exists():
        return None
    try:
        return read_text(path, "the list of checksums")
    except UserError:
        if path.exists():
            raise
        return None  # a run has just removed it


def _verify_listed(folder: Path, text: str) -> None:
    """Verify the files in a list of checksums.

    Raises:
        CorruptedError: a file has changed or does not exist, or the list is empty or corrupted.
    """
    checksums = folder / CHECKSUMS
    lines = text.splitlines()
    if not lines:
        raise CorruptedError(
            f"{str(checksums)!r} is empty. Copy it again. If you want no verification, delete it."
        )
    for line in lines:
        expected, _, name = line.partition("  ")
        if len(expected) != len(NO_SHA256) or not name:
            raise corrupted(checksums, f"{line!r} is not a checksum and a file name")
        file = folder / name
        problem = ""
        if not file.exists():
            problem = "was not found"
        elif file_sha256(file) != expected:
            problem = f"does not match its SHA-256 in {CHECKSUMS}"
        if problem:
            raise CorruptedError(
                f"{str(file)!r} {problem}. Copy it again. If you changed it on purpose, delete its "
                f"line in {str(checksums)!r}, or the whole list."
            )


def corrupted(path: Path, problem: str) -> CorruptedError:
    """Return the error for a corrupted weight file."""
    text = escape(" ".join(problem.split()))[:200]
    return CorruptedError(f"{str(path)!r} is corrupted: {text}. Copy it again, or write it again.")
