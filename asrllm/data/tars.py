"""Read the samples of WebDataset tars, whose headers and members may be corrupted or hostile."""

import itertools
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from asrllm.defaults import AUDIO_EXTENSIONS
from asrllm.errors import UserError
from asrllm.text_files import JsonObject, open_regular, parse_json

BLOCK = tarfile.BLOCKSIZE  # bytes; members of a tar begin at multiples of it
MAX_HEADER = 1 << 20  # bytes of an extended header of a tar, which holds a name
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
TEXT_FIELDS = ("lang", "task", "prompt")
SHOWN_TEXT = 60  # characters
SHOWN_FIELD = 200  # characters of a problem with a field


@dataclass(frozen=True, kw_only=True)
class TarSample:
    """One utterance in a tar: the files whose names agree up to the first dot.

    Attributes:
        key: the common part of the names.
        offset: first header, in blocks.
        size: length including padding, in blocks.
        audio: content of the audio file.
        extension: extension of the audio file.
        fields: content of KEY.json. The content of KEY.txt is "text".
    """

    key: str
    offset: int
    size: int
    audio: bytes
    extension: str
    fields: JsonObject


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A sample that cannot be used.

    Attributes:
        key: its key.
        reason: a word to count by.
        detail: the problem in plain words.
    """

    key: str
    reason: str
    detail: str


def scan_tar(path: str | Path) -> Iterator[TarSample | BadSample]:
    """Yield all samples of a local tar.

    Raises:
        UserError: the tar is corrupted.
    """
    try:
        with open_regular(path, "the tar") as file:
            yield from iterate_tar(file)
    except (tarfile.TarError, OSError) as error:
        raise UserError(explain_tar(Path(path), error)) from error


def explain_tar(path: Path, error: Exception) -> str:
    """Return the message for a file that is not a tar, with a fix if it is compressed."""
    try:
        with open(path, "rb") as file:
            start = file.read(6)
    except OSError:
        start = b""
    for magic, program in COMPRESSED.items():
        if start.startswith(magic):
            return (
                f"{str(path)!r} is compressed, which prevents random access to its samples. "
                f"Unpack it with '{program} -d', and use the tar."
            )
    problem = f"{str(path)!r} cannot be read as a tar: {str(error).rstrip('.')}."
    if isinstance(error, DataAfterEndError):
        return (
            f"{problem} If several tars were joined with 'cat', use them one by one, or join them "
            "with 'tar --concatenate'. Otherwise copy the tar again."
        )
    return f"{problem} Copy it again, or make it again."


class DataAfterEndError(tarfile.ReadError):
    """A tar has data after its end mark, which readers of tars ignore."""


class Member(NamedTuple):
    """A file in a tar.

    Attributes:
        name: its path in the tar.
        start: offset of its first header in bytes.
        end: end of its content in bytes.
        data: its content.
    """

    name: str
    start: int
    end: int
    data: bytes


def iterate_tar(file: BinaryIO) -> Iterator[TarSample | BadSample]:
    """Yield the samples of an open tar. Memory is bounded by the tar's own size.

    Raises:
        tarfile.TarError: the tar is truncated or corrupted, or contains a sparse file.
    """
    members = _members(file)
    for _, group in itertools.groupby(members, key=lambda member: sample_key(member.name)):
        yield _decode_sample(list(group))


def iterate_rows(content: bytes) -> Iterator[TarSample | BadSample]:
    """Yield the samples in the bytes of a tar that index rows refer to.

    Raises:
        tarfile.TarError: the bytes are truncated or corrupted, or contain a sparse file.
    """
    end_mark = bytes(BLOCK)
    yield from iterate_tar(BytesIO(content + end_mark))


def _members(file: BinaryIO) -> Iterator[Member]:
    for info in tar_files(file):
        file.seek(info.offset_data)
        end = info.offset_data + info.size
        if is_sample_file(info.name):
            yield Member(info.name, info.offset, end, file.read(info.size))


def is_sample_file(member: str) -> bool:
    """Return whether WebDataset reads a member; it skips README, ._a.wav and __meta__.json."""
    key, dot, _ = member.rpartition("/")[2].partition(".")
    return bool(key and dot) and not (key.startswith("__") and key.endswith("__"))


def tar_files(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of an open tar. Their sizes are checked against that of the tar.

    Raises:
        tarfile.TarError: the tar is truncated or corrupted, or contains a sparse file.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    headers = _Headers(file)
    try:
        with tarfile.open(fileobj=headers, mode="r:") as tar:  # type: ignore[call-overload]
            yield from _checked_files(tar, size)
            _check_end(file, tar.offset)
    except (ValueError, ArithmeticError, LookupError, RecursionError) as error:
        # tarfile's parsers of extended headers raise these
        raise tarfile.ReadError(
            f"a header is corrupted ({type(error).__name__}: {error})"
        ) from error


def _check_end(file: BinaryIO, end: int) -> None:
    """Check that only zeros follow the last member of a tar, however many they are.

    Args:
        file: the tar.
        end: the byte after the last member, where tarfile stopped reading.

    Raises:
        tarfile.TarError: a header is corrupted, the end mark is missing, or there is data after it.
    """
    file.seek(end)
    block = file.read(BLOCK)
    if len(block) < BLOCK:  # tarfile accepts this, and so a tar that was cut between two members
        raise tarfile.ReadError("the end mark is missing, so it may be truncated")
    if any(block):  # tarfile treats a corrupted header as the end of the tar
        raise tarfile.ReadError(f"the header at byte {end} is corrupted")
    while chunk := file.read(MAX_HEADER):
        begin = len(chunk) - len(chunk.lstrip(b"\0"))
        if begin < len(chunk):
            place = file.tell() - len(chunk) + begin
            raise DataAfterEndError(f"there is data at byte {place}, after the tar's end mark")


def _checked_files(tar: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of a tar of `size` bytes.

    Raises:
        tarfile.TarError: a file is sparse, overlaps the one before it, or exceeds the tar.
    """
    end = 0
    for info in tar:
        # tarfile would hold the headers of all files, and a shard can have millions
        tar.members.clear()  # type: ignore[attr-defined]
        if info.issparse():
            raise tarfile.ReadError(f"{info.name!r} is a sparse file")
        if not info.isfile():
            continue
        if info.offset < end or info.size < 0 or info.offset_data + info.size > size:
            raise tarfile.ReadError(f"{info.name!r} is truncated, or its header is corrupted")
        end = info.offset_data + info.size
        yield info


