"""Kaldi data directories."""

import functools
import io
import itertools
import os
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from asrllm.data.sources.files import ahead, count_lines, find_root, read_lines
from asrllm.data.sources.utterance import RejectedError, Stretch, Utterance
from asrllm.errors import UserError

PIPE_TIMEOUT = 300  # seconds for one command of wav.scp
ARK_OFFSET = r"(?<=\.ark):(\d+)$"


def read_kaldi(folder: str | Path, *, allow_pipes: bool = False) -> Iterator[Utterance]:
    """A Kaldi data directory: wav.scp and text, optionally segments, utt2spk and utt2lang.

    wav.scp names files, entries of wav archives (FILE.ark:OFFSET) or, with allow_pipes, commands that the shell runs (`... |`). Relative
    paths start at the directory, or at the current one where the first files lie there.
    """
    folder = Path(folder)
    main = "segments" if (folder / "segments").is_file() else "wav.scp"
    keys = _read_keys(folder / main)
    texts = _Lookup(folder / "text", keys.in_order)
    others = {"speaker": "utt2spk", "lang": "utt2lang"}
    tables = {
        field: _Lookup(folder / name, keys.in_order)
        for field, name in others.items()
        if (folder / name).is_file()
    }
    for key, recording, stretch in (
        _segments(folder, allow_pipes) if main == "segments" else _whole(folder, allow_pipes)
    ):
        try:
            text = texts.pop(key) or ""
            fields = {field: table.pop(key) for field, table in tables.items()} | {
                "recording": recording
            }
            keys.check(key)
            if isinstance(stretch, RejectedError):
                raise stretch
        except RejectedError as why:
            yield Utterance(key=key, text="", problem=why.args)
            continue
        yield Utterance(
            key=key,
            text=text,
            load=stretch,
            fields={field: value for field, value in fields.items() if value},
            file=stretch.audio if main == "wav.scp" and isinstance(stretch.audio, Path) else None,
        )
    for key, text in texts.rest():
        yield Utterance(
            key=key,
            text=text,
            problem=("missing_audio", f"the text has a key that {folder}/{main} lacks"),
        )


def count_kaldi(folder: str | Path, *, allow_pipes: bool = False) -> int | None:
    segments = Path(folder) / "segments"
    return count_lines(segments if segments.is_file() else Path(folder) / "wav.scp")


# --- tables ---


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    """(key, value) of each line."""
    if not path.is_file():
        raise UserError(
            f"{str(path.parent)!r} is no Kaldi data directory: the file {path.name} is missing"
        )
    for _, line in read_lines(path, "the Kaldi table", strict=False):
        key, *value = line.split(maxsplit=1)
        yield key, value[0].strip() if value else ""


@dataclass(frozen=True)
class _Keys:
    """The keys of a table.

    Attributes:
        path: the table.
        in_order: whether they are in order, as Kaldi's are; such a table need not be held in memory.
        repeated: those that have several lines.
    """

    path: Path
    in_order: bool
    repeated: frozenset[str]

    def check(self, key: str) -> None:
        """Raise RejectedError if the table has several lines for a key, any of which may be the right one."""
        if key in self.repeated:
            raise RejectedError(
                "duplicate_key", f"{self.path} has several lines for {key!r}. Leave one."
            )


def _read_keys(path: Path) -> _Keys:
    last = ""
    in_order = True
    repeated = set()
    for key, _ in _rows(path):
        if key == last:
            repeated.add(key)
        in_order = in_order and key >= last
        last = key
    if not in_order:
        counts = Counter(key for key, _ in _rows(path))
        repeated = {key for key, count in counts.items() if count > 1}
    return _Keys(path, in_order, frozenset(repeated))


class _Lookup:
    """A table's values by key. Where it and the keys asked for are in order, it is read along with them and not held."""

    def __init__(self, path: Path, asked_in_order: bool) -> None:
        self.keys = _read_keys(path)
        self.along = self.keys.in_order and asked_in_order
        self.rows = _rows(path)
        self.held = (
            {} if self.along else dict(self.rows)
        )  # along: the rows that were passed and not asked for
        self.next = next(self.rows, None)

    def pop(self, key: str) -> str | None:
        """Return the value of a key, None if there is none. Raises RejectedError if there are several."""
        while self.next is not None and self.next[0] <= key:
            self.held[self.next[0]] = self.next[1]
            self.next = next(self.rows, None)
        value = self.held.pop(key, None)
        self.keys.check(key)
        return value

    def rest(self) -> Iterator[tuple[str, str]]:
        """What was never asked for."""
        yield from self.held.items()
        yield from itertools.chain([self.next] if self.next else [], self.rows)


# --- audio ---


def _recordings(folder: Path, allow_pipes: bool) -> Iterator[tuple[str, Stretch | RejectedError]]:
    first, rows = ahead(_rows(folder / "wav.scp"))
    files = [re.sub(ARK_OFFSET, "", value) for _, value in first if not value.endswith("|")]
    root = find_root(files, [folder, Path.cwd()])
    for key, value in rows:
        if value:
            yield key, Stretch(_audio(folder, root, key, value, allow_pipes))
        else:
            yield (
                key,
                RejectedError(
                    "missing_audio", f"{folder / 'wav.scp'}: recording {key!r} has no path"
                ),
            )


