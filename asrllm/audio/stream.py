"""Audio files of any length and format, in blocks at 16 kHz; what is wrong with one is a sentence."""

import mmap
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from asrllm.data.index import AUDIO_EXTENSIONS, RATE
from asrllm.errors import UserError
from asrllm.text_files import parse_json

BLOCK = 1 << 16  # samples of each channel, at the file's own rate
FORMATS = ("wav", "flac", "mp3", "ogg", "opus", "aiff", "au", "caf", "w64")  # that soundfile reads, the best known
# by which files of a directory are taken
ENDINGS = {*AUDIO_EXTENSIONS, *FORMATS, "oga", "aif", "aifc", "m4a", "mp4", "aac", "webm", "mkv", "mov", "wma", "amr", "3gp"}
MISSING = 0.1  # seconds that may be missing at a file's end: encoders round
LOUDEST = 1000.0  # times full scale; more is no audio between -1 and 1
UNKNOWN_SIZE = 0x7FFF0000  # bytes; what is written for the size of a stream whose length was not known is larger
NO_LENGTH = 1 << 40  # samples; libsndfile gives more for a file that does not say how many it has
SOUND_PAGE = re.compile(rb"OggS\0[\0\1\4\5](?!\0{8})")  # samples end in it
FIRST_PAGE = re.compile(rb"OggS\0[\2\6]\0{8}")  # of a stream
CUT_SHORT = re.compile(r":\s*(\d+) \(should be (\d+)\)")  # libsndfile's log of a header that promises more bytes than there are


@dataclass(frozen=True, kw_only=True)
class AudioFile:
    """seconds: as the header says, None where it does not. decoder: "soundfile" or "ffmpeg"."""

    path: str
    seconds: float | None
    decoder: str = "soundfile"

    def wrong(self, problem: str) -> UserError:
        return UserError(f"the audio file {self.path!r} {problem}")


def find_audio(paths: Sequence[str]) -> list[str]:
    """The files, and the audio files below the directories, sorted. Raises UserError for a directory without any."""
    files: list[str] = []
    for path in paths:
        found = sorted(map(str, filter(is_audio, Path(path).rglob("*")))) if os.path.isdir(path) else [path]
        if not found:
            raise UserError(f"the directory {path!r} holds no audio file ({', '.join(FORMATS)}, m4a, mp4, ...): give another")
        files += found
    return files


def is_audio(path: Path) -> bool:
    """By its name; hidden files are something else, such as macOS's notes about a file."""
    return path.suffix.lower().removeprefix(".") in ENDINGS and not path.name.startswith(".") and path.is_file()


def open_audio(path: str) -> AudioFile:
    """Reads the header alone. Raises UserError where there is nothing to read, or less than it promises."""
    try:
        size = os.stat(path).st_size
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"the audio file {path!r} cannot be read: {error}") from error
    if not size:
        raise UserError(f"the audio file {path!r} is empty, 0 bytes: copy it again")
    try:
        with soundfile.SoundFile(path) as file:
            found = AudioFile(path=path, seconds=file.frames / file.samplerate)
            log, guessed = file.extra_info, length_is_guessed(path, file)
    except (OSError, RuntimeError, TypeError) as error:  # TypeError: .raw without a rate
        if "malformed" in str(error):
            raise UserError(f"the audio file {path!r} is damaged ({error}): copy it again") from error
        return open_by_ffmpeg(path, str(error))
    if guessed:
        return replace(open_by_ffmpeg(path, guessed), seconds=None)
    if not found.seconds:
        raise found.wrong("holds no sample: copy it again")
    for promised, there in CUT_SHORT.findall(log):
        if int(there) < int(promised) < UNKNOWN_SIZE:
            raise found.wrong(f"is cut short, its header promises {promised} bytes and {there} are there: copy it again")
    return found


