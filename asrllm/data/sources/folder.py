"""A directory of audio files, with a table of transcripts or with KEY.txt beside each."""

import csv
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from asrllm.data.index import AUDIO_EXTENSIONS
from asrllm.data.sources.files import ahead, count_lines, find_root, key_of, read_lines, sample_fields, take_number
from asrllm.data.sources.utterance import Stretch, Utterance
from asrllm.errors import UserError

WHAT = "the table"
TABLES = ("metadata.csv", "metadata.tsv")
AUDIO_COLUMNS = ("file_name", "path", "audio", "audio_file", "audio_path", "audio_filepath", "file", "filename", "wav")
TEXT_COLUMNS = ("text", "sentence", "transcript", "transcription", "normalized_text", "label")
ROOTS = (".", "clips", "wavs")  # where tables' paths start, below the directory
Row = dict[str, str]


def read_folder(folder: str | Path, *, table: str | Path | None = None) -> Iterator[Utterance]:
    """A table of paths and transcripts (csv or tsv, as of Common Voice, audiofolder or LJSpeech), or KEY.txt beside each audio.

    table: DIR/metadata.csv or .tsv by default, where it exists. Its paths start at the directory, or at clips/ or wavs/ in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"the audio directory {str(folder)!r} does not exist: check the path")
    found = _table(folder, table)
    yield from _from_table(folder, found) if found else _from_sidecars(folder)


def count_folder(folder: str | Path, *, table: str | Path | None = None) -> int | None:
    found = _table(Path(folder), table)
    lines = count_lines(found) if found else sum(1 for _ in _audio_files(Path(folder)))
    return lines - 1 if found and lines else lines  # its header


def _table(folder: Path, table: str | Path | None) -> Path | None:
    return Path(table) if table else next((folder / name for name in TABLES if (folder / name).is_file()), None)


# --- KEY.txt beside KEY.wav ---


def _from_sidecars(folder: Path) -> Iterator[Utterance]:
    empty = True
    for path in _audio_files(folder):
        empty = False
        key = key_of(path.relative_to(folder).as_posix())
        try:
            text, problem = path.with_suffix(".txt").read_text(encoding="utf-8-sig"), None
        except FileNotFoundError:
            text, problem = "", ("no_transcript", f"{str(path.with_suffix('.txt'))!r} does not exist")
        except UnicodeDecodeError as error:
            text, problem = "", ("no_transcript", f"{str(path.with_suffix('.txt'))!r} is not UTF-8 text: {error}")
        yield Utterance(key=key, text=text, load=Stretch(path), file=path, problem=problem)
    if empty:
        raise UserError(
            f"{str(folder)!r} has neither {' nor '.join(TABLES)} nor an audio file ({', '.join(AUDIO_EXTENSIONS)}): give --table FILE"
        )


def _audio_files(folder: Path) -> Iterator[Path]:
    """In the order of their paths, at any depth."""
    for where, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if name.rpartition(".")[2].lower() in AUDIO_EXTENSIONS:
                yield Path(where, name)


# --- tables ---


def _from_table(folder: Path, table: Path) -> Iterator[Utterance]:
    first, rows = ahead(_rows(table))
    names = [name for _, name, _, _ in first]
    suffix = "" if any(_has_suffix(name) for name in names) else ".wav"  # LJSpeech writes none
    root = find_root([name + suffix for name in names], [folder / name for name in ROOTS])
    for where, name, text, row in rows:
        file = root / (name + suffix)
        yield Utterance(
            key=key_of(name + suffix),
            text=text,
            load=Stretch(file),
            duration=take_number(row, where, "duration"),
            fields=sample_fields(row),
            file=file,
        )


def _has_suffix(name: str) -> bool:
    return Path(name).suffix.lower().removeprefix(".") in AUDIO_EXTENSIONS


def _rows(path: Path) -> Iterator[tuple[str, str, str, Row]]:
    """(where, audio file, text, all columns) of each line."""
    numbered = read_lines(path, WHAT)
    number, header = next(numbered)
    delimiter = _delimiter(path, header)
    if delimiter == "|" and not _column(header.split("|"), AUDIO_COLUMNS):
        yield from _ljspeech(path, itertools.chain([(number, header)], numbered))
        return
    columns = [column.strip() for column in next(_cells([header], delimiter))]
    audio, text = (_named(path, columns, names, what) for names, what in ((AUDIO_COLUMNS, "audio"), (TEXT_COLUMNS, "text")))
    reader = _cells((line for _, line in numbered), delimiter)
    for number, cells in enumerate(reader, 2):
        if len(cells) != len(columns):
            raise UserError(
                f"{WHAT} {path}, row {number} has {len(cells)} cells, its header has {len(columns)} columns: {', '.join(columns)}"
            )
        row = dict(zip(columns, cells, strict=True))
        lowered = {name.lower(): value for name, value in row.items()}
        yield f"{WHAT} {path}, row {number}", row[audio].strip(), row[text], lowered


def _delimiter(path: Path, header: str) -> str:
    """The sign that parts the header into columns that we know; that of the file's suffix where none does."""
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    fitting = [d for d in (usual, "\t", ",", "|", ";") if _column(header.split(d), AUDIO_COLUMNS)]
    return fitting[0] if fitting else "|" if header.count("|") in (1, 2) else usual


def _cells(lines: Iterable[str], delimiter: str) -> Iterator[list[str]]:
    """Of csv, with its quotes; the others have none, so that a quotation mark is a letter there."""
    if delimiter in ",;":
        yield from csv.reader(lines, delimiter=delimiter)
    else:
        yield from (line.split(delimiter) for line in lines)


def _column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    lowered = {column.strip().strip('"').lower(): column for column in columns}
    return next((lowered[name] for name in names if name in lowered), None)


def _named(path: Path, columns: Sequence[str], names: Sequence[str], what: str) -> str:
    column = _column(columns, names)
    if column is None:
        known = f"{', '.join(names[:-1])} or {names[-1]}"
        raise UserError(f"{WHAT} {str(path)!r} has the columns {', '.join(columns)}, and none for the {what}: call it {known}")
    return column


def _ljspeech(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[str, str, str, Row]]:
    """Lines of id|text or id|text|normalised text, without a header; the last text is the one that is spoken."""
    for number, line in lines:
        name, *texts = line.split("|")
        if not texts:
            raise UserError(f"{WHAT} {path}:{number} is not 'id|text' or 'id|text|normalised text'")
        yield f"{WHAT} {path}:{number}", name.strip(), texts[-1] or texts[0], {}