class _Headers:
    """A tar as `tarfile` may read it: headers of at most MAX_HEADER bytes, and no content."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.seek = file.seek
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header has {size} bytes")
        return self.file.read(size)


def read_sample(content: bytes) -> TarSample:
    """Return the sample in the bytes of a tar that an index row refers to.

    Raises:
        ValueError: the bytes are not exactly one usable sample.
    """
    members = _plain_members(content)
    (sample,) = iterate_rows(content) if members is None else [_decode_sample(members)]
    if isinstance(sample, BadSample):
        raise ValueError(f"{sample.key}: {sample.reason}: {sample.detail}")
    return sample


def _plain_members(content: bytes) -> list[Member] | None:
    """Return the files of one sample, or None unless all headers are plain and intact.

    It takes a tenth of tarfile's time.
    """
    members: list[Member] = []
    at = 0
    while at < len(content):
        header = content[at : at + BLOCK]
        if not _is_plain(header):
            return None
        try:
            # octal digits, which a twelfth byte ends
            size = int(header[124:135], 8)
            name = header[:100].rstrip(b"\0").decode()
        except ValueError:
            return None
        begin = at + BLOCK
        if begin + size > len(content):
            return None
        members.append(Member(name, at, begin + size, content[begin : begin + size]))
        at = begin + -(-size // BLOCK) * BLOCK
    keys = {sample_key(member.name) for member in members}
    return members if len(keys) == 1 else None


def _is_plain(header: bytes) -> bool:
    """Return whether a header is that of a regular file whose name fits into 100 bytes."""
    if len(header) < BLOCK:
        return False
    has_prefix = header[345] != 0  # the first part of a longer name
    # The type of a regular file is "0", or NUL in old tars.
    return header[257:262] == b"ustar" and header[156] in b"0\0" and not has_prefix


def sample_key(member: str) -> str:
    """Return the key of a member: its path up to the first dot of its last part (WebDataset)."""
    folder, _, base = member.rpartition("/")
    return (folder + "/" if folder else "") + base.partition(".")[0]


def _decode_sample(members: Sequence[Member]) -> TarSample | BadSample:
    key = sample_key(members[0].name)
    files = {member.name.rpartition(".")[2].lower(): member.data for member in members}
    if len(files) < len(members):
        names = ", ".join(member.name for member in members[:4])
        detail = f"several files of one type have this key, which ends at the first dot: {names}"
        return BadSample(key=key, reason="repeated_file", detail=detail)
    extension = next((e for e in AUDIO_EXTENSIONS if e in files), None)
    if extension is None:
        detail = f"expected one of {', '.join(AUDIO_EXTENSIONS)}, found {', '.join(files)}"
        return BadSample(key=key, reason="no_audio", detail=detail)
    if not key.isprintable():
        detail = f"{key!r} has characters that cannot be printed"
        return BadSample(key=key, reason="bad_key", detail=detail)
    try:
        fields = _sample_fields(files)
    except ValueError as error:  # not JSON or not UTF-8
        return BadSample(
            key=key,
            reason="broken_transcript",
            detail=str(error),
        )
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        detail = f"expected {key}.txt, or {key}.json with 'text'"
        return BadSample(key=key, reason="no_transcript", detail=detail)
    if problem := _text_problem(fields["text"], files):
        return BadSample(key=key, reason="different_texts", detail=problem)
    if problem := field_problem(fields):
        return BadSample(key=key, reason="bad_field", detail=problem)
    offset = members[0].start // BLOCK
    end = -(-members[-1].end // BLOCK)
    return TarSample(
        key=key,
        offset=offset,
        size=end - offset,
        audio=files[extension],
        extension=extension,
        fields=fields,
    )


def _text_problem(text: str, files: Mapping[str, bytes]) -> str:
    """Return how the .txt file of a sample contradicts the text in its JSON, or "".

    They may be written differently: case, punctuation and white space do not matter.
    """
    other = files.get("txt", b"").decode("utf-8-sig", errors="replace")
    if "txt" not in files or _letters(other) == _letters(text):
        return ""
    return f"the .txt has {shortened(other)!r}, and the .json has {shortened(text)!r}"


def _letters(text: str) -> str:
    return "".join(char for char in text.casefold() if char.isalnum())


def shortened(text: str) -> str:
    """Return the beginning of a text for a message."""
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT]}..."


def field_problem(fields: Mapping[str, object]) -> str:
    """Return which field of a sample's JSON has a type that training cannot use, or ""."""
    for name in TEXT_FIELDS:
        value = fields.get(name)
        if value is not None and not isinstance(value, str):
            return f"{name!r} is {value!r}, not a string"[:SHOWN_FIELD]
    words = fields.get("hotwords") or []
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return f"'hotwords' is {words!r}, not a list of strings"[:SHOWN_FIELD]
    return ""