def length_is_guessed(path: str, file: soundfile.SoundFile) -> str:
    """Why soundfile, which reads to the length that it believes in, may end too soon; "" where the file says its length."""
    if file.format in ("MP3", "MPEG") and not says_its_frames(Path(path)):
        return "an MP3 without a count of its frames is read wholly by ffmpeg alone"
    if file.format == "FLAC" and not 0 < file.frames < NO_LENGTH:
        return "a FLAC without a count of its samples is read by ffmpeg alone"
    if file.format == "OGG" and is_chained(Path(path)):
        return "an Ogg file of several recordings one after another is read wholly by ffmpeg alone"
    return ""


def says_its_frames(path: Path) -> bool:
    """Whether an MP3 begins, behind an ID3 tag, with the frame that counts the others (Xing's, LAME's or Fraunhofer's)."""
    with path.open("rb") as file:
        head = file.read(10)
        tag = 0
        if head[:3] == b"ID3":
            for byte in head[6:10]:  # four times seven bits
                tag = tag << 7 | byte
            tag += 10
        file.seek(tag)
        first = file.read(1 << 12)
    return any(name in first for name in (b"Xing", b"Info", b"VBRI"))


def is_chained(path: Path) -> bool:
    """Whether another stream begins in an Ogg file where the first has had its sound (RFC 3533)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        sound = SOUND_PAGE.search(pages)
        return sound is not None and FIRST_PAGE.search(pages, sound.end()) is not None


def open_by_ffmpeg(path: str, error: str) -> AudioFile:
    """error: why soundfile does not read it."""
    if not shutil.which("ffmpeg") or not shutil.which("ffprobe"):
        raise UserError(
            f"the audio file {path!r} cannot be read ({error}): read are {', '.join(FORMATS)}, and with ffmpeg, which is not on PATH, "
            "also m4a, mp4, webm and more"
        )
    fields = ("-select_streams", "a:0", "-show_entries", "stream=codec_name,duration:format=format_name,nb_streams,duration", "-of", "json")
    said = subprocess.run(["ffprobe", "-v", "error", *fields, f"file:{path}"], capture_output=True, stdin=subprocess.DEVNULL, check=False)
    found = parse_json(said.stdout or b"{}")
    if said.returncode or not found.get("streams"):
        raise UserError(f"the audio file {path!r} cannot be read ({error}), and ffmpeg finds no audio in it: give an audio file")
    return AudioFile(path=path, seconds=_promised(found["streams"][0], found.get("format", {})), decoder="ffmpeg")


def _promised(stream: dict[str, Any], container: dict[str, Any]) -> float | None:
    """The seconds of sound that a file says it has; a container lasts as long as the longest of what is in it, such as a picture."""
    if container.get("format_name") == "aac":  # has no header: ffprobe guesses from the first bitrate
        return None
    seconds = stream.get("duration") or (container.get("duration") if container.get("nb_streams") == 1 else None)
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
            raise file.wrong(f"holds samples as large as {loudest:.3g}: scale them to lie from -1 to 1")
        samples += len(block)
        yield block
    if not samples:
        raise file.wrong("holds no sample: copy it again")
    if file.seconds and samples / RATE < file.seconds - MISSING:
        raise file.wrong(f"is damaged, it ends after {samples / RATE:.1f} s of {file.seconds:.1f} s: copy it again")


def _by_soundfile(file: AudioFile) -> Iterator[np.ndarray]:
    try:
        with soundfile.SoundFile(file.path) as opened:
            rate = opened.samplerate
            resampler = soxr.ResampleStream(rate, RATE, 1, dtype="float32") if rate != RATE else None
            while len(block := opened.read(BLOCK, dtype="float32", always_2d=True)):
                mono = block[:, 0] if block.shape[1] == 1 else block.mean(1)
                yield resampler.resample_chunk(mono) if resampler else mono
            if resampler:
                yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
    except (OSError, RuntimeError) as error:
        raise file.wrong(f"is damaged ({error}): copy it again") from error


def _by_ffmpeg(file: AudioFile) -> Iterator[np.ndarray]:
    command = ["ffmpeg", "-nostdin", "-v", "error", "-i", f"file:{file.path}", "-f", "f32le", "-ac", "1", "-ar", str(RATE), "-"]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL) as process,
    ):
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