def _audio(
    folder: Path, root: Path, key: str, value: str, allow_pipes: bool
) -> "Path | _ArkEntry | _Pipe":
    where = f"{folder / 'wav.scp'}: recording {key!r}"
    if value.endswith("|"):
        if not allow_pipes:
            raise UserError(
                f"{where} is a pipe: write a file path, or let its command run with --allow-pipes if you trust it"
            )
        return _Pipe(value[:-1].strip())
    offset = re.search(ARK_OFFSET, value)
    return _ArkEntry(root / value[: offset.start()], int(offset[1])) if offset else root / value


def _whole(
    folder: Path, allow_pipes: bool
) -> Iterator[tuple[str, str | None, Stretch | RejectedError]]:
    return ((key, None, stretch) for key, stretch in _recordings(folder, allow_pipes))


def _segments(
    folder: Path, allow_pipes: bool
) -> Iterator[tuple[str, str | None, Stretch | RejectedError]]:
    """Yield (utterance, recording, its part, or why it has none)."""
    keys = _read_keys(folder / "wav.scp")
    recordings = dict(_recordings(folder, allow_pipes))
    for recording in keys.repeated:
        recordings[recording] = RejectedError(
            "duplicate_key", f"{keys.path} has several lines for {recording!r}. Leave one."
        )
    for key, value in _rows(folder / "segments"):
        try:
            recording, stretch = _segment(f"{folder / 'segments'}: {key!r}", value, recordings)
            yield key, recording, stretch
        except RejectedError as why:
            yield key, None, why


def _segment(
    where: str, value: str, recordings: Mapping[str, Stretch | RejectedError]
) -> tuple[str, Stretch]:
    try:
        recording, start, end, *channel = value.split()
        begin, finish, number = float(start), float(end), _channel(*channel)
    except (ValueError, TypeError) as error:
        form = "'recording start end' or 'recording start end channel'"
        raise RejectedError("bad_segment", f"{where} has {value!r} instead of {form}") from error
    found = recordings.get(
        recording,
        RejectedError(
            "missing_audio", f"{where} names the recording {recording!r}, which wav.scp lacks"
        ),
    )
    if isinstance(found, RejectedError):
        raise found
    to_its_end = finish == -1  # Kaldi's
    if begin < 0 or not (to_its_end or finish > begin):
        raise RejectedError(
            "bad_segment",
            f"{where} lasts from {start} to {end}: the end must lie after the start, in seconds",
        )
    return recording, Stretch(found.audio, begin, None if to_its_end else finish, number)


def _channel(text: str | None = None) -> int | None:
    """Return the channel of a segment from 0; Kaldi's tools write A and B too."""
    if text is None:
        return None
    channel = "AB".index(text) if text in ("A", "B") else int(text)
    if channel < 0:
        raise ValueError(text)
    return channel


@dataclass(frozen=True)
class _ArkEntry:
    """A wav in an archive of Kaldi's `wav-copy`, from its first byte on."""

    path: Path
    offset: int

    def __call__(self) -> BinaryIO:
        if not os.path.exists(self.path):
            raise RejectedError("missing_audio", f"{str(self.path)!r} does not exist")
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            header = file.read(8)  # RIFF and the number of the bytes that follow
            left = os.fstat(file.fileno()).st_size - file.tell()
            if header[:4] != b"RIFF":
                raise RejectedError(
                    "unreadable_audio", f"no wav begins at {self.path}:{self.offset}"
                )
            return io.BytesIO(header + file.read(min(int.from_bytes(header[4:], "little"), left)))


@dataclass(frozen=True)
class _Pipe:
    """What a command writes to its standard output."""

    command: str

    def __call__(self) -> BinaryIO:
        return io.BytesIO(run_command(self.command))


@functools.lru_cache(maxsize=1)  # the segments of one recording follow each other
def run_command(command: str) -> bytes:
    """Return what a shell command writes to its standard output.

    Raises:
        RejectedError: the command fails, or runs for longer than PIPE_TIMEOUT.
    """
    process = subprocess.Popen(
        command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    with process:
        try:
            output, errors = process.communicate(timeout=PIPE_TIMEOUT)
        except BaseException as error:
            os.killpg(
                process.pid, signal.SIGKILL
            )  # the shell's children too, which hold the pipe open
            if isinstance(error, subprocess.TimeoutExpired):
                raise RejectedError(
                    "failed_pipe", f"{command!r} gave no end within {PIPE_TIMEOUT} s"
                ) from error
            raise
    if process.returncode:
        last = (errors.decode("utf-8", "replace").strip().splitlines() or ["it says nothing"])[-1]
        raise RejectedError("failed_pipe", f"{command!r} ended with {process.returncode}: {last}")
    return output
