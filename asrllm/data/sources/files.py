"""What the sources share: manifests read line by line, and the names that people give to the same things."""

import contextlib
import gzip
import itertools
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar, cast

from asrllm.data.sources.utterance import RejectedError, Utterance
from asrllm.errors import UserError
from asrllm.text_files import check_file, parse_json

T = TypeVar("T")
Row = dict[str, Any]
UTF16 = (b"\xff\xfe", b"\xfe\xff")  # byte-order marks
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
                raise UserError(
                    f"{str(path)!r} unpacks to {ratio}. Unpack it yourself if that is what you expect."
                )
            yield line


def text_lines(path: Path, what: str, *, strict: bool = True) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line with its end) of every line of a text file, gzip or not, without byte-order marks.

    Args:
        path: the file.
        what: the role of the file, which begins the error message.
        strict: whether a line that is not UTF-8 is an error; else its bytes become surrogates, by which the
            utterance is rejected.

    Raises:
        UserError: the file is missing, is not text or is cut short.
    """
    check_file(path, what)
    number = 0
    try:
        for number, line in enumerate(raw_lines(path), 1):
            if number == 1 and line.startswith(UTF16):
                raise UserError(
                    f"{what} {str(path)!r} is UTF-16 text. Convert it to UTF-8, such as by 'iconv -f UTF-16 -t UTF-8'."
                )
            yield (
                number,
                line.decode("utf-8", "strict" if strict else "surrogateescape").removeprefix(
                    "\ufeff"
                ),
            )
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path}:{number} is not UTF-8 text: {error}") from error
    except (OSError, EOFError, zlib.error) as error:  # of gzip too
        raise UserError(
            f"{what} {str(path)!r} cannot be read after line {number}: {error}"
        ) from error


def read_lines(path: Path, what: str, *, strict: bool = True) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line) of the lines with content of a text file. Arguments and errors are those of `text_lines`.

    Raises:
        UserError: also where no line has content.
    """
    found = False
    for number, line in text_lines(path, what, strict=strict):
        if line.strip():
            found = True
            yield number, line.rstrip("\r\n")
    if not found:
        raise UserError(
            f"{what} {str(path)!r} {'has no utterance' if path.stat().st_size else 'is empty'}: make it again"
        )


def json_rows(path: Path, what: str) -> Iterator[tuple[str, Row | RejectedError]]:
    """Yield (FILE:LINE, object) of a file of one JSON object a line, or of one JSON list of objects, which is held whole.

    A row that is no object comes as the reason for which it is rejected.
    """
    lines = read_lines(path, what, strict=False)
    first = next(lines)
    if first[1].lstrip().startswith("["):
        whole = _parse(
            "\n".join(text for _, text in itertools.chain([first], lines)), str(path), what, list
        )
        for number, row in enumerate(whole, 1):
            where = f"{path}, entry {number}"
            yield where, _checked_object(row, f"{what} {where}")
        return
    for number, text in itertools.chain([first], lines):
        where = f"{path}:{number}"
        try:
            yield where, _checked_object(parse_json(text), f"{what} {where}")
        except ValueError as error:
            yield where, RejectedError("bad_json", f"{what} {where} is not valid JSON: {error}")


def _checked_object(row: Any, where: str) -> Row | RejectedError:
    return (
        row if isinstance(row, dict) else RejectedError("bad_json", f"{where} is not a JSON object")
    )


def read_json_lines(path: Path, what: str) -> Iterator[tuple[str, Row]]:
    """Yield what `json_rows` does. Raises UserError for a row that is no object."""
    for where, row in json_rows(path, what):
        if isinstance(row, RejectedError):
            raise UserError(row.args[1])
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
    """Return the text under the first of the names that the row has; null counts as an empty text.

    Raises:
        RejectedError: the row has none of them, or something other than text.
    """
    for name in names:
        if name in row:
            if row[name] is None:
                return ""
            if not isinstance(row[name], str):
                raise RejectedError(
                    "bad_field", f"{where}: {name!r} is {row[name]!r}, which is not a text"
                )
            return row[name]
    has = ", ".join(map(str, row)) or "nothing"
    raise RejectedError(
        "missing_field", f"{where} has no {' or '.join(map(repr, names))}; it has: {has}"
    )


