"""A directory of audio files, with a table of transcripts or with KEY.txt beside each file."""

import csv
import os
import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from asrllm.data.audio_file import FORMATS
from asrllm.data.find_audio import has_audio_extension, list_audio, warn_of_skipped
from asrllm.data.sources.files import (
    SAMPLE_FIELDS,
    audio_field,
    check_audio_name,
    check_line_ends,
    count_lines,
    find_root,
    key_from_path,
    peek,
    read_lines,
    rejected_utterance,
    sample_fields,
    seconds_field,
    text_lines,
    text_or_int_field,
)
from asrllm.data.sources.json_rows import json_rows
from asrllm.data.sources.utterance import AudioSegment, RejectedError, Utterance
from asrllm.errors import UserError
from asrllm.text_files import missing_problem, read_text

ROLE = "the table"
METADATA_NAMES = ("metadata.csv", "metadata.tsv", "metadata.jsonl")
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
FIELD_COLUMNS = [name for names in SAMPLE_FIELDS.values() for name in names]
# directories below the corpus at which the paths of tables start
ROOTS = (".", "clips", "wavs")
MAX_CELL_BYTES = 10_000  # of a csv cell with line breaks, the limit of a transcript in shards


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
        raise UserError(f"the audio directory {str(folder)!r} {missing_problem(folder)}")
    found = _find_table(folder, table)
    if found is None:
        yield from _from_text_files(folder)
        return
    listed: set[str] = set()
    yield from _from_table(folder, found, listed)
    if table is None:  # another table may be one of several, like Common Voice's train.tsv
        files, _ = list_audio(folder)
        missing = [path for path in files if os.path.realpath(path) not in listed]
        warn_of_skipped(folder, missing, f"have no usable row in {found.name}")


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
    for name in METADATA_NAMES:
        if (folder / name).exists():
            return folder / name
    return None


# --- KEY.txt beside KEY.wav ---


