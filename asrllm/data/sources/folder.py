"""A directory of audio files, with a table of transcripts or with KEY.txt beside each file."""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asrllm.data.audio_files import FORMATS, has_audio_extension, list_audio, warn_of_skipped
from asrllm.data.sources.files import (
    count_lines,
    find_root,
    json_rows,
    key_from_path,
    peek,
    read_lines,
    rejected_utterance,
    sample_fields,
    seconds_field,
    text_field,
    text_lines,
    text_or_int_field,
)
from asrllm.data.sources.utterance import AudioSegment, RejectedError, Utterance
from asrllm.errors import UserError
from asrllm.text_files import read_text

ROLE = "the table"
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
# directories below the corpus at which the paths of tables start
ROOTS = (".", "clips", "wavs")


def read_folder(folder: str | Path, *, table: str | Path | None = None) -> Iterator[Utterance]:
    """Yield the utterances of a directory of audio files.

    Transcripts come from a table of paths and texts, or else from a KEY.txt beside each audio file.

    Args:
        folder: the directory.
        table: a csv, tsv or jsonl file, for example of Common Voice, audiofolder or LJSpeech. Its
            paths start at the directory, or at clips/ or wavs/ in it. The default is
            metadata.csv, .tsv or .jsonl in the directory, if it exists.

    Raises:
        UserError: the directory does not exist or has no audio, or the table is invalid.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(
            f"{str(folder)!r} is not a directory of audio files. Use a directory. If it is a tar, "
            f"index it with 'asrllm shards index {folder}'."
        )
    if not folder.is_dir():
        raise UserError(f"the audio directory {str(folder)!r} does not exist. Check the path.")
    found = _find_table(folder, table)
    yield from _from_table(folder, found) if found else _from_text_files(folder)


def count_folder(folder: str | Path, *, table: str | Path | None = None) -> int | None:
    """Return the approximate number of utterances. Arguments are those of `read_folder`."""
    found = _find_table(Path(folder), table)
    if found is None:
        return len(list_audio(folder)[0])
    lines = count_lines(found)
    has_header = found.suffix != ".jsonl"
    return lines - 1 if has_header and lines else lines


def _find_table(folder: Path, table: str | Path | None) -> Path | None:
    if table:
        return Path(table)
    for name in TABLES:
        if (folder / name).exists():
            return folder / name
    return None


# --- KEY.txt beside KEY.wav ---


def _from_text_files(folder: Path) -> Iterator[Utterance]:
    files, skipped = list_audio(folder)
    if not files:
        raise UserError(
            f"{str(folder)!r} has neither {' nor '.join(TABLES)} nor an audio file "
            f"({', '.join(FORMATS)}, m4a, ...). Set the table with --table FILE."
        )
    warn_of_skipped(folder, skipped)
    for path in files:
        text, problem = _read_transcript(path.with_suffix(".txt"))
        yield Utterance(
            key=key_from_path(path.relative_to(folder).as_posix()),
            text=text,
            load=AudioSegment(path),
            file=path,
            problem=problem,
        )


def _read_transcript(path: Path) -> tuple[str, tuple[str, str] | None]:
    """Return the content of a text file, or the problem of its utterance."""
    try:
        return read_text(path, "the transcript"), None
    except UserError as error:
        return "", ("no_transcript", str(error))


# --- tables ---


def _from_table(folder: Path, table: Path) -> Iterator[Utterance]:
    read_rows = _json_table if table.suffix == ".jsonl" else _column_table
    first, rows = peek(read_rows(table))
    names = [row.name for _, row in first if isinstance(row, _TableRow) and row.name]
    has_extensions = any(has_audio_extension(name) for name in names)
    suffix = "" if has_extensions else ".wav"  # LJSpeech writes no extensions
    root = find_root([name + suffix for name in names], [folder / name for name in ROOTS])
    for where, row in rows:
        try:
            if isinstance(row, RejectedError):
                raise row
            if not row.name:
                raise RejectedError("missing_audio", f"{where} names no audio file")
            name = row.name + suffix
            yield Utterance(
                key=key_from_path(name),
                text=re.sub(r"\s*[\r\n]\s*", " ", row.text),  # cells may have line breaks
                load=AudioSegment(root / name),
                duration=seconds_field(row.fields, where, "duration"),
                fields=sample_fields(row.fields),
                file=root / name,
            )
        except RejectedError as error:
            yield rejected_utterance({}, where, error)


@dataclass(frozen=True)
class _TableRow:
    """A row of a table.

    Attributes:
        name: its audio file.
        text: its transcript.
        fields: all columns by their names in lower case.
    """

    name: str
    text: str
    fields: Mapping[str, Any]


Rows = Iterator[tuple[str, _TableRow | RejectedError]]


def _json_table(path: Path) -> Rows:
    """Yield (place, row) of a table of JSON lines, the form of audiofolder."""
    for place, row in json_rows(path, ROLE):
        where = f"{ROLE} {place}"
        if isinstance(row, RejectedError):
            yield where, row
            continue
        fields = {name.lower(): value for name, value in row.items()}
        try:
            name = text_field(fields, where, *AUDIO_COLUMNS).strip()
            text = text_or_int_field(fields, where, *TEXT_COLUMNS)
            yield where, _TableRow(name, text, fields)
        except RejectedError as error:
            yield where, error


def _column_table(path: Path) -> Rows:
    """Yield (place, row) of a table with columns."""
    lines = text_lines(path, ROLE, strict=False)
    header = next((line for _, line in lines if line.strip()), None)
    if header is None:
        raise UserError(f"{ROLE} {str(path)!r} is empty. Make it again.")
    header = header.rstrip("\r\n")
    delimiter = _delimiter(path, header)
    if delimiter == "|" and not _find_column(header.split("|"), AUDIO_COLUMNS):
        yield from _ljspeech(path)
        return
    columns = _columns(path, header, delimiter)
    audio = _required_column(path, columns, AUDIO_COLUMNS, "audio")
    text = _required_column(path, columns, TEXT_COLUMNS, "text")
    for number, cells in _split_rows(lines, delimiter):
        where = f"{ROLE} {path}:{number}"
        if isinstance(cells, RejectedError):
            yield where, RejectedError("bad_row", f"{where} {cells.args[1]}")
        elif len(cells) != len(columns):
            yield where, _wrong_number_of_cells(where, cells, columns)
        else:
            row = dict(zip(columns, cells, strict=True))
            fields = {name.lower(): value for name, value in row.items()}
            yield where, _TableRow(row[audio].strip(), row[text], fields)


def _wrong_number_of_cells(
    where: str, cells: Sequence[str], columns: Sequence[str]
) -> RejectedError:
    problem = (
        f"{where} has {len(cells)} cells, but its header has {len(columns)} columns: "
        f"{', '.join(columns)}"
    )
    return RejectedError("bad_row", problem)


def _columns(
    path: Path,
    header: str,
    delimiter: str,
) -> list[str]:
    columns: list[str] = []
    for _, cells in _split_rows(iter([(1, header)]), delimiter):
        if isinstance(cells, RejectedError):
            raise UserError(f"the header of {ROLE} {str(path)!r} {cells.args[1]}. Correct it.")
        columns += [cell.strip() for cell in cells]
    return columns


def _delimiter(path: Path, header: str) -> str:
    """Return the delimiter that splits a header into known columns.

    If there is none, the header is either a row of LJSpeech, or has the usual delimiter of the
    file's suffix.
    """
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    for delimiter in (usual, "\t", ",", "|", ";"):
        if _find_column(header.split(delimiter), AUDIO_COLUMNS):
            return delimiter
    return "|" if header.count("|") in (1, 2) else usual


def _split_rows(
    lines: Iterator[tuple[int, str]], delimiter: str
) -> Iterator[tuple[int, list[str] | RejectedError]]:
    """Yield (number of its last line, cells) of each non-blank row, or why it cannot be split.

    Only csv has quotes, and line breaks within them. Elsewhere a quotation mark is plain text.
    """
    if delimiter in ",;":
        yield from _split_csv(lines, delimiter)
        return
    for number, line in lines:
        if line.strip():
            yield number, line.rstrip("\r\n").split(delimiter)


def _split_csv(
    lines: Iterator[tuple[int, str]], delimiter: str
) -> Iterator[tuple[int, list[str] | RejectedError]]:
    line_number = 0

    def counted() -> Iterator[str]:
        nonlocal line_number
        for number, line in lines:
            line_number = number
            yield line

    reader = csv.reader(counted(), delimiter=delimiter, strict=True)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line_number, RejectedError("bad_row", f"is not valid CSV: {error}")
            continue
        if any(cells):
            yield line_number, cells


def _find_column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the column with the first of the names that occurs, in any case and with quotes."""
    lowered = {column.strip().strip('"').lower(): column for column in columns}
    return next((lowered[name] for name in names if name in lowered), None)


def _required_column(
    path: Path,
    columns: Sequence[str],
    names: Sequence[str],
    what: str,
) -> str:
    column = _find_column(columns, names)
    if column is None:
        known = f"{', '.join(names[:-1])} or {names[-1]}"
        raise UserError(
            f"{ROLE} {str(path)!r} has the columns {', '.join(columns)}, but none for the {what}. "
            f"Name it {known}."
        )
    return column


def _ljspeech(path: Path) -> Rows:
    """Yield the rows of a table without a header: id|text or id|text|normalised text.

    The last text is the one that is spoken.
    """
    for number, line in read_lines(path, ROLE, strict=False):
        where = f"{ROLE} {path}:{number}"
        name, *texts = line.split("|")
        if texts:
            yield where, _TableRow(name.strip(), texts[-1] or texts[0], {})
        else:
            problem = f"{where} is not 'id|text' or 'id|text|normalised text'"
            yield where, RejectedError("bad_row", problem)