def take_words(row: Mapping[str, Any], where: str, *names: str) -> str:
    """Return what `take` does, and whole numbers as text: of keys, and of transcripts such as 7."""
    whole = {
        name: str(row[name])
        for name in names
        if isinstance(row.get(name), int) and not isinstance(row[name], bool)
    }
    return take({**row, **whole}, where, *names)


def take_number(row: Mapping[str, Any], where: str, name: str) -> float | None:
    """Return a number of seconds, or None where the row has none.

    Raises:
        RejectedError: it is not a number, or is negative.
    """
    value = row.get(name)
    if value is None or value == "":
        return None
    try:
        if float(value) >= 0 and not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise RejectedError(
        "bad_field", f"{where}: {name!r} is {value!r}, which is not a number of seconds"
    )


def sample_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest's row says beside the text, under the names that samples have; hotwords are a list, or parted by commas or bars."""
    found = {
        field: next((row[name] for name in names if row.get(name)), None)
        for field, names in FIELDS.items()
    }
    if isinstance(words := found["hotwords"], str):
        found["hotwords"] = [word.strip() for word in re.split(r"[,，、|]", words) if word.strip()]
    return {field: value for field, value in found.items() if value}


def key_of(path: str, start: float | None = None) -> str:
    """An utterance's key where the manifest gives none: the path without its suffix, and the start in milliseconds."""
    if not PurePosixPath(path).name:
        return ""
    path = os.fsencode(path).decode(
        "utf-8", "backslashreplace"
    )  # a name may be in another encoding
    parts = [part for part in PurePosixPath(path).with_suffix("").parts if part not in ("/", "..")]
    return "/".join(parts) + (f"-{round(1000 * start)}" if start else "")


def ahead(rows: Iterator[T], count: int = 100) -> tuple[list[T], Iterator[T]]:
    """The first rows, and all of them."""
    first = list(itertools.islice(rows, count))
    return first, itertools.chain(first, rows)


def utterances(
    path: Path,
    what: str,
    *,
    names: Callable[[Row, str], Sequence[str]],
    make: Callable[[Row, str, Path], Utterance],
) -> Iterator[Utterance]:
    """Yield the utterances of a JSON manifest. A row of which none can be made is one with a problem.

    Args:
        path: the manifest.
        what: its role, for messages.
        names: returns the audio files that a row names; called with the row and where it is.
        make: returns a row's utterance; called with the row, where it is, and the directory at which paths start.
    """
    first, rows = ahead(json_rows(path, what))
    found: list[str] = []
    for place, row in first:
        with contextlib.suppress(RejectedError):
            found += [] if isinstance(row, RejectedError) else names(row, f"{what} {place}")
    root = find_root(found, [path.parent, Path.cwd()])
    for place, row in rows:
        if isinstance(row, RejectedError):
            yield rejected_row({}, place, row)
            continue
        try:
            yield make(row, f"{what} {place}", root)
        except RejectedError as why:
            yield rejected_row(row, place, why)


def rejected_row(row: Mapping[str, Any], place: str, why: RejectedError) -> Utterance:
    """Return an utterance that is rejected; its key is the row's, or where the row is."""
    keys = [str(row[name]) for name in ("key", "id") if isinstance(row.get(name), (str, int))]
    return Utterance(key=keys[0] if keys else place.rpartition("/")[2], text="", problem=why.args)


def find_root(names: Sequence[str], roots: Sequence[Path]) -> Path:
    """The first of the directories that holds one of the files; the first of all where none does.

    Asked once for a manifest's first files: to ask for each of millions takes hours on a network's disks.
    """
    return next(
        (root for root in roots if any(os.path.exists(root / name) for name in names)), roots[0]
    )
