"""Audio files of any length and format, in blocks at 16 kHz; what is wrong with one is a sentence."""

import contextlib
import logging
import mmap
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import soundfile
import soxr

from asrllm.audio.headers import mp3_problem, sphere_problem, wav_problem, with_unknown_size
from asrllm.defaults import AUDIO_EXTENSIONS, RATE
from asrllm.errors import UserError
from asrllm.text_files import parse_json

BLOCK = 1 << 16  # samples of each channel, at the file's own rate
FORMATS = (
    "wav",
    "flac",
    "mp3",
    "ogg",
    "opus",
    "aiff",
    "au",
    "caf",
    "w64",
)  # that soundfile reads, the best known
MISSING = 0.1  # seconds that may be missing at a file's end: encoders round
OVERSHOOT = 0.5  # seconds beyond the end of a file that a part may reach and lose, as in Kaldi's extract-segments
LOCAL_ONLY = ("-protocol_whitelist", "file")  # a playlist would have ffmpeg open URLs
PROBLEMS = {
    "MP3": mp3_problem,
    "MPEG": mp3_problem,
    "NIST": sphere_problem,
    "WAV": wav_problem,
    "WAVEX": wav_problem,
}
SHOWN_SKIPPED = 5  # names of skipped files in a warning
LOUDEST = 1000.0  # times full scale; more is no audio between -1 and 1
UNKNOWN_SIZE = 0x7FFF0000  # bytes; what is written for the size of a stream whose length was not known is larger
NO_LENGTH = 1 << 40  # samples; libsndfile gives more for a file that does not say how many it has
SOUND_PAGE = re.compile(rb"OggS\0[\0\1\4\5](?!\0{8})")  # samples end in it
FIRST_PAGE = re.compile(rb"OggS\0[\2\6]\0{8}")  # of a stream
CUT_SHORT = re.compile(
    r":\s*(\d+) \(should be (\d+)\)"
)  # libsndfile's log of a header that promises more bytes than there are
logger = logging.getLogger(__name__)


class OutsideError(UserError):
    """A part of a file is not in it."""


