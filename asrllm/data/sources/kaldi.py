"""Kaldi data directories."""

import functools
import io
import itertools
import os
import re
import selectors
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from asrllm.data.sources.files import (
    LONGEST_RECORDING,
    check_audio_name,
    check_line_ends,
    count_lines,
    find_root,
    peek,
    read_lines,
)
from asrllm.data.sources.utterance import AudioSegment, RejectedError, Utterance
from asrllm.errors import UserError
from asrllm.text_files import check_link, open_regular

PIPE_TIMEOUT = 300  # seconds for one command of wav.scp
# Bytes that a command may write. Every worker holds them in memory. They are 9 h of 16 kHz mono
# with 16 bits, or 1.5 h of 48 kHz stereo.
MAX_PIPE_OUTPUT = 1 << 30
PIPE_BLOCK = 1 << 16  # bytes, the capacity of a pipe on Linux
SHOWN_ERRORS = 4096  # last bytes of a command's standard error, whose last line is shown
# Run the command $1, and kill its process group when standard input ends. The other end of that
# pipe is in the process that runs this script, so it also ends when that process is killed.
WATCHED = """
exec 3<&0 </dev/null
{ read -r _ <&3; kill -KILL 0; } >/dev/null 2>&1 &
watcher=$!
/bin/sh -c "$1" 3<&-
status=$?
kill -KILL "$watcher"
wait "$watcher" 2>/dev/null
exit "$status"
"""
ARK_OFFSET = r"(?<=\.ark):(\d+)$"
OPTIONAL_TABLES = {"speaker": "utt2spk", "lang": "utt2lang"}  # field of a sample: table
ROLE = "the Kaldi table"
SPACES = re.compile(r"[ \t\f\v]+")  # those of Kaldi without carriage returns, which merge lines
# an utterance's key, its recording if it is a segment, and its audio or why it has none
KaldiEntry = tuple[str, str | None, AudioSegment | RejectedError]


def read_kaldi(folder: str | Path, *, allow_pipes: bool = False) -> Iterator[Utterance]:
    """Yield the utterances of a Kaldi data directory.

    The directory has wav.scp and text, and optionally segments, utt2spk and utt2lang. Relative
    paths in wav.scp start at the directory, or at the current one if the first files are there.

    Args:
        folder: the directory.
        allow_pipes: run the shell commands (`... |`) of wav.scp. Without it, wav.scp may name only
            files, and entries of wav archives (FILE.ark:OFFSET).

    Raises:
        UserError: a table is missing or invalid, or a pipe is not allowed.
    """
    folder = Path(folder)
    has_segments = (folder / "segments").exists()
    main = folder / ("segments" if has_segments else "wav.scp")
    keys = _read_keys(main)
    texts = _Lookup(folder / "text", keys.in_order)
    tables = {
        field: _Lookup(folder / name, keys.in_order)
        for field, name in OPTIONAL_TABLES.items()
        if (folder / name).exists()
    }
    entries = _segments(folder, allow_pipes) if has_segments else _whole(folder, allow_pipes)
    for entry in entries:
        try:
            yield _kaldi_utterance(entry, keys, texts, tables)
        except RejectedError as error:
            yield Utterance(
                key=entry[0],
                text="",
                problem=error.args,
            )
    for key, text in texts.rest():
        problem = ("missing_audio", f"the text has a key that {main} does not have")
        yield Utterance(key=key, text=text, problem=problem)


def _kaldi_utterance(
    entry: KaldiEntry, keys: "_Keys", texts: "_Lookup", tables: Mapping[str, "_Lookup"]
) -> Utterance:
    key, recording, audio = entry
    text = texts.pop(key) or ""
    fields = {field: table.pop(key) for field, table in tables.items()}
    fields["recording"] = recording
    keys.check(key)
    if isinstance(audio, RejectedError):
        raise audio
    file = None
    if recording is None and isinstance(audio.audio, Path):
        file = audio.audio
    return Utterance(
        key=key,
        text=text,
        load=audio,
        fields={field: value for field, value in fields.items() if value},
        file=file,
    )


def count_kaldi(folder: str | Path, *, allow_pipes: bool = False) -> int | None:
    """Return the number of utterances, or None if it cannot be read."""
    segments = Path(folder) / "segments"
    return count_lines(segments if segments.exists() else Path(folder) / "wav.scp")