def nul_problem(fields: Mapping[str, object]) -> str:
    """Return which text of a sample's JSON has a NUL character, or "".

    A NUL is the sign of a corrupted file or of UTF-16. Tokenizers and scoring tools written in C
    end a text there. Other control characters are ignored in scoring.
    """
    for name in ("text", *TEXT_FIELDS, "hotwords"):
        value = fields.get(name)
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(text, str) and "\0" in text for text in texts):
            return f"{name!r} has a NUL character: {value!r}"[:SHOWN_FIELD]
    return ""


def _sample_fields(files: Mapping[str, bytes]) -> Any:
    """Return the JSON value of a sample, with the text of its .txt file if it has none.

    Args:
        files: contents of the sample's files by extension.

    Raises:
        ValueError: a file is not valid JSON or UTF-8.
    """
    content = files.get("json")
    fields = {} if content is None else parse_json(content)
    if content is not None and b"\\ud" in content.lower():
        # may be half of a surrogate pair, which cannot be encoded
        json.dumps(fields, ensure_ascii=False).encode()
    if isinstance(fields, dict) and "text" not in fields and "txt" in files:
        fields["text"] = files["txt"].decode("utf-8-sig").strip()
    if isinstance(fields, dict) and isinstance(fields.get("text"), str):
        fields["text"] = unify_line_ends(fields["text"])
    return fields


def unify_line_ends(text: str) -> str:
    """Replace carriage returns, with or without a line feed, by line feeds."""
    return text.replace("\r\n", "\n").replace("\r", "\n")