@dataclass(frozen=True, kw_only=True)
class AudioFile:
    """An audio file whose header has been read.

    Attributes:
        path: the file, or the name of `content` in messages.
        seconds: its length as the header says, None where it does not.
        decoder: "soundfile" or "ffmpeg".
        content: the bytes of a file that is not on disk.
    """

    path: str
    seconds: float | None
    decoder: str = "soundfile"
    content: bytes | None = None

    def wrong(self, problem: str) -> UserError:
        return UserError(f"the audio file {self.path!r} {problem}")

    @contextlib.contextmanager
    def open_sound(self) -> Iterator[soundfile.SoundFile]:
        with contextlib.ExitStack() as stack:
            source: Any = self.path
            if self.content is not None:
                source = BytesIO(self.content)
            elif not is_utf8(self.path):  # soundfile refuses such a name
                source = stack.enter_context(open(self.path, "rb"))
            yield stack.enter_context(soundfile.SoundFile(source))

    @contextlib.contextmanager
    def open_bytes(self) -> Iterator["bytes | mmap.mmap"]:
        if self.content is not None:
            yield self.content
            return
        with (
            open(self.path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            yield mapped

    @contextlib.contextmanager
    def on_disk(self) -> Iterator[str]:
        """Yield a path for ffmpeg, which cannot seek in a pipe."""
        if self.content is None:
            yield self.path
            return
        with tempfile.NamedTemporaryFile(prefix="asrllm-") as file:
            file.write(self.content)
            file.flush()
            yield file.name


def is_utf8(name: str) -> bool:
    """Whether a file name is UTF-8; Python stands for the bytes of others by lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def find_audio(paths: Sequence[str]) -> list[str]:
    """Return the files, and the audio files below the directories, sorted. Files that are skipped are named in a warning.

    Raises:
        UserError: a directory has no audio file.
    """
    files: list[str] = []
    for path in paths:
        if not os.path.isdir(path):
            files.append(path)
            continue
        found, skipped = list_audio(path)
        if not found:
            raise UserError(
                f"the directory {path!r} holds no audio file ({', '.join(FORMATS)}, m4a, mp4, ...): give another"
            )
        warn_of_skipped(path, skipped)
        files += sorted(map(str, found))
    return files


def list_audio(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """List the files below a directory.

    Returns:
        The audio files, and the files that are neither audio nor belong to an audio file of the same
        name. Hidden files, such as macOS's notes about a file, are in neither.
    """
    audio: list[Path] = []
    others: list[Path] = []
    visited = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        visited.add(os.path.realpath(where))
        folders[:] = sorted(
            name for name in folders if os.path.realpath(Path(where, name)) not in visited
        )
        paths = [Path(where, name) for name in sorted(names) if not name.startswith(".")]
        found = [path for path in paths if has_audio_extension(path.name) and not path.is_fifo()]
        stems = {path.stem for path in found}
        audio += found
        others += [path for path in paths if path.stem not in stems]
    return audio, others


def has_audio_extension(name: str) -> bool:
    return name.rpartition(".")[2].lower() in AUDIO_EXTENSIONS


def warn_of_skipped(folder: str | Path, skipped: Sequence[Path]) -> None:
    """Warn of the files of a directory that are skipped because their names end in no audio extension."""
    if not skipped:
        return
    names = ", ".join(str(path.relative_to(folder)) for path in skipped[:SHOWN_SKIPPED])
    more = ", ..." if len(skipped) > SHOWN_SKIPPED else ""
    logger.warning(
        "%d files in %s are skipped, which do not end like audio: %s%s",
        len(skipped),
        folder,
        names,
        more,
    )


def open_audio(path: str, content: bytes | None = None) -> AudioFile:
    """Read the header of an audio file.

    Args:
        path: a file, a FIFO, or "-" for standard input; the latter two are read into memory.
        content: the bytes of a file that is not on disk, which `path` then only names.

    Raises:
        UserError: there is nothing to read, or less than the header promises.
    """
    try:
        if content is None:
            content = _streamed(path)
        size = os.stat(path).st_size if content is None else len(content)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"the audio file {path!r} cannot be read: {error}") from error
    file = AudioFile(path=path, seconds=None, content=content)
    if not size:
        raise file.wrong("is empty, 0 bytes: copy it again")
    if path.lower().endswith(".raw"):
        raise file.wrong(
            "is raw, so nothing says its sampling rate or its encoding. Convert it: sox -t raw -r 16000 -e signed -b 16 IN.raw OUT.wav"
        )
    try:
        with file.open_sound() as sound:
            found = replace(file, seconds=sound.frames / sound.samplerate)
            sound_format, log = sound.format, sound.extra_info
            guessed = length_is_guessed(file, sound)
    except (OSError, RuntimeError) as error:
        if "malformed" in str(error):
            raise file.wrong(f"is damaged ({said(error)}): copy it again") from error
        return open_by_ffmpeg(file, said(error))
    if guessed:
        return replace(open_by_ffmpeg(file, guessed), seconds=None)
    if not found.seconds and sound_format in ("WAV", "WAVEX"):
        with file.open_bytes() as whole:
            streamed = with_unknown_size(whole)
        if streamed is not None:
            return open_audio(path, streamed)
    if not found.seconds:
        raise found.wrong("holds no sample: copy it again")
    if sound_format in PROBLEMS:
        with file.open_bytes() as whole:
            problem = PROBLEMS[sound_format](whole)
        if problem:
            raise found.wrong(problem)
    for promised, there in CUT_SHORT.findall(log):
        if int(there) < int(promised) < UNKNOWN_SIZE:
            raise found.wrong(
                f"is cut short, its header promises {promised} bytes and {there} are there: copy it again"
            )
    return found


def _streamed(path: str) -> bytes | None:
    """Return the content of what cannot be read twice, None for a file."""
    if path == "-":
        return sys.stdin.buffer.read()
    if stat.S_ISFIFO(os.stat(path).st_mode):
        return Path(path).read_bytes()
    return None


def said(error: Exception) -> str:
    """Return what a decoder complains of, without the address of the buffer that it read from."""
    return str(getattr(error, "error_string", error))


def length_is_guessed(file: AudioFile, sound: soundfile.SoundFile) -> str:
    """Why soundfile, which reads to the length that it believes in, may end too soon; "" where the file says its length."""
    if sound.format in ("MP3", "MPEG") and not says_its_frames(file):
        return "an MP3 without a count of its frames is read wholly by ffmpeg alone"
    if sound.format == "FLAC" and not 0 < sound.frames < NO_LENGTH:
        return "a FLAC without a count of its samples is read by ffmpeg alone"
    if sound.format == "OGG" and is_chained(file):
        return "an Ogg file of several recordings one after another is read wholly by ffmpeg alone"
    return ""


def says_its_frames(file: AudioFile) -> bool:
    """Whether an MP3 begins, behind an ID3 tag, with the frame that counts the others (Xing's, LAME's or Fraunhofer's)."""
    with file.open_bytes() as content:
        tag = 0
        if content[:3] == b"ID3":
            for byte in content[6:10]:  # four times seven bits
                tag = tag << 7 | byte
            tag += 10
        first = content[tag : tag + (1 << 12)]
    return any(name in first for name in (b"Xing", b"Info", b"VBRI"))


def is_chained(file: AudioFile) -> bool:
    """Whether another stream begins in an Ogg file where the first has had its sound (RFC 3533)."""
    with file.open_bytes() as pages:
        sound = SOUND_PAGE.search(pages)
        return sound is not None and FIRST_PAGE.search(pages, sound.end()) is not None


def open_by_ffmpeg(file: AudioFile, error: str) -> AudioFile:
    """Read the header with ffprobe.

    Args:
        file: the file.
        error: why soundfile does not read it.
    """
    if not shutil.which("ffmpeg") or not shutil.which("ffprobe"):
        raise file.wrong(
            f"cannot be read ({error}): read are {', '.join(FORMATS)}, and with ffmpeg, which is not on PATH, also m4a, mp4, webm and more"
        )
    fields = (
        "-select_streams",
        "a:0",
        "-show_entries",
        "stream=codec_name,duration:format=format_name,nb_streams,duration",
        "-of",
        "json",
    )
    with file.on_disk() as path:
        command = ["ffprobe", "-v", "error", *LOCAL_ONLY, *fields, f"file:{path}"]
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    found = parse_json(done.stdout or b"{}")
    if done.returncode or not found.get("streams"):
        raise file.wrong(
            f"cannot be read ({error}), and ffmpeg finds no audio in it: give an audio file"
        )
    return replace(
        file, seconds=_promised(found["streams"][0], found.get("format", {})), decoder="ffmpeg"
    )


def _promised(stream: dict[str, Any], container: dict[str, Any]) -> float | None:
    """The seconds of sound that a file says it has; a container lasts as long as the longest of what is in it, such as a picture."""
    if (
        container.get("format_name") == "aac"
    ):  # has no header: ffprobe guesses from the first bitrate
        return None
    seconds = stream.get("duration") or (
        container.get("duration") if container.get("nb_streams") == 1 else None
    )
    return float(seconds) if seconds else None


def read_blocks(file: AudioFile) -> Iterator[np.ndarray]:
    """(samples,) float32 mono at RATE, block after block; channels are averaged.

    Raises UserError where the file is damaged, ends before its header says, or holds what is no sound.
    """
    samples = 0
    for block in _by_ffmpeg(file) if file.decoder == "ffmpeg" else _by_soundfile(file):
        loudest = np.abs(block).max(initial=0)
        if not np.isfinite(loudest):
            at = samples + int(np.isfinite(block).argmin())
            raise file.wrong(f"holds NaN or infinite values at {at / RATE:.2f} s: write it anew")
        if loudest > LOUDEST:
            raise file.wrong(
                f"holds samples as large as {loudest:.3g}: scale them to lie from -1 to 1"
            )
        samples += len(block)
        yield block
    if not samples:
        raise file.wrong("holds no sample: copy it again")
    if file.seconds and samples / RATE < file.seconds - MISSING:
        raise file.wrong(
            f"is damaged, it ends after {samples / RATE:.1f} s of {file.seconds:.1f} s: copy it again"
        )


def read_stretch(
    file: AudioFile, start: float = 0.0, end: float | None = None
) -> tuple[np.ndarray, int]:
    """Read a part of a file at its own sampling rate, with all channels.

    Args:
        file: what `open_audio` returned.
        start: in seconds.
        end: in seconds; None reads to the end of the file.

    Returns:
        Samples (samples, channels) as float32, and the sampling rate in Hz.

    Raises:
        UserError: the file is corrupted, ends before its header says, or the part is not in it.
    """
    if file.decoder == "ffmpeg":
        whole = np.concatenate([np.zeros(0, np.float32), *_by_ffmpeg(file)])[:, None]
        rate, length = RATE, len(whole)
        if file.seconds and length / RATE < file.seconds - MISSING:
            raise file.wrong(
                f"is damaged, it ends after {length / RATE:.1f} s of {file.seconds:.1f} s: copy it again"
            )
        begin, stop = _frames_of(file, start, end, rate, length)
        wave = whole[begin:stop]
    else:
        try:
            with file.open_sound() as sound:
                rate = sound.samplerate
                begin, stop = _frames_of(file, start, end, rate, sound.frames)
                if begin and sound.seekable():
                    sound.seek(begin)
                elif begin:
                    _read_frames(sound, begin)
                wave = _read_frames(sound, stop - begin)
        except (OSError, RuntimeError) as error:
            raise file.wrong(f"is damaged ({said(error)}): copy it again") from error
        if len(wave) < stop - begin - MISSING * rate:
            promised = f"{(stop - begin) / rate:.1f} s"
            raise file.wrong(
                f"is cut short: it has {len(wave) / rate:.1f} s of {promised}. Copy it again."
            )
    loudest = np.abs(wave).max(initial=0)
    if np.isfinite(loudest) and loudest > LOUDEST:
        raise file.wrong(f"holds samples as large as {loudest:.3g}: scale them to lie from -1 to 1")
    return wave, rate


def _frames_of(
    file: AudioFile, start: float, end: float | None, rate: int, frames: int
) -> tuple[int, int]:
    """Return the first frame of a part and the one behind its last."""
    begin = round(start * rate)
    stop = frames if end is None else round(end * rate)
    if begin > frames or stop > frames + OVERSHOOT * rate:
        part = f"{start:.3f} s to {stop / rate:.3f} s"
        length = f"{frames / rate:.3f} s"
        raise OutsideError(f"the audio file {file.path!r} has {length}, so {part} is not in it")
    return begin, min(stop, frames)


def _read_frames(sound: soundfile.SoundFile, count: int) -> np.ndarray:
    """Read at most `count` frames, block by block: a corrupted header may promise any number."""
    blocks = [np.zeros((0, sound.channels), np.float32)]
    while count > 0 and len(
        block := sound.read(min(count, BLOCK), dtype="float32", always_2d=True)
    ):
        blocks.append(block)
        count -= len(block)
    return np.concatenate(blocks)


def check_end(file: AudioFile) -> None:
    """Read the last tenth of a second, without the rest.

    Raises:
        UserError: the file is cut short.
    """
    if file.decoder == "soundfile" and file.seconds:
        read_stretch(file, max(file.seconds - MISSING, 0.0))


def _by_soundfile(file: AudioFile) -> Iterator[np.ndarray]:
    try:
        with file.open_sound() as opened:
            rate = opened.samplerate
            resampler = (
                soxr.ResampleStream(rate, RATE, 1, dtype="float32") if rate != RATE else None
            )
            while len(block := opened.read(BLOCK, dtype="float32", always_2d=True)):
                mono = block[:, 0] if block.shape[1] == 1 else block.mean(1)
                yield resampler.resample_chunk(mono) if resampler else mono
            if resampler:
                yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
    except (OSError, RuntimeError) as error:
        raise file.wrong(f"is damaged ({said(error)}): copy it again") from error


def _by_ffmpeg(file: AudioFile) -> Iterator[np.ndarray]:
    output = ["-f", "f32le", "-ac", "1", "-ar", str(RATE), "-"]
    with file.on_disk() as path, tempfile.TemporaryFile() as log:
        command = ["ffmpeg", "-nostdin", "-v", "error", *LOCAL_ONLY, "-i", f"file:{path}", *output]
        yield from _output_of(command, file, log)


def _output_of(command: list[str], file: AudioFile, log: IO[bytes]) -> Iterator[np.ndarray]:
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        try:
            while data := process.stdout.read(4 * BLOCK):
                yield np.frombuffer(data[: len(data) // 4 * 4], "<f4")
        except GeneratorExit:  # the reader wants no more
            process.kill()
            raise
        if process.wait():
            log.seek(0)
            lines = log.read().decode(errors="replace").split("\n")
            raise file.wrong(f"is damaged (ffmpeg: {lines[0][:200]}): copy it again")
