"""What the sources share: manifests read line by line, and the names that people give to the same things."""

import gzip
import itertools
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar, cast

from asrllm.errors import UserError
from asrllm.text_files import parse_json

T = TypeVar("T")
UNPACKED = 1 << 28  # bytes that any gzip file may unpack to
UNPACKED_RATIO = 200  # times its size that a larger one may; manifests reach 50
UNREADABLE = (OSError, EOFError, zlib.error, UserError)  # what raw_lines raises
FIELDS = {  # field of a sample: its names in manifests
    "lang": ("lang", "language", "locale"),
    "speaker": ("speaker", "speaker_id", "client_id", "speaker_name"),
    "recording": ("recording", "recording_id"),
    "prompt": ("prompt",),
    "task": ("task",),
    "hotwords": ("hotwords",),
}


def open_manifest(path: Path) -> BinaryIO:
    """A file as it is, or unpacked where it is gzip."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path)) if packed else open(path, "rb")


def raw_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, gzip or not.

    Raises:
        UserError: a gzip file unpacks to more than any text does.
    """
    with open_manifest(path) as file:
        if not isinstance(file, gzip.GzipFile):
            yield from file
            return
        room = max(UNPACKED, UNPACKED_RATIO * path.stat().st_size)
        while line := file.readline(room + 1):
            room -= len(line)
            if room < 0:
                ratio = f"more than {UNPACKED_RATIO} times its size"
                raise UserError(f"{str(path)!r} unpacks to {ratio}. Unpack it yourself if that is what you expect.")
            yield line


def read_lines(path: Path, what: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of a text file, gzip or not; lines without content are left out. `what` names its role in errors."""
    if not path.is_file():
        raise UserError(f"{what} {str(path)!r} does not exist: check the path")
    number, found = 0, False
    try:
        for number, line in enumerate(raw_lines(path), 1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            if text.strip():
                found = True
                yield number, text
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path}:{number} is not UTF-8 text: {error}") from error
    except (OSError, EOFError, zlib.error) as error:  # of gzip too
        raise UserError(f"{what} {str(path)!r} cannot be read after line {number}: {error}") from error
    if not found:
        raise UserError(f"{what} {str(path)!r} {'has no utterance' if path.stat().st_size else 'is empty'}: make it again")


def read_json_lines(path: Path, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(FILE:LINE, object) of a file of one JSON object a line, or of one JSON list of objects, which is held whole."""
    lines = read_lines(path, what)
    first = next(lines)
    if first[1].lstrip().startswith("["):
        whole = _parse("\n".join(text for _, text in itertools.chain([first], lines)), str(path), what, list)
        numbered: Iterable[tuple[str, Any]] = ((f"{path}, entry {i}", row) for i, row in enumerate(whole, 1))
    else:
        numbered = ((f"{path}:{n}", _parse(text, f"{path}:{n}", what, dict)) for n, text in itertools.chain([first], lines))
    for where, row in numbered:
        if not isinstance(row, dict):
            raise UserError(f"{what} {where} is not a JSON object")
        yield where, row


def _parse(text: str, where: str, what: str, kind: type) -> Any:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise UserError(f"{what} {where} is not valid JSON: {error}") from error
    if not isinstance(value, kind):
        raise UserError(f"{what} {where} is not a JSON {'list' if kind is list else 'object'}")
    return value


def count_lines(path: str | Path) -> int | None:
    """Utterances of a manifest of one a line, for a progress bar; None where that is not known."""
    try:
        lines = raw_lines(Path(path))
        first = next(lines, b"")
        return None if first.lstrip().startswith(b"[") else bool(first) + sum(1 for _ in lines)
    except UNREADABLE:
        return None


def take(row: Mapping[str, Any], where: str, *names: str) -> str:
    """The text under the first of the names that the row has; null counts as an empty text."""
    for name in names:
        if name in row:
            if row[name] is None:
                return ""
            if not isinstance(row[name], str):
                raise UserError(f"{where}: {name!r} is {row[name]!r}, which is not a text")
            return row[name]
    raise UserError(f"{where} has no {' or '.join(map(repr, names))}; it has: {', '.join(row) or 'nothing'}")


def take_number(row: Mapping[str, Any], where: str, name: str) -> float | None:
    """A number of seconds, or None where the row has none."""
    value = row.get(name)
    if value is None or value == "":
        return None
    try:
        if float(value) >= 0 and not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise UserError(f"{where}: {name!r} is {value!r}, which is not a number of seconds")


def sample_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest's row says beside the text, under the names that samples have; hotwords are a list, or parted by commas or bars."""
    found = {field: next((row[name] for name in names if row.get(name)), None) for field, names in FIELDS.items()}
    if isinstance(words := found["hotwords"], str):
        found["hotwords"] = [word.strip() for word in re.split(r"[,，、|]", words) if word.strip()]
    return {field: value for field, value in found.items() if value}


def key_of(path: str, start: float | None = None) -> str:
    """An utterance's key where the manifest gives none: the path without its suffix, and the start in milliseconds."""
    if not PurePosixPath(path).name:
        return ""
    path = os.fsencode(path).decode("utf-8", "backslashreplace")  # a name may be in another encoding
    parts = [part for part in PurePosixPath(path).with_suffix("").parts if part not in ("/", "..")]
    return "/".join(parts) + (f"-{round(1000 * start)}" if start else "")


def ahead(rows: Iterator[T], count: int = 100) -> tuple[list[T], Iterator[T]]:
    """The first rows, and all of them."""
    first = list(itertools.islice(rows, count))
    return first, itertools.chain(first, rows)


def audio_rows(path: Path, what: str, field: str) -> Iterator[tuple[str, dict[str, Any], Path]]:
    """(where it stands, the row, its audio file) of a manifest of JSON lines; field: of the audio's path."""
    first, rows = ahead(read_json_lines(path, what))
    root = find_root([take(row, f"{what} {place}", field) for place, row in first], [path.parent, Path.cwd()])
    for place, row in rows:
        yield f"{what} {place}", row, root / take(row, f"{what} {place}", field)


def find_root(names: Sequence[str], roots: Sequence[Path]) -> Path:
    """The first of the directories that holds one of the files; the first of all where none does.

    Asked once for a manifest's first files: to ask for each of millions takes hours on a network's disks.
    """
    return next((root for root in roots if any(os.path.exists(root / name) for name in names)), roots[0])