def _from_text_files(folder: Path) -> Iterator[Utterance]:
    files, skipped = list_audio(folder)
    if not files:
        raise UserError(
            f"{str(folder)!r} has neither {' nor '.join(METADATA_NAMES)} nor an audio file "
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


def _from_table(folder: Path, table: Path, listed: set[str]) -> Iterator[Utterance]:
    """Yield the utterances of a table, and add the paths of its audio files to `listed`."""
    read_rows = _json_table if table.suffix == ".jsonl" else _column_table
    first, rows = peek(read_rows(table))
    if not first:
        raise UserError(f"{ROLE} {str(table)!r} has no utterance. Make it again.")
    names = [row.name for _, row in first if isinstance(row, _TableRow) and row.name]
    # LJSpeech writes no extensions
    suffix = "" if 2 * sum(map(has_audio_extension, names)) > len(names) else ".wav"
    root = find_root(
        [_file_name(name, suffix) for name in names], [folder / name for name in ROOTS]
    )
    for where, row in rows:
        try:
            if isinstance(row, RejectedError):
                raise row
            check_audio_name(row.name, f"{where}: its audio")
            name = _file_name(row.name, suffix)
            listed.add(os.path.realpath(root / name))
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


def _file_name(name: str, suffix: str) -> str:
    """Return the name of an audio file in a table, with the suffix if it has none."""
    return name if has_audio_extension(name) else name + suffix


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


TableRows = Iterator[tuple[str, _TableRow | RejectedError]]


def _json_table(path: Path) -> TableRows:
    """Yield (place, row) of a table of JSON lines, the form of audiofolder."""
    for place, row in json_rows(path, ROLE):
        where = f"{ROLE} {place}"
        if isinstance(row, RejectedError):
            yield where, row
            continue
        fields = {name.lower(): value for name, value in row.items()}
        try:
            name = audio_field(fields, where, *AUDIO_COLUMNS).strip()
            text = text_or_int_field(fields, where, *TEXT_COLUMNS)
            yield where, _TableRow(name, text, fields)
        except RejectedError as error:
            yield where, error


def _column_table(path: Path) -> TableRows:
    """Yield (place, row) of a table with columns."""
    lines = text_lines(path, ROLE, strict=False)
    header = next((line for _, line in lines if line.strip()), None)
    if header is None:
        raise UserError(f"{ROLE} {str(path)!r} is empty. Make it again.")
    header = header.rstrip("\r\n")
    check_line_ends(header, path, ROLE)
    delimiter = _delimiter(path, header)
    if delimiter == "|" and not _find_column(header.split("|"), AUDIO_COLUMNS):
        yield from _ljspeech(path)
        return
    columns = _columns(path, header, delimiter)
    audio = _required_column(path, columns, AUDIO_COLUMNS, "audio")
    text = _required_column(path, columns, TEXT_COLUMNS, "text")
    _check_repeated(path, columns, {audio.lower(), text.lower(), "duration", *FIELD_COLUMNS})
    positions = _positions(columns)
    shape = _Shape(len(columns), positions[audio.lower()])
    for number, cells in _split_rows(lines, delimiter, shape):
        where = f"{ROLE} {path}:{number}"
        if isinstance(cells, RejectedError):
            yield where, RejectedError("bad_row", f"{where} {cells.args[1]}")
        elif len(cells) != len(columns):
            yield where, _wrong_number_of_cells(where, cells, columns)
        else:
            fields = {name: cells[position] for name, position in positions.items()}
            name = fields[audio.lower()].strip()
            yield where, _TableRow(name, fields[text.lower()], fields)


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


def _check_repeated(path: Path, columns: Sequence[str], used: set[str]) -> None:
    """Raise UserError if a used column is repeated, unless one of them alone is in lower case.

    Args:
        path: the table.
        columns: the names in its header.
        used: names in lower case of the columns that are used.
    """
    counts = Counter(column.lower() for column in columns)
    exact = Counter(columns)
    repeated = [
        repr(name)
        for name, count in counts.items()
        if name in used and count > 1 and exact[name] != 1
    ]
    if repeated:
        raise UserError(
            f"{ROLE} {str(path)!r} has several columns named {' and '.join(repeated)}. "
            "Rename or remove all but one of them."
        )


def _positions(columns: Sequence[str]) -> dict[str, int]:
    """Return the position of each column by its name in lower case.

    Of columns that differ only in case, the one in lower case has precedence.
    """
    positions: dict[str, int] = {}
    for position, column in enumerate(columns):
        if column.lower() not in positions or column == column.lower():
            positions[column.lower()] = position
    return positions


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


class _Shape(NamedTuple):
    """The form of a table's rows.

    Attributes:
        columns: number of cells.
        audio: position of the audio file's name.
    """

    columns: int
    audio: int


def _split_rows(
    lines: Iterator[tuple[int, str]], delimiter: str, shape: _Shape | None = None
) -> Iterator[tuple[int, list[str] | RejectedError]]:
    """Yield (number of its first line, cells) of each non-blank row, or why it cannot be split.

    Only csv has quotes, and line breaks within them. Elsewhere a quotation mark is plain text.

    Args:
        lines: numbered lines.
        delimiter: the character between cells.
        shape: the form of the rows; None for the header.
    """
    if delimiter in ",;":
        yield from _split_csv(_CsvLines(lines), delimiter, shape)
        return
    for number, line in lines:
        if line.strip():
            yield number, line.rstrip("\r\n").split(delimiter)


class _CsvLines:
    """Lines of a csv file. All lines of the current row but its first can be read again.

    Attributes:
        row: numbered lines of the current row.
        is_too_long: whether the row did not end within MAX_CELL_BYTES.
    """

    def __init__(self, lines: Iterator[tuple[int, str]]) -> None:
        self._lines = lines
        self._again: deque[tuple[int, str]] = deque()
        self.row: list[tuple[int, str]] = []
        self.is_too_long = False

    def next_row(self) -> Iterator[str]:
        """Yield the lines of the next row until those after the first exceed MAX_CELL_BYTES."""
        self.row = []
        self.is_too_long = False
        size = 0  # bytes of the lines after the first
        while size <= MAX_CELL_BYTES:
            line = self._again.popleft() if self._again else next(self._lines, None)
            if line is None:
                return
            if self.row:
                size += len(line[1].encode("utf-8", "surrogatepass"))
            self.row.append(line)
            yield line[1]
        self.is_too_long = True

    def end_row_after_first_line(self) -> None:
        """Let the next row begin at the second line of the current one."""
        self._again.extendleft(reversed(self.row[1:]))


def _split_csv(
    lines: _CsvLines, delimiter: str, shape: _Shape | None
) -> Iterator[tuple[int, list[str] | RejectedError]]:
    """Yield what `_split_rows` does.

    A stray quotation mark makes one cell of all lines up to the next quotation mark. If the row is
    then invalid, or has lines that are rows, only its first line is rejected.
    """
    while True:
        problem = ""
        cells: list[str] = []
        try:
            cells = next(csv.reader(lines.next_row(), delimiter=delimiter, strict=True))
        except StopIteration:
            return
        except csv.Error as error:
            problem = f"is not valid CSV: {error}"
            if "new-line character" in str(error):  # csv advises how to open the file
                problem = "has a carriage return within a cell without quotation marks. Remove it"
        number = lines.row[0][0]
        texts = [line for _, line in lines.row]
        if len(texts) > 1 and (problem or not _is_one_row(cells, texts, delimiter, shape)):
            opening = _opening_line(lines.row, delimiter)
            problem = _unclosed_cell(opening, lines.is_too_long)
            lines.end_row_after_first_line()
        if problem:
            yield number, RejectedError("bad_row", problem)
        elif any(cells):
            yield number, cells


def _unclosed_cell(opening: int, is_too_long: bool) -> str:
    """Return the problem of a cell that a quotation mark opens in this line."""
    if is_too_long:
        return (
            f"is not valid CSV: the cell that a quotation mark opens in line {opening} is longer "
            f"than {MAX_CELL_BYTES} bytes. Remove the mark, or shorten the cell"
        )
    return (
        f"is not valid CSV: the quotation mark that opens a cell in line {opening} is not closed "
        "in its row. Remove it, or close the cell"
    )


def _is_one_row(
    cells: Sequence[str], lines: Sequence[str], delimiter: str, shape: _Shape | None
) -> bool:
    """Return whether several lines are one row, and none of them is a whole row.

    Args:
        cells: the cells of all lines together.
        lines: the lines.
        delimiter: the character between cells.
        shape: the form of the rows, or None.
    """
    if shape is None:
        return True
    if len(cells) != shape.columns:
        return False
    name = cells[shape.audio]
    if "\n" in name.strip():
        return False
    # the first line is a row if its quotation mark is the stray one
    first = _whole_row(lines[0].replace('"', "", 1), delimiter)
    if len(first) != shape.columns or first[shape.audio] == name:
        first = []
    others = [_whole_row(line, delimiter) for line in lines[1:]]
    rows = [apart for apart in (first, *others) if len(apart) == shape.columns]
    return not any(_is_like(apart[shape.audio], name) for apart in rows)


def _whole_row(line: str, delimiter: str) -> list[str]:
    """Return the cells of a line, or none if a quotation mark in it is stray.

    csv accepts a quotation mark within a cell that does not begin with one, even if it is strict.
    """
    line = line.rstrip("\r\n")
    cell = rf'(?:"(?:[^"]|"")*"|[^"{delimiter}]*)'
    if not re.fullmatch(rf"{cell}(?:{delimiter}{cell})*", line):
        return []
    return next(csv.reader([line], delimiter=delimiter, strict=True), [])


def _is_like(text: str, name: str) -> bool:
    """Return whether a text may name an audio file in the way that `name` does.

    Spaces around them count: prose has a space after a comma, and most tables have none.
    """
    if not text.strip():
        return False
    if has_audio_extension(name.strip()):
        is_phrase = len(text.split()) > 1 and len(name.split()) == 1
        return has_audio_extension(text.strip()) and not is_phrase
    return _pattern(text) == _pattern(name)


def _pattern(name: str) -> str:
    """Return a name with each run of digits as one digit: "utt-12" -> "utt-0"."""
    return re.sub(r"\d+", "0", name)


def _opening_line(row: Sequence[tuple[int, str]], delimiter: str) -> int:
    """Return the number of the line in which the cell begins that is not closed in its row."""
    quoted = r'"(?:[^"]|"")*"'
    plain = rf'[^"{delimiter}\r\n][^{delimiter}\r\n]*'
    whole_cells = re.compile(rf"(?:(?:{quoted}|{plain})?{delimiter})*")
    text = "".join(line for _, line in row)
    before = whole_cells.match(text)
    return row[before.group().count("\n") if before else 0][0]


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


def _ljspeech(path: Path) -> TableRows:
    """Yield the rows of a table without a header: id|text or id|text|normalized text.

    The last text is the one that is spoken.
    """
    for number, line in read_lines(path, ROLE, strict=False):
        where = f"{ROLE} {path}:{number}"
        name, *texts = line.split("|")
        if "\r" in line:
            yield where, RejectedError("bad_row", f"{where} has a carriage return. Remove it")
        elif texts:
            yield where, _TableRow(name.strip(), texts[-1] or texts[0], {})
        else:
            problem = f"{where} is not 'id|text' or 'id|text|normalized text'"
            yield where, RejectedError("bad_row", problem)
