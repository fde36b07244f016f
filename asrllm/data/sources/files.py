"""Manifests read line by line, and the different names that they use for the same fields."""

import contextlib
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar, cast

from asrllm.data.sources.utterance import RejectedError, Utterance
from asrllm.data.storage import is_url
from asrllm.errors import UserError
from asrllm.text_files import check_file, open_regular, parse_json

T = TypeVar("T")
Row = dict[str, Any]
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")  # byte-order marks
MAX_UNPACKED = 1 << 28  # bytes that any gzip file may have after unpacking
MAX_UNPACKED_RATIO = 200  # unpacked to packed size of a larger file; manifests reach 50
# Bytes that a line or a value of a gzip file counts at least: blank lines take time, and Python's
# list of 64 million empty objects, 192 MiB of JSON or 0.2 MB of gzip, takes 5 GB
SMALLEST_VALUE = 64
UNPACK_IT = "If that is intended, unpack it, and use the unpacked file."
MAX_SYNTAX_ERRORS = 1000  # in a JSON list; finding the place of each takes a while
MAX_REPARSED = 16  # how often each character of a damaged JSON list may be parsed
MAX_COMPARED = 100  # objects among which the first entry after a damaged one is looked for
SPACE = re.compile(r"[ \t\n\r]*")  # of JSON
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


# --- JSON ---


def json_rows(path: Path, role: str) -> Iterator[tuple[str, Row | RejectedError]]:
    """Yield (FILE:LINE, object) of a file of JSON lines, or of one JSON list, which is held whole.

    A row that is not an object, or that has a syntax error, is yielded as the reason for its
    rejection.

    Args:
        path: the file.
        role: what the file is, as the beginning of messages.
    """
    lines = read_lines(path, role, strict=False)
    first = next(lines)
    lines = itertools.chain([first], lines)
    if first[1].lstrip().startswith("["):
        yield from _list_rows(list(lines), path, role)
        return
    for number, text in lines:
        where = f"{path}:{number}"
        try:
            yield where, _checked_object(parse_json(text), f"{role} {where}")
        except ValueError as error:
            # a JSONDecodeError counts lines within this one
            description = str(error)
            if isinstance(error, json.JSONDecodeError):
                description = f"{error.msg} in column {error.colno}"
            problem = f"{role} {where} is not valid JSON: {description}{_layout_hint(text)}"
            yield where, RejectedError("bad_json", problem)


def _layout_hint(line: str) -> str:
    """Return what to do about a line that is invalid because of its file's layout, or ""."""
    if "\r" in line:
        return (
            ". The file ends its lines with a carriage return alone. Convert it, for example with "
            "\"tr '\\r' '\\n'\""
        )
    if line.strip() in ("{", "[", "}", "},"):
        return ". Write each object in one line, for example with 'jq -c .'"
    return ""


def _checked_object(row: object, where: str) -> Row | RejectedError:
    if isinstance(row, dict):
        return row
    return RejectedError("bad_json", f"{where} is not a JSON object")


def _list_rows(
    lines: Sequence[tuple[int, str]], path: Path, role: str
) -> Iterator[tuple[str, Row | RejectedError]]:
    """Yield (place, object) of the entries of a JSON list.

    Raises:
        UserError: the list has no end or no entry.
    """
    text = "\n".join(line for _, line in lines).rstrip()
    entries: Iterable[object]
    try:
        entries = parse_json(text)
    except ValueError as error:
        if not text.endswith("]"):
            place, problem = _json_error(error, lines, path)
            raise UserError(f"{role} {place} is not valid JSON: {problem}. Correct it.") from error
        entries = _Entries(text, lines, path, role)
    number = 0
    for number, entry in enumerate(entries, 1):
        where = f"{path}, entry {number}"
        if isinstance(entry, RejectedError):
            yield where, entry
        else:
            yield where, _checked_object(entry, f"{role} {where}")
    if not number:
        raise UserError(f"{role} {str(path)!r} has no utterance. Make it again.")


def _json_error(error: Exception, lines: Sequence[tuple[int, str]], path: Path) -> tuple[str, str]:
    """Return the place and the description of a syntax error in a JSON list."""
    if isinstance(error, json.JSONDecodeError):
        number = lines[error.lineno - 1][0]
        return f"{path}:{number}:{error.colno}", error.msg
    return str(path), "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


