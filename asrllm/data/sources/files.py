"""Manifests read line by line, and the different names that they use for the same fields."""

import gzip
import itertools
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar, cast

from asrllm.data.sources.utterance import RejectedError, Utterance
from asrllm.data.storage import is_url
from asrllm.errors import UserError
from asrllm.text_files import check_file, open_regular

T = TypeVar("T")
Row = dict[str, Any]
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")  # byte-order marks
MAX_UNPACKED = 1 << 28  # bytes that any gzip file may have after unpacking
MAX_UNPACKED_RATIO = 200  # unpacked to packed size of a larger file; manifests reach 50
# Bytes that a line or a value of a gzip file counts at least: blank lines take time, and Python's
# list of 64 million empty objects, 192 MiB of JSON or 0.2 MB of gzip, takes 5 GB
SMALLEST_VALUE = 64
UNPACK_IT = "If that is intended, unpack it, and use the unpacked file."
LONGEST_RECORDING = 1e7  # four months
UNREADABLE = (OSError, EOFError, zlib.error, UserError)  # what raw_lines raises
SAMPLE_FIELDS = {  # field of a sample: its names in manifests
    "lang": ("lang", "language", "locale"),
    "speaker": ("speaker", "speaker_id", "client_id", "speaker_name"),
    "recording": ("recording", "recording_id"),
    "prompt": ("prompt",),
    "task": ("task",),
    "hotwords": ("hotwords",),
}


# --- lines ---


def open_manifest(path: Path) -> BinaryIO:
    """Open a file for reading, and unpack it if it is gzip."""
    file = open_regular(path)
    is_gzip = file.read(2) == b"\x1f\x8b"
    if is_gzip:
        file.close()
        return cast(BinaryIO, gzip.open(path))
    file.seek(0)
    return file


def raw_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, gzip or not.

    Raises:
        UserError: a gzip file, or a line of it, unpacks to more than a manifest can.
    """
    with open_manifest(path) as file:
        if not isinstance(file, gzip.GzipFile):
            yield from file
            return
        remaining = max(MAX_UNPACKED, MAX_UNPACKED_RATIO * path.stat().st_size)
        while line := file.readline(min(remaining, MAX_UNPACKED) + 1):
            if len(line) > MAX_UNPACKED:
                raise UserError(
                    f"{str(path)!r} has a line of more than {MAX_UNPACKED} bytes after unpacking. "
                    f"{UNPACK_IT}"
                )
            values = line.count(b",") + 1
            remaining -= max(len(line), SMALLEST_VALUE * values)
            if remaining < 0:
                raise UserError(
                    f"{str(path)!r} would take more than {MAX_UNPACKED_RATIO} times its size in "
                    f"memory. {UNPACK_IT}"
                )
            yield line


def text_lines(
    path: Path,
    role: str,
    *,
    strict: bool = True,
) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line with its end) of a text file, gzip or not.

    Byte-order marks are removed.

    Args:
        path: the file.
        role: what the file is, as the beginning of messages.
        strict: True raises an error for a line that is not UTF-8. False turns its bytes into
            surrogates, for which the utterance is rejected later.

    Raises:
        UserError: the file does not exist, is not text, or is truncated.
    """
    check_file(path, role)
    errors = "strict" if strict else "surrogateescape"
    number = 0
    try:
        for number, line in enumerate(raw_lines(path), 1):
            if number == 1 and line.startswith(UTF16_MARKS):
                raise UserError(
                    f"{role} {str(path)!r} is UTF-16 text. "
                    "Convert it to UTF-8, for example with 'iconv -f UTF-16 -t UTF-8'."
                )
            yield number, line.decode("utf-8", errors).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{role} {path}:{number} is not UTF-8 text: {error}") from error
    except (OSError, EOFError, zlib.error) as error:  # gzip raises all three
        raise UserError(
            f"{role} {str(path)!r} cannot be read after line {number}: {error}"
        ) from error


def check_line_ends(line: str, path: Path, role: str) -> None:
    """Check the first line of a file whose lines are rows.

    Args:
        line: the line without its end.
        path: the file.
        role: what the file is, as the beginning of messages.

    Raises:
        UserError: the line has carriage returns, and is therefore several lines.
    """
    if "\r" in line:
        raise UserError(
            f"{role} {str(path)!r} ends its lines with a carriage return alone. "
            "Convert it, for example with \"tr '\\r' '\\n'\"."
        )