# --- tables ---


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (key, value) of each line of a table."""
    if not path.exists():
        for place in (path.parent, path):
            check_link(place)
        raise UserError(
            f"{str(path.parent)!r} is not a Kaldi data directory: it has no file {path.name}. "
            "Give the directory with wav.scp and text."
        )
    lines = read_lines(path, ROLE, strict=False)
    first = next(lines)
    check_line_ends(first[1], path, ROLE)
    for _, line in itertools.chain([first], lines):
        key, *value = SPACES.split(line.strip(), 1)
        yield key, value[0] if value else ""


@dataclass(frozen=True)
class _Keys:
    """The keys of a table.

    Attributes:
        path: the table.
        in_order: whether they are sorted, as Kaldi requires. A sorted table need not be held in
            memory.
        repeated: those that have several lines.
    """

    path: Path
    in_order: bool
    repeated: frozenset[str]

    def check(self, key: str) -> None:
        """Raise RejectedError if a key has several lines, any of which may be the right one."""
        if key in self.repeated:
            raise _repeated_key(self.path, key)


def _repeated_key(path: Path, key: str) -> RejectedError:
    return RejectedError(
        "duplicate_key", f"{path} has several lines for {key!r}. Remove all but one."
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
    """The values of a table by key.

    If the table and the requested keys are sorted, it is read in step with the requests, and is
    not held in memory.
    """

    def __init__(self, path: Path, requests_in_order: bool) -> None:
        self.keys = _read_keys(path)
        self.rows = _rows(path)
        self.held: dict[str, str] = {}  # rows that were read and not requested
        if not (self.keys.in_order and requests_in_order):
            self.held = dict(self.rows)
        self.next = next(self.rows, None)

    def pop(self, key: str) -> str | None:
        """Return the value of a key, or None if it has no line.

        Raises:
            RejectedError: the key has several lines, or a line that may be several.
        """
        while self.next is not None and self.next[0] <= key:
            self.held[self.next[0]] = self.next[1]
            self.next = next(self.rows, None)
        value = self.held.pop(key, None)
        self.keys.check(key)
        if value is not None and "\r" in value:
            path = self.keys.path
            raise RejectedError(
                "bad_row", f"{path} has a carriage return within the line of {key!r}. Remove it"
            )
        return value

    def rest(self) -> Iterator[tuple[str, str]]:
        """Yield the rows that were never requested."""
        yield from self.held.items()
        if self.next is not None:
            yield from itertools.chain([self.next], self.rows)


# --- audio ---


def _recordings(
    folder: Path, allow_pipes: bool
) -> Iterator[tuple[str, AudioSegment | RejectedError]]:
    """Yield (key, audio or why it has none) of wav.scp."""
    first, rows = peek(_rows(folder / "wav.scp"))
    files = [re.sub(ARK_OFFSET, "", value) for _, value in first if not value.endswith("|")]
    root = find_root(files, [folder, Path.cwd()])
    for key, value in rows:
        where = f"{folder / 'wav.scp'}: recording {key!r}"
        try:
            audio = _audio_source(where, root, value, allow_pipes)
        except RejectedError as error:
            yield key, error
        else:
            yield key, AudioSegment(audio)


def _audio_source(
    where: str,
    root: Path,
    value: str,
    allow_pipes: bool,
) -> "Path | _ArkEntry | _Pipe":
    if value.endswith("|"):
        if not allow_pipes:
            raise RejectedError(
                "not_allowed",
                f"{where} is a pipe. Use a file path, "
                "or run its command with --allow-pipes if you trust it",
            )
        return _Pipe(value[:-1].strip())
    check_audio_name(value, where)
    offset = re.search(ARK_OFFSET, value)
    if offset:
        return _ArkEntry(root / value[: offset.start()], int(offset[1]))
    return root / value


def _whole(folder: Path, allow_pipes: bool) -> Iterator[KaldiEntry]:
    """Yield the entries of a directory without segments."""
    for key, audio in _recordings(folder, allow_pipes):
        yield key, None, audio


def _segments(folder: Path, allow_pipes: bool) -> Iterator[KaldiEntry]:
    """Yield the entries of a directory with segments."""
    keys = _read_keys(folder / "wav.scp")
    recordings = dict(_recordings(folder, allow_pipes))
    for recording in keys.repeated:
        recordings[recording] = _repeated_key(keys.path, recording)
    for key, value in _rows(folder / "segments"):
        try:
            recording, segment = _segment(f"{folder / 'segments'}: {key!r}", value, recordings)
            yield key, recording, segment
        except RejectedError as error:
            yield key, None, error


def _segment(
    where: str, value: str, recordings: Mapping[str, AudioSegment | RejectedError]
) -> tuple[str, AudioSegment]:
    """Return the recording and the audio of a line of `segments`."""
    try:
        recording, start_text, end_text, *channel_text = value.split()
        start = float(start_text)
        end = float(end_text)
        channel = _channel(*channel_text)
    except (ValueError, TypeError) as error:
        form = "'recording start end' or 'recording start end channel'"
        raise RejectedError("bad_segment", f"{where} has {value!r} instead of {form}") from error
    whole = _whole_recording(recordings, recording, where)
    if not 0 <= start < LONGEST_RECORDING:
        problem = f"{where} starts at {start_text} s, which is not a time in a recording"
        raise RejectedError("bad_segment", problem)
    if end == -1:  # in Kaldi, -1 means the end of the recording
        return recording, AudioSegment(whole.audio, start, None, channel)
    if not start < end < LONGEST_RECORDING:
        problem = f"{where} spans {start_text} to {end_text} s, but its end must follow its start"
        raise RejectedError("bad_segment", problem)
    return recording, AudioSegment(whole.audio, start, end, channel)


def _whole_recording(
    recordings: Mapping[str, AudioSegment | RejectedError], name: str, where: str
) -> AudioSegment:
    """Return a recording, or raise RejectedError if it is missing or cannot be used."""
    whole = recordings.get(name)
    if whole is None:
        problem = f"{where} names the recording {name!r}, which wav.scp does not have"
        raise RejectedError("missing_audio", problem)
    if isinstance(whole, RejectedError):
        raise whole
    return whole


def _channel(text: str | None = None) -> int | None:
    """Return the channel of a segment, counted from 0. Kaldi's tools also write A and B."""
    if text is None:
        return None
    channel = "AB".index(text) if text in ("A", "B") else int(text)
    if channel < 0:
        raise ValueError(text)
    return channel