class _Entries:
    """The entries of a JSON list with syntax errors.

    An entry with an error is a RejectedError. The next entry is the first object after its
    beginning that has most of the fields which all entries so far have, because the objects within
    an entry, such as the turns of a chat, have others.
    """

    def __init__(self, text: str, lines: Sequence[tuple[int, str]], path: Path, role: str) -> None:
        """
        Args:
            text: the list, with an end.
            lines: its lines with their numbers.
            path: its file.
            role: what the file is, as the beginning of messages.
        """
        self.text = text
        self.lines = lines
        self.path = path
        self.role = role
        self.decode = json.JSONDecoder().raw_decode
        self.last = len(text) - 1  # position of the bracket at its end
        self.fields: set[str] | None = None
        # characters that may be parsed in search of an entry; nested objects are parsed repeatedly
        self.remaining = MAX_REPARSED * len(text)
        self.errors = 0

    def __iter__(self) -> Iterator[object]:
        position = _after_space(self.text, self.text.index("[") + 1)
        while position < self.last:
            try:
                entry, end = self._entry(self.text, position)
            except (ValueError, RecursionError) as error:
                place, problem = _json_error(error, self.lines, self.path)
                position = self._next(position)
                where = self._place(position)
                yield RejectedError(
                    "bad_json",
                    f"{self.role} {place} is not valid JSON: {problem}. All before {where} is "
                    "skipped. Correct it",
                )
            else:
                if isinstance(entry, dict):
                    fields = self.fields
                    self.fields = set(entry) if fields is None else fields & entry.keys()
                yield entry
                position = end

    def _entry(self, text: str, position: int) -> tuple[object, int]:
        """Return the entry at a position, and the position of the next one or of the list's end.

        Raises:
            ValueError, RecursionError: there is no entry, or something other than an entry follows.
        """
        entry, end = self.decode(text, position)
        end = _after_space(text, end)
        following = text[end : end + 1]
        if following == ",":
            return entry, _after_space(text, end + 1)
        is_last = end == len(text) - 1
        if following == "{" or (following == "]" and is_last):  # a comma may be missing
            return entry, end
        raise json.JSONDecodeError("Expecting ',' delimiter", text, end)

    def _next(self, start: int) -> int:
        """Return the position of the entry after the one that starts at a position, or the end.

        Raises:
            UserError: the list has too many errors.
        """
        self.errors += 1
        if self.errors > MAX_SYNTAX_ERRORS:
            raise self._too_many_errors()
        if self.fields is None:
            self.fields = self._fields_of_longest(start)
        rest = self.text[start:]  # an error counts the lines before it
        position = 0
        while (position := rest.find("{", position + 1)) > 0:
            try:
                entry, end = self._entry(rest, position)
                if isinstance(entry, dict) and self._is_like_entries(entry):
                    return start + position
            except (ValueError, RecursionError) as error:
                end = getattr(error, "pos", position)
            self._count(end)
        return self.last

    def _is_like_entries(self, entry: Row) -> bool:
        fields = self.fields or set()
        return not fields or 2 * len(fields & entry.keys()) > len(fields)

    def _fields_of_longest(self, start: int) -> set[str]:
        """Return the fields of the longest of the next objects, which is not within an entry."""
        fields: set[str] = set()
        longest = 0
        position = start
        for _ in range(MAX_COMPARED):
            position = self.text.find("{", position + 1)
            if position < 0:
                break
            try:
                entry, end = self.decode(self.text, position)
            except (ValueError, RecursionError) as error:
                self._count(getattr(error, "pos", position) - position)
                continue
            self._count(end - position)
            if isinstance(entry, dict) and end - position > longest:
                longest = end - position
                fields = set(entry)
            position = end - 1
        return fields

    def _count(self, characters: int) -> None:
        """Count characters that were parsed in search of an entry, up to the limit."""
        self.remaining -= characters
        if self.remaining < 0:
            raise self._too_many_errors()

    def _place(self, position: int) -> str:
        line = self.text.count("\n", 0, position)
        column = position - self.text.rfind("\n", 0, position)
        return f"{self.path}:{self.lines[line][0]}:{column}"

    def _too_many_errors(self) -> UserError:
        return UserError(
            f"{self.role} {str(self.path)!r} has too many syntax errors. Make it again."
        )


def _after_space(text: str, position: int) -> int:
    """Return the first position from this one on that is not white space."""
    match = SPACE.match(text, position)
    assert match is not None
    return match.end()


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


def read_json_manifest(
    path: Path,
    role: str,
    *,
    names: Callable[[Row, str], Sequence[str]],
    make: Callable[[Row, str, Path], Utterance],
) -> Iterator[Utterance]:
    """Yield the utterances of a JSON manifest. A bad row becomes an utterance with a problem.

    Args:
        path: the manifest.
        role: what it is, as the beginning of messages.
        names: returns the audio files that a row names, from the row and its place.
        make: returns a row's utterance, from the row, its place, and the directory at which
            relative paths start.
    """
    first, rows = peek(json_rows(path, role))
    files: list[str] = []
    for place, row in first:
        with contextlib.suppress(RejectedError):
            if not isinstance(row, RejectedError):
                files += names(row, f"{role} {place}")
    root = find_root(files, [path.parent, Path.cwd()])
    for place, row in rows:
        if isinstance(row, RejectedError):
            yield rejected_utterance({}, place, row)
            continue
        try:
            yield make(row, f"{role} {place}", root)
        except RejectedError as error:
            yield rejected_utterance(row, place, error)


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
