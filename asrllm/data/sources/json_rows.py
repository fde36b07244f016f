"""Rows of JSON manifests: objects line by line, or the entries of one list."""

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from asrllm.data.sources.files import Row, find_root, peek, read_lines, rejected_utterance
from asrllm.data.sources.utterance import RejectedError, Utterance
from asrllm.errors import UserError
from asrllm.text_files import object_with_unique_keys

MAX_SYNTAX_ERRORS = 1000  # in a JSON list; finding the place of each takes a while
MAX_REPARSED = 16  # how often each character of a damaged JSON list may be parsed
MAX_COMPARED = 100  # objects among which the first entry after a damaged one is looked for
DECODER = json.JSONDecoder(object_pairs_hook=object_with_unique_keys)
SPACE = re.compile(r"[ \t\n\r]*")  # of JSON


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
            yield where, _checked_object(_parse(text), f"{role} {where}")
        except ValueError as error:
            # a JSONDecodeError counts lines within this one
            description = str(error)
            if isinstance(error, json.JSONDecodeError):
                description = f"{error.msg} in column {error.colno}"
            problem = f"{role} {where} is not valid JSON: {description}{_layout_hint(text)}"
            yield where, RejectedError("bad_json", problem)


def _parse(text: str) -> Any:
    """Parse a JSON text in which no object has a key twice.

    Raises:
        ValueError: the text is something else.
    """
    try:
        return DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _layout_hint(line: str) -> str:
    """Return what to do about a line that is invalid because of its file's layout, or ""."""
    if "\r" in line:
        return (
            ". The file ends its lines with a carriage return alone. Convert it, for example with "
            "\"tr '\\r' '\\n'\""
        )
    if line.strip() in ("{", "[", "}", "},"):
        return (
            ". Write each object in one line, for example with 'jq -c .', or with 'jq -c .NAME[]' "
            "if they are in a list NAME"
        )
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
        entries = _parse(text)
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
        self.decode = DECODER.raw_decode
        self.last = len(text) - 1  # position of the bracket at its end
        self.fields: set[str] | None = None
        self.shortest = len(text)  # characters of the shortest entry so far
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
                if not isinstance(error, json.JSONDecodeError):  # which has the place
                    place = self._place(position)
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
                    self.shortest = min(self.shortest, end - position)
                yield entry
                position = end

    def _entry(self, text: str, position: int) -> tuple[object, int]:
        """Return the entry at a position, and the position of the next one or of the list's end.

        Raises:
            ValueError, RecursionError: there is no entry, or it is followed by something other than
                an entry or the list's end.
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
            _, self.fields = self._longest(start)
        position = self._search(start)
        if position == self.last:
            # The entries so far may be parts of a damaged one, or have more fields than the others.
            longest, fields = self._longest(start)
            if 4 * longest > 3 * self.shortest:
                self.fields = fields
                position = self._search(start)
        return position

    def _search(self, start: int) -> int:
        """Return the position of the first object after a position that is like the entries."""
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

    def _longest(self, start: int) -> tuple[int, set[str]]:
        """Return the length and the fields of the longest of the next objects.

        It is probably an entry, because the objects within entries are shorter.
        """
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
        return longest, fields

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
