"""A directory of audio files, with a table of transcripts or with KEY.txt beside each."""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asrllm.audio.stream import FORMATS, has_audio_extension, list_audio, warn_of_skipped
from asrllm.data.sources.files import (
    ahead,
    count_lines,
    find_root,
    json_rows,
    key_of,
    read_lines,
    rejected_row,
    sample_fields,
    take,
    take_number,
    take_words,
    text_lines,
)
from asrllm.data.sources.utterance import RejectedError, Stretch, Utterance
from asrllm.errors import UserError

WHAT = "the table"
TABLES = ("metadata.csv", "metadata.tsv", "metadata.jsonl")
AUDIO_COLUMNS = (
    "file_name",
    "path",
    "audio",
    "audio_file",
    "audio_path",
    "audio_filepath",
    "file",
    "filename",
    "wav",
)
TEXT_COLUMNS = ("text", "sentence", "transcript", "transcription", "normalized_text", "label")
ROOTS = (".", "clips", "wavs")  # where tables' paths start, below the directory


def read_folder(folder: str | Path, *, table: str | Path | None = None) -> Iterator[Utterance]:
    """A table of paths and transcripts (csv, tsv or jsonl, as of Common Voice, audiofolder or LJSpeech), or KEY.txt beside each audio.

    table: DIR/metadata.csv, .tsv or .jsonl by default, where it exists. Its paths start at the directory, or at clips/ or wavs/ in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"the audio directory {str(folder)!r} does not exist: check the path")
    found = _table(folder, table)
    yield from _from_table(folder, found) if found else _from_sidecars(folder)


def count_folder(folder: str | Path, *, table: str | Path | None = None) -> int | None:
    found = _table(Path(folder), table)
    lines = count_lines(found) if found else len(list_audio(folder)[0])
    has_header = found and found.suffix != ".jsonl"
    return lines - 1 if has_header and lines else lines


def _table(folder: Path, table: str | Path | None) -> Path | None:
    return (
        Path(table)
        if table
        else next((folder / name for name in TABLES if (folder / name).is_file()), None)
    )


# --- KEY.txt beside KEY.wav ---


def _from_sidecars(folder: Path) -> Iterator[Utterance]:
    files, skipped = list_audio(folder)
    if not files:
        raise UserError(
            f"{str(folder)!r} has neither {' nor '.join(TABLES)} nor an audio file ({', '.join(FORMATS)}, m4a, ...): give --table FILE"
        )
    warn_of_skipped(folder, skipped)
    for path in files:
        key = key_of(path.relative_to(folder).as_posix())
        try:
            text, problem = path.with_suffix(".txt").read_text(encoding="utf-8-sig"), None
        except FileNotFoundError:
            text, problem = (
                "",
                ("no_transcript", f"{str(path.with_suffix('.txt'))!r} does not exist"),
            )
        except UnicodeDecodeError as error:
            text, problem = (
                "",
                ("no_transcript", f"{str(path.with_suffix('.txt'))!r} is not UTF-8 text: {error}"),
            )
        yield Utterance(key=key, text=text, load=Stretch(path), file=path, problem=problem)


# --- tables ---


def _from_table(folder: Path, table: Path) -> Iterator[Utterance]:
    first, rows = ahead(_json_table(table) if table.suffix == ".jsonl" else _rows(table))
    names = [row.name for _, row in first if isinstance(row, _TableRow)]
    suffix = (
        "" if any(has_audio_extension(name) for name in names) else ".wav"
    )  # LJSpeech writes none
    root = find_root([name + suffix for name in names], [folder / name for name in ROOTS])
    for where, row in rows:
        try:
            if isinstance(row, RejectedError):
                raise row
            file = root / (row.name + suffix)
            yield Utterance(
                key=key_of(row.name + suffix),
                text=re.sub(r"\s*[\r\n]\s*", " ", row.text),  # cells may have line breaks
                load=Stretch(file),
                duration=take_number(row.fields, where, "duration"),
                fields=sample_fields(row.fields),
                file=file,
            )
        except RejectedError as why:
            yield rejected_row({}, where, why)


@dataclass(frozen=True)
class _TableRow:
    """A row of a table: the name of its audio file, its text, and all columns by their names in lower case."""

    name: str
    text: str
    fields: Mapping[str, Any]


Rows = Iterator[tuple[str, _TableRow | RejectedError]]


def _json_table(path: Path) -> Rows:
    """Yield (where, row) of a table of one JSON object a line, as audiofolder has it."""
    for place, row in json_rows(path, WHAT):
        where = f"{WHAT} {place}"
        if isinstance(row, RejectedError):
            yield where, row
            continue
        fields = {name.lower(): value for name, value in row.items()}
        try:
            yield (
                where,
                _TableRow(
                    take(fields, where, *AUDIO_COLUMNS).strip(),
                    take_words(fields, where, *TEXT_COLUMNS),
                    fields,
                ),
            )
        except RejectedError as why:
            yield where, why


def _rows(path: Path) -> Rows:
    """Yield (where, row) of a table with columns."""
    lines = text_lines(path, WHAT, strict=False)
    header = next((line for _, line in lines if line.strip()), None)
    if header is None:
        raise UserError(f"{WHAT} {str(path)!r} is empty: make it again")
    header = header.rstrip("\r\n")
    delimiter = _delimiter(path, header)
    if delimiter == "|" and not _column(header.split("|"), AUDIO_COLUMNS):
        yield from _ljspeech(path)
        return
    columns = [
        column.strip() for _, cells in _cells(iter([(1, header)]), delimiter) for column in cells
    ]
    audio, text = (
        _named(path, columns, names, what)
        for names, what in ((AUDIO_COLUMNS, "audio"), (TEXT_COLUMNS, "text"))
    )
    for number, cells in _cells(lines, delimiter):
        where = f"{WHAT} {path}:{number}"
        if isinstance(cells, RejectedError):
            yield where, RejectedError("bad_row", f"{where} {cells.args[1]}")
        elif len(cells) != len(columns):
            counts = f"has {len(cells)} cells, its header has {len(columns)} columns: {', '.join(columns)}"
            yield where, RejectedError("bad_row", f"{where} {counts}")
        else:
            row = dict(zip(columns, cells, strict=True))
            yield (
                where,
                _TableRow(
                    row[audio].strip(),
                    row[text],
                    {name.lower(): value for name, value in row.items()},
                ),
            )


def _delimiter(path: Path, header: str) -> str:
    """The sign that parts the header into columns that we know; that of the file's suffix where none does."""
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    fitting = [d for d in (usual, "\t", ",", "|", ";") if _column(header.split(d), AUDIO_COLUMNS)]
    return fitting[0] if fitting else "|" if header.count("|") in (1, 2) else usual