@dataclass(frozen=True)
class _ArkEntry:
    """A function that opens a wav in an archive of Kaldi's `wav-copy`.

    Attributes:
        path: the archive.
        offset: first byte of the wav.
    """

    path: Path
    offset: int

    def __call__(self) -> BinaryIO:
        if not os.path.exists(self.path):
            raise RejectedError("missing_audio", f"{str(self.path)!r} does not exist")
        with open_regular(self.path, "the archive") as file:
            file.seek(self.offset)
            header = file.read(8)  # RIFF, and the number of bytes that follow
            if header[:4] != b"RIFF":
                problem = f"there is no wav at {self.path}:{self.offset}"
                raise RejectedError("unreadable_audio", problem)
            remaining = os.fstat(file.fileno()).st_size - file.tell()
            size = min(int.from_bytes(header[4:], "little"), remaining)
            return io.BytesIO(header + file.read(size))


@dataclass(frozen=True)
class _Pipe:
    """A function that opens the standard output of a command."""

    command: str

    def __call__(self) -> BinaryIO:
        return io.BytesIO(run_command(self.command))


@functools.lru_cache(maxsize=1)  # the segments of a recording usually follow each other
def run_command(command: str) -> bytes:
    """Return what a shell command writes to its standard output.

    The command and its children are killed when it fails, and when this process is killed.

    Raises:
        RejectedError: the command fails, runs for longer than PIPE_TIMEOUT, or writes more than
            MAX_PIPE_OUTPUT.
    """
    process = subprocess.Popen(
        ["/bin/sh", "-c", WATCHED, "sh", command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    with process:
        try:
            output, errors = _collect(process)
        except BaseException as error:
            # also kill the shell's children, which hold the pipe open
            os.killpg(process.pid, signal.SIGKILL)
            problem = _pipe_problem(error)
            if problem:
                raise RejectedError("failed_pipe", f"{command!r} {problem}") from error
            raise
    if process.returncode:
        lines = errors.decode("utf-8", "replace").strip().splitlines()
        message = lines[-1] if lines else "it printed no error"
        raise RejectedError(
            "failed_pipe", f"{command!r} failed with status {process.returncode}: {message}"
        )
    return output


class _TooMuchOutputError(Exception):
    """A command writes more than MAX_PIPE_OUTPUT."""


def _pipe_problem(error: BaseException) -> str:
    """Return why a command was killed, or "" for an error that is not the command's."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"did not end within {PIPE_TIMEOUT} s"
    if isinstance(error, _TooMuchOutputError):
        limit = f"{MAX_PIPE_OUTPUT >> 20} MiB"
        return f"writes more than {limit}. Write the recording to a file, and name the file"
    return ""


def _collect(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """Wait for a process, and return its standard output and the end of its standard error.

    Raises:
        subprocess.TimeoutExpired: the process or its children did not end within PIPE_TIMEOUT.
        _TooMuchOutputError: there is more output than MAX_PIPE_OUTPUT.
    """
    deadline = time.monotonic() + PIPE_TIMEOUT
    output = io.BytesIO()
    errors = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
        selector.register(process.stderr, selectors.EVENT_READ)  # type: ignore[arg-type]
        while selector.get_map():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise subprocess.TimeoutExpired(process.args, PIPE_TIMEOUT)
            for key, _ in selector.select(remaining):
                content = os.read(key.fd, PIPE_BLOCK)
                if not content:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stderr:
                    errors = (errors + content)[-SHOWN_ERRORS:]
                elif output.tell() + len(content) > MAX_PIPE_OUTPUT:
                    raise _TooMuchOutputError
                else:
                    output.write(content)
    process.wait(max(deadline - time.monotonic(), 0))
    return output.getvalue(), errors  # CPython returns the buffer itself, not a copy