def read_lines(
    path: Path,
    role: str,
    *,
    strict: bool = True,
) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line) of the non-blank lines of a text file.

    Arguments are those of `text_lines`.

    Raises:
        UserError: the file cannot be read, see `text_lines`, or all lines are blank.
    """
    found = False
    for number, line in text_lines(path, role, strict=strict):
        if line.strip():
            found = True
            yield number, line.rstrip("\r\n")
    if not found:
        problem = "has no utterance" if path.stat().st_size else "is empty"
        raise UserError(f"{role} {str(path)!r} {problem}. Make it again.")


def count_lines(path: str | Path) -> int | None:
    """Return the number of lines of a manifest, or None if it is a JSON list or unreadable."""
    try:
        lines = raw_lines(Path(path))
        first = next(lines, b"")
        if first.lstrip().startswith(b"["):
            return None
        return bool(first) + sum(1 for _ in lines)
    except UNREADABLE:
        return None


# --- fields of a row ---


def text_field(row: Mapping[str, object], where: str, *names: str) -> str:
    """Return the text of the first of the names that the row has; null is an empty text.

    Args:
        row: the row.
        where: its place, as the beginning of messages.
        names: alternative names of the field.

    Raises:
        RejectedError: the row has none of the names, or another type.
    """
    for name in names:
        if name in row:
            value = row[name]
            if value is None:
                return ""
            if not isinstance(value, str):
                raise RejectedError("bad_field", f"{where}: {name!r} is {value!r}, not a text")
            return value
    expected = " or ".join(map(repr, names))
    present = ", ".join(map(str, row)) or "nothing"
    raise RejectedError("missing_field", f"{where} has no {expected}; it has: {present}")


def text_or_int_field(row: Mapping[str, object], where: str, *names: str) -> str:
    """Return what `text_field` does, and integers as text: keys and transcripts can be numbers."""
    converted = dict(row)
    for name in names:
        value = row.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            converted[name] = str(value)
    return text_field(converted, where, *names)


def audio_field(row: Mapping[str, object], where: str, *names: str) -> str:
    """Return the audio file of the first of the names that a row has.

    Args:
        row: the row.
        where: its place, as the beginning of messages.
        names: alternative names of the field, whose value is as in `audio_path`.

    Raises:
        RejectedError: the row names no audio file.
    """
    paths = {name: audio_path(value) if name in names else value for name, value in row.items()}
    file = text_field(paths, where, *names)
    field = next(name for name in names if name in row)
    check_audio_name(file, f"{where}: {field!r}")
    return file


def audio_path(value: object) -> object:
    """Return the path of {"path": path, ...}, as datasets of Hugging Face name audio in JSON.

    Other values are returned unchanged.
    """
    if isinstance(value, dict) and "path" in value:
        return value["path"]
    return value


def check_audio_name(name: str, place: str) -> None:
    """Raise RejectedError if the name of an audio file is empty, a URL, or no name of a file.

    Args:
        name: the name.
        place: the field that has it, as the beginning of messages.
    """
    if not name:
        raise RejectedError("missing_audio", f"{place} is empty. Name an audio file")
    if is_url(name):
        raise RejectedError(
            "missing_audio", f"{place} is the URL {name!r}. Download it, and name the file"
        )
    check_encodable(name, place)


def check_encodable(name: str, place: str) -> None:
    """Raise RejectedError for a name with a NUL, or half a character, which JSON may contain.

    Args:
        name: the name of a file.
        place: the field that has it, as the beginning of messages.
    """
    try:
        is_encodable = b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        is_encodable = False
    if not is_encodable:
        raise RejectedError("missing_audio", f"{place} is {name!r}, which no file can be named")


def key_field(row: Mapping[str, object], where: str, name: str) -> str:
    """Return the key of a row.

    Raises:
        RejectedError: the row has no key.
    """
    key = text_or_int_field(row, where, name)
    if not key:
        raise RejectedError("bad_key", f"{where} has no key: {name!r} is empty")
    return key


def seconds_field(
    row: Mapping[str, Any],
    where: str,
    name: str,
) -> float | None:
    """Return a number of seconds, or None if the row does not have the field.

    Raises:
        RejectedError: the value is not a number, is negative, or is longer than any recording.
    """
    value = row.get(name)
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
        if 0 <= seconds < LONGEST_RECORDING and not isinstance(value, bool):
            return seconds
    except (TypeError, ValueError, OverflowError):
        pass
    raise RejectedError("bad_field", f"{where}: {name!r} is {value!r}, not a number of seconds")


def sample_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a row other than its text, under the names that samples use.

    Hotwords may be a list, or a text with commas or bars between them. Integers become text.
    """
    fields: dict[str, Any] = {}
    for field, names in SAMPLE_FIELDS.items():
        value = next((row[name] for name in names if row.get(name)), None)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if field == "hotwords" and isinstance(value, str):
            words = (word.strip() for word in re.split(r"[,，、|]", value))
            value = [word for word in words if word]
        if value:
            fields[field] = value
    return fields


def key_from_path(path: str, start: float | None = None) -> str:
    """Return a key for an utterance whose manifest has none.

    Args:
        path: the audio file; the key is its path without the suffix.
        start: start in seconds; the key ends in its milliseconds.
    """
    if not PurePosixPath(path).name:
        return ""
    # a file name may have another encoding
    path = os.fsencode(path).decode("utf-8", "backslashreplace")
    parts = [part for part in PurePosixPath(path).with_suffix("").parts if part not in ("/", "..")]
    key = "/".join(parts)
    return f"{key}-{round(1000 * start)}" if start else key


# --- utterances ---


def peek(rows: Iterator[T], count: int = 100) -> tuple[list[T], Iterator[T]]:
    """Return the first rows, and an iterator over all rows."""
    first = list(itertools.islice(rows, count))
    return first, itertools.chain(first, rows)


def rejected_utterance(
    row: Mapping[str, object],
    place: str,
    error: RejectedError,
) -> Utterance:
    """Return an utterance with a problem. Its key is that of the row, or else the row's place."""
    key = place.rpartition("/")[2]
    for name in ("id", "key"):  # the key takes precedence
        value = row.get(name)
        if isinstance(value, (str, int)):
            key = str(value)
    return Utterance(key=key, text="", problem=error.args)


def find_root(names: Sequence[str], roots: Sequence[Path]) -> Path:
    """Return the first directory that contains one of the files, or else the first directory.

    Absolute paths are left out, because they do not show where the others start. Callers pass only
    the first files of a manifest: on network disks, looking for each of millions of files would
    take hours.
    """
    for root in roots:
        if any(os.path.isfile(root / name) for name in names if not os.path.isabs(name)):
            return root
    return roots[0]