def _cells(lines: Iterator[tuple[int, str]], delimiter: str) -> Iterator[tuple[int, Any]]:
    """Yield (number of its last line, cells) of each row that has content, or why a row has no cells.

    Only csv has quotes, and line breaks within them: elsewhere a quotation mark is a letter.
    """
    if delimiter not in ",;":
        for number, line in lines:
            if line.strip():
                yield number, line.rstrip("\r\n").split(delimiter)
        return
    at = 0

    def counted() -> Iterator[str]:
        nonlocal at
        for number, line in lines:
            at = number
            yield line

    reader = csv.reader(counted(), delimiter=delimiter, strict=True)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield at, RejectedError("bad_row", f"is not valid CSV: {error}")
            continue
        if any(cells):
            yield at, cells


def _column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    lowered = {column.strip().strip('"').lower(): column for column in columns}
    return next((lowered[name] for name in names if name in lowered), None)


def _named(path: Path, columns: Sequence[str], names: Sequence[str], what: str) -> str:
    column = _column(columns, names)
    if column is None:
        known = f"{', '.join(names[:-1])} or {names[-1]}"
        raise UserError(
            f"{WHAT} {str(path)!r} has the columns {', '.join(columns)}, and none for the {what}: call it {known}"
        )
    return column


def _ljspeech(path: Path) -> Rows:
    """Yield lines of id|text or id|text|normalised text, without a header; the last text is the one that is spoken."""
    for number, line in read_lines(path, WHAT, strict=False):
        where = f"{WHAT} {path}:{number}"
        name, *texts = line.split("|")
        if texts:
            yield where, _TableRow(name.strip(), texts[-1] or texts[0], {})
        else:
            yield (
                where,
                RejectedError("bad_row", f"{where} is not 'id|text' or 'id|text|normalised text'"),
            )
