"""Read audio files of any length and format in blocks at 16 kHz, and explain what is wrong."""

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
from typing import IO, Any, BinaryIO

import numpy as np
import soundfile
import soxr

from asrllm.data.audio_headers import (
    UNKNOWN_SIZE,
    find_second_recording,
    has_frame_count,
    is_gsm,
    is_several_mp3s,
    mp3_problem,
    sphere_problem,
    stream_problem,
    truncated,
    w64_problem,
    wav_problem,
    wav_sample_count,
    with_unknown_size,
)
from asrllm.data.container_lengths import has_several_voc_blocks, is_adx, length_problem
from asrllm.data.recording_end import tail_problem
from asrllm.defaults import AUDIO_EXTENSIONS, RATE
from asrllm.errors import UserError
from asrllm.text_files import JsonObject, parse_json, pointer_problem

BLOCK_SAMPLES = 1 << 16  # samples of each channel, at the file's own rate
# the best-known formats that soundfile reads
FORMATS = ("wav", "flac", "mp3", "ogg", "opus", "aiff", "au", "caf", "w64")
# Hz; 1 Hz would make a day of a few seconds, and only ultrasound needs more than 192 kHz
MIN_RATE = 1000
MAX_RATE = 1_000_000
MISSING = 0.1  # seconds that may be missing at a file's end: encoders round
OVERSHOOT = 0.5  # seconds after the end that a part may include, as in Kaldi's extract-segments
LOCAL_ONLY = ("-protocol_whitelist", "file")
# Containers of audio. Others, for example HLS, DASH and concat, name further files, which ffmpeg
# would open: a manifest or an upload could read any file of this machine.
CONTAINERS = (
    *("aac", "ac3", "adx", "aiff", "amr", "amrnb", "amrwb", "ape", "asf", "ast", "au", "avi"),
    *("caf", "dts", "dtshd", "eac3", "flac", "flv", "ircam", "loas", "matroska"),
    *("mlp", "mov", "mp3", "mpc", "mpc8", "mpeg", "mpegts", "nistsphere", "nut", "ogg", "oma"),
    *("rm", "sbc", "shn", "sox", "tak", "truehd", "tta", "voc", "w64", "wav", "wv", "xwma"),
)
SELF_CONTAINED = (*LOCAL_ONLY, "-format_whitelist", ",".join(CONTAINERS))
PROBE_SECONDS = 60  # how long ffprobe may take
PROBLEMS = {
    "MP3": mp3_problem,
    "MPEG": mp3_problem,
    "NIST": sphere_problem,
    "W64": w64_problem,
    "WAV": wav_problem,
    "WAVEX": wav_problem,
}
HEADERS = (b"RIFF", b"fLaC", b"OggS", b"FORM", b".snd", b"ID3")
SOX_RAW = "sox -t raw -r 16000 -e signed -b 16 IN OUT.wav"
FFMPEG_RAW = "ffmpeg -f {} -i IN -c:a pcm_s16le OUT.wav"
# endings of files without a header, with a command that converts them at their usual rate
RAW_FORMATS = {
    "raw": SOX_RAW,
    "pcm": SOX_RAW,
    "g722": FFMPEG_RAW.format("g722"),
    "g729": FFMPEG_RAW.format("g729"),
    "vox": "sox -t vox -r 8000 -c 1 IN OUT.wav",
    "ul": FFMPEG_RAW.format("mulaw -ar 8000"),
    "ulaw": FFMPEG_RAW.format("mulaw -ar 8000"),
    "al": FFMPEG_RAW.format("alaw -ar 8000"),
    "alaw": FFMPEG_RAW.format("alaw -ar 8000"),
    "g726": FFMPEG_RAW.format("g726 -code_size 4"),
    "sln": "sox -t raw -r 8000 -e signed -b 16 IN OUT.wav",
    "sln16": SOX_RAW,
}
PADDED = ("GSM610", "G721", "NMS_ADPCM")  # soundfile reads their last block whole
SHOWN_SKIPPED = 5  # names of skipped files in a warning
LOUDEST = 1000.0  # times full scale; larger values are not audio between -1 and 1
NO_LENGTH = 1 << 40  # samples; libsndfile returns more if the header has no length
AUDIO_PAGE = re.compile(rb"OggS\0[\0\1\4\5](?!\0{8})")  # a page in which samples end
FIRST_PAGE = re.compile(rb"OggS\0[\2\6]\0{8}")  # start of the first page of an Ogg stream
# libsndfile's log of a header that promises more bytes than the file has
TRUNCATED = re.compile(r"^(?!\s*(?:Bytes/sec|Block Align)).*:\s*(\d+) \(should be (\d+)\)", re.M)
# what ffmpeg 5, 6 and 7 write about a packet that is damaged
NOT_DECODED = (
    *("Error while decoding", "Error submitting packet", "CRC error", "CRC mismatch"),
    "corrupt input packet",
)
# lines of ffmpeg's log that say that audio is missing; all others are warnings
SEVERE = re.compile(r"\[(?:error|fatal|panic)\] |\[warning\] (?=.*corrupt input packet)")
VERIFY_CHECKSUMS = ("-err_detect", "crccheck")  # otherwise it ignores those of most formats
ALAC_PACKET = 4096  # samples
PROBED = "stream=codec_name,duration,sample_rate:format=format_name,nb_streams,duration"
ADDRESS = re.compile(r" ?(?:at|@) 0x[0-9a-f]+")
# libsndfile's message about an unknown format that is named like another one
MISLEADING = re.compile(r"does not exist or is not a regular file")
logger = logging.getLogger(__name__)


class OutsideError(UserError):
    """A part of a file is outside the file."""


@dataclass(frozen=True, kw_only=True)
class AudioFile:
    """An audio file whose header has been read.

    Attributes:
        path: the file, or the name of `content` in messages.
        seconds: its length according to the header, None if that has none.
        decoder: "soundfile" or "ffmpeg".
        content: the bytes of a file that is not on disk.
        frames: its length at its own sampling rate, if soundfile would read padding after it.
    """

    path: str
    seconds: float | None
    decoder: str = "soundfile"
    content: bytes | None = None
    frames: int | None = None

    def error(self, problem: str) -> UserError:
        """Return the error for a problem with this file."""
        return UserError(f"the audio file {self.path!r} {problem}")

    @contextlib.contextmanager
    def open_sound(self) -> Iterator[soundfile.SoundFile]:
        """Open the file with soundfile."""
        with contextlib.ExitStack() as stack:
            source: str | BinaryIO = self.path
            if self.content is not None:
                source = BytesIO(self.content)
            elif not is_utf8(self.path):  # soundfile rejects such a name
                source = stack.enter_context(open(self.path, "rb"))
            yield stack.enter_context(soundfile.SoundFile(source))

    @contextlib.contextmanager
    def open_bytes(self) -> Iterator["bytes | mmap.mmap"]:
        """Map the file to memory."""
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
    """Return whether a file name is UTF-8. Python represents other bytes by lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def find_audio(paths: Sequence[str]) -> list[str]:
    """Replace directories by the audio files below them, sorted, and warn of skipped files.

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
                f"the directory {path!r} has no audio file ({', '.join(FORMATS)}, m4a, mp4, ...). "
                "Choose another one."
            )
        warn_of_skipped(path, skipped)
        files += sorted(map(str, found))
    return files


def list_audio(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """List the files below a directory.

    Returns:
        The audio files, and the files that are neither audio nor belong to an audio file of the
        same name. Hidden files, for example the ._ files of macOS, are in neither list.
    """
    audio: list[Path] = []
    others: list[Path] = []
    visited = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        visited.add(os.path.realpath(parent))
        new = [name for name in folders if os.path.realpath(Path(parent, name)) not in visited]
        folders[:] = sorted(new)
        paths = [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
        found = [path for path in paths if has_audio_extension(path.name) and not path.is_fifo()]
        stems = {path.stem for path in found}
        audio += found
        others += [path for path in paths if path.stem not in stems]
    return audio, others


def has_audio_extension(name: str) -> bool:
    """Return whether a file name has the extension of an audio format."""
    return name.rpartition(".")[2].lower() in AUDIO_EXTENSIONS


def warn_of_skipped(folder: str | Path, skipped: Sequence[Path]) -> None:
    """Warn of the files of a directory that are skipped: of other extensions, and FIFOs."""
    if not skipped:
        return
    names = ", ".join(str(path.relative_to(folder)) for path in skipped[:SHOWN_SKIPPED])
    more = ", ..." if len(skipped) > SHOWN_SKIPPED else ""
    logger.warning(
        "Skipped %d files in %s that have no audio extension or are FIFOs: %s%s",
        len(skipped),
        folder,
        names,
        more,
    )


def open_audio(path: str, content: bytes | None = None) -> AudioFile:
    """Read the header of an audio file.

    Args:
        path: a file, a FIFO, or "-" for standard input; the latter two are read into memory.
        content: the bytes of a file that is not on disk; `path` is then only its name.

    Raises:
        UserError: the file cannot be read, is shorter than its header promises, or has a sampling
            rate that no recording has.
    """
    try:
        if content is None:
            content = _streamed(path)
        size = os.stat(path).st_size if content is None else len(content)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"the audio file {path!r} cannot be read ({reason}). "
            "Check the path and its permissions."
        ) from error
    file = AudioFile(path=path, seconds=None, content=content)
    if not size:
        raise file.error("is empty (0 bytes). Copy it again.")
    with file.open_bytes() as whole:
        problem = (
            pointer_problem(whole, path if content is None else None)
            or stream_problem(whole)
            or length_problem(whole)
        )
        tail = tail_problem(whole)
        second = find_second_recording(whole)
    if problem:
        raise file.error(problem)
    if second is not None:
        raise file.error(
            f"has a second recording at byte {second}, which a decoder would not read. "
            "Join recordings with sox instead of cat."
        )
    if tail:
        raise file.error(tail)
    _check_not_raw(file)
    try:
        with file.open_sound() as sound:
            frames = _frames_without_padding(file, sound)
            _check_rate(file, sound.samplerate)
            seconds = frames / sound.samplerate
            is_padded = frames < sound.frames
            sound_format = sound.format
            if sound_format == "RAW":  # libsndfile guessed it from the name
                _check_headerless(file, sound.subtype)
            log = sound.extra_info
            unreliable = unreliable_length(file, sound)
    except (OSError, RuntimeError) as error:
        if "malformed" in str(error):
            raise _corrupted(file, decoder_error(error)) from error
        return open_by_ffmpeg(file, decoder_error(error))
    if unreliable:
        return replace(open_by_ffmpeg(file, unreliable), seconds=None)
    if not seconds:
        return _open_without_length(file, sound_format)
    _check_length(file, sound_format, log)
    return replace(file, seconds=seconds, frames=frames if is_padded else None)


def _check_not_raw(file: AudioFile) -> None:
    """Raise UserError for a file whose name says that it has no header.

    Nothing in such files shows whether they are audio, are complete, or have the rate that is
    usual for their name.
    """
    ending = file.path.lower().rpartition(".")[2]
    if ending not in RAW_FORMATS:
        return
    with file.open_bytes() as content:
        begin = content[:12]
    if any(begin.startswith(magic) for magic in HEADERS):
        return  # a file with a header under another name
    raise file.error(
        "is raw: it has no header with sampling rate and encoding. "
        f"Convert it, for example: {RAW_FORMATS[ending]}"
    )


def _check_headerless(file: AudioFile, subtype: str) -> None:
    """Raise UserError for a file without a header, unless each of its frames shows its format."""
    if subtype == "GSM610":
        with file.open_bytes() as content:
            if is_gsm(content):
                return
    raise file.error(
        "has no header of an audio file, so its sampling rate and encoding are not known. "
        "Copy it again, or convert it to WAV."
    )


def _check_rate(file: AudioFile, rate: int) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise file.error(
            f"has a sampling rate of {rate} Hz, which is not between {MIN_RATE} and {MAX_RATE} Hz. "
            "Correct its header, or copy it again."
        )


def _frames_without_padding(file: AudioFile, sound: soundfile.SoundFile) -> int:
    """Return the number of samples of a file without those that fill its last block."""
    if sound.format not in ("WAV", "WAVEX") or not sound.subtype.startswith(PADDED):
        return sound.frames
    with file.open_bytes() as content:
        return wav_sample_count(content, sound.frames)


def _open_without_length(file: AudioFile, sound_format: str) -> AudioFile:
    """Open a WAV again whose header has the size 0 although audio follows."""
    if sound_format in ("WAV", "WAVEX"):
        with file.open_bytes() as content:
            corrected = with_unknown_size(content)
        if corrected is not None:
            return open_audio(file.path, corrected)
    raise file.error("has no samples. Copy it again.")


def _check_length(file: AudioFile, sound_format: str, log: str) -> None:
    """Raise UserError if the file is shorter than its header promises."""
    if sound_format in PROBLEMS:
        with file.open_bytes() as content:
            problem = PROBLEMS[sound_format](content)
        if problem:
            raise file.error(problem)
    for promised, present in TRUNCATED.findall(log):
        if int(present) < int(promised) < UNKNOWN_SIZE:
            raise file.error(truncated(present, promised))


def _corrupted(file: AudioFile, problem: str) -> UserError:
    return file.error(f"is corrupted ({problem}). Copy it again.")


def _streamed(path: str) -> bytes | None:
    """Return the content of a stream, which cannot be read twice, or None for a file."""
    if path == "-":
        return sys.stdin.buffer.read()
    if stat.S_ISFIFO(os.stat(path).st_mode):
        return Path(path).read_bytes()
    return None


def decoder_error(error: Exception) -> str:
    """Return the message of a decoder on one line, without addresses in memory."""
    text = ADDRESS.sub("", str(getattr(error, "error_string", error)))
    if MISLEADING.search(text):
        return "its format is not known"
    return " ".join(text.split()).rstrip(".")


def unreliable_length(file: AudioFile, sound: soundfile.SoundFile) -> str:
    """Return why soundfile may stop before the end of the file, or "" if it does not.

    soundfile reads as many samples as it derives from the header.
    """
    if sound.format in ("MP3", "MPEG") and not _counts_its_frames(file):
        return "only ffmpeg reads an MP3 without a frame count completely"
    if sound.format in ("MP3", "MPEG") and _is_several_mp3s(file):
        return "only ffmpeg reads a file of several MP3s completely"
    if sound.format == "FLAC" and not 0 < sound.frames < NO_LENGTH:
        return "only ffmpeg reads a FLAC without a sample count"
    if sound.format == "VOC" and _has_several_voc_blocks(file):
        return "only ffmpeg reads a VOC file of several blocks correctly"
    if sound.format == "OGG" and is_chained(file):
        return "only ffmpeg reads an Ogg file of several consecutive recordings completely"
    return ""


def _counts_its_frames(file: AudioFile) -> bool:
    with file.open_bytes() as content:
        return has_frame_count(content)


def _is_several_mp3s(file: AudioFile) -> bool:
    with file.open_bytes() as content:
        return is_several_mp3s(content)


def _has_several_voc_blocks(file: AudioFile) -> bool:
    with file.open_bytes() as content:
        return has_several_voc_blocks(content)


def is_chained(file: AudioFile) -> bool:
    """Return whether an Ogg file has another stream after the audio of the first (RFC 3533)."""
    with file.open_bytes() as pages:
        audio = AUDIO_PAGE.search(pages)
        return audio is not None and FIRST_PAGE.search(pages, audio.end()) is not None


# ffmpeg runs as a process, so that a hostile file cannot crash training, and PyAV 18 is a wheel of
# 36 MB for formats that are rare in corpora. PyAV is faster: it takes 7 ms instead of 175 ms
# for a file of 10 s. With the same check of the length, ffmpeg rejects 43 and PyAV 44 of 54 damaged
# files.
def open_by_ffmpeg(file: AudioFile, reason: str) -> AudioFile:
    """Read the header with ffprobe.

    Args:
        file: the file.
        reason: why soundfile does not read it.
    """
    if not shutil.which("ffmpeg") or not shutil.which("ffprobe"):
        raise file.error(
            f"cannot be read ({reason}). Convert it to one of {', '.join(FORMATS)}, "
            "or install ffmpeg, which is not on PATH, for m4a, mp4, webm and more."
        )
    found = _probe(file)
    if not found.get("streams"):
        raise file.error(
            f"cannot be read ({reason}), and ffmpeg finds no audio in it. Choose an audio file."
        )
    stream = found["streams"][0]
    if "sample_rate" in stream:  # ffprobe omits an unknown rate
        _check_rate(file, int(stream["sample_rate"]))
    seconds = _promised_seconds(stream, found.get("format", {}))
    return replace(file, seconds=seconds, decoder="ffmpeg")


def _probe(file: AudioFile) -> JsonObject:
    """Return what ffprobe prints about a file, or an empty object if it fails."""
    fields = ("-select_streams", "a:0", "-show_entries", PROBED, "-of", "json")
    with file.on_disk() as path:
        command = ["ffprobe", "-v", "error", *SELF_CONTAINED, *fields, f"file:{path}"]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                stdin=subprocess.DEVNULL,
                check=False,
                timeout=PROBE_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            problem = f"cannot be read within {PROBE_SECONDS} s by ffprobe. Convert it to WAV."
            raise file.error(problem) from error
    if done.returncode:
        return {}
    try:
        return parse_json(done.stdout or b"{}")
    except ValueError:  # ffprobe stops in the middle of its output
        return {}


def _promised_seconds(stream: dict[str, Any], container: dict[str, Any]) -> float | None:
    """Return the length of the audio according to ffprobe, or None if it is unknown.

    The length of a container is that of its longest stream, for example a picture.
    """
    if container.get("format_name") == "aac":
        return None  # AAC has no header: ffprobe guesses from the first bitrate
    seconds = stream.get("duration")
    if not seconds and container.get("nb_streams") == 1:
        seconds = container.get("duration")
    if not seconds:
        return None
    if container.get("format_name") == "caf":
        # ffprobe counts whole packets, of which ALAC's, the longest, have 4096 samples
        return max(float(seconds) - ALAC_PACKET / int(stream["sample_rate"]), 0.0)
    return float(seconds)


def read_blocks(file: AudioFile) -> Iterator[np.ndarray]:
    """Yield the audio of a file block by block; channels are averaged.

    Yields:
        (samples,) float32 at RATE.

    Raises:
        UserError: the file is corrupted, is shorter than its header promises, or has values that
            are not audio.
    """
    samples = 0
    blocks = _by_ffmpeg(file) if file.decoder == "ffmpeg" else _by_soundfile(file)
    for block in blocks:
        loudest = np.abs(block).max(initial=0)
        if not np.isfinite(loudest):
            first = samples + int(np.isfinite(block).argmin())
            raise file.error(f"has NaN or infinite values at {first / RATE:.2f} s. Write it again.")
        _check_loudness(file, loudest)
        samples += len(block)
        yield block
    if not samples:
        raise file.error("has no samples. Copy it again.")
    _check_all_read(file, samples)


def _check_loudness(file: AudioFile, loudest: float) -> None:
    if loudest > LOUDEST:
        raise file.error(f"has samples as large as {loudest:.3g}. Scale them to -1 to 1.")


def _check_all_read(file: AudioFile, samples: int) -> None:
    """Raise UserError if fewer samples at RATE were read than the header promises."""
    if file.seconds and samples / RATE < file.seconds - MISSING:
        raise _corrupted(file, f"it ends after {samples / RATE:.1f} s of {file.seconds:.1f} s")


def read_stretch(
    file: AudioFile, start: float = 0.0, end: float | None = None
) -> tuple[np.ndarray, int]:
    """Read a part of a file at its own sampling rate, with all channels.

    Args:
        file: the return value of `open_audio`.
        start: start in seconds.
        end: end in seconds; None reads to the end of the file.

    Returns:
        Samples (samples, channels) as float32, and the sampling rate in Hz.

    Raises:
        UserError: the file is corrupted or is shorter than its header promises.
        OutsideError: the part is outside the file.
    """
    if file.decoder == "ffmpeg":
        wave = _read_part_by_ffmpeg(file, start, end)
        rate = RATE
    else:
        wave, rate = _read_part(file, start, end)
    loudest = np.abs(wave).max(initial=0)
    if np.isfinite(loudest):
        _check_loudness(file, loudest)
    return wave, rate


def _read_part_by_ffmpeg(file: AudioFile, start: float, end: float | None) -> np.ndarray:
    """Return samples (samples, 1) at 16 kHz. The whole file is decoded to check its length."""
    nothing: np.ndarray = np.zeros(0, np.float32)  # numpy cannot concatenate an empty list
    samples = np.concatenate([nothing, *_by_ffmpeg(file)])
    whole = samples[:, None]
    _check_all_read(file, len(whole))
    begin, stop = _frames_of(file, start, end, RATE, len(whole))
    return whole[begin:stop]


def _read_part(file: AudioFile, start: float, end: float | None) -> tuple[np.ndarray, int]:
    """Read a part of a file with soundfile."""
    try:
        with file.open_sound() as sound:
            rate = sound.samplerate
            begin, stop = _frames_of(file, start, end, rate, file.frames or sound.frames)
            if begin and sound.seekable():
                sound.seek(begin)
            elif begin:
                _read_frames(sound, begin)
            wave = _read_frames(sound, stop - begin)
    except (OSError, RuntimeError) as error:
        raise _corrupted(file, decoder_error(error)) from error
    if len(wave) < stop - begin - MISSING * rate:
        promised = f"{(stop - begin) / rate:.1f} s"
        raise file.error(
            f"is truncated: it has {len(wave) / rate:.1f} s of {promised}. Copy it again."
        )
    return wave, rate


def _frames_of(
    file: AudioFile, start: float, end: float | None, rate: int, frames: int
) -> tuple[int, int]:
    """Return the first frame of a part and the frame after its last."""
    begin = round(start * rate)
    stop = frames if end is None else round(end * rate)
    if begin > frames or stop > frames + OVERSHOOT * rate:
        part = f"{start:.3f} s to {stop / rate:.3f} s"
        length = f"{frames / rate:.3f} s"
        raise OutsideError(f"the audio file {file.path!r} has {length}, so {part} is outside it")
    return begin, min(stop, frames)


def _read_frames(sound: soundfile.SoundFile, count: int) -> np.ndarray:
    """Read at most `count` frames, block by block: a corrupted header may promise any number."""
    blocks = [np.zeros((0, sound.channels), np.float32)]
    while count > 0:
        block = sound.read(min(count, BLOCK_SAMPLES), dtype="float32", always_2d=True)
        if not len(block):
            break
        blocks.append(block)
        count -= len(block)
    return np.concatenate(blocks)


def check_end(file: AudioFile) -> None:
    """Read the last tenth of a second, without the rest.

    Raises:
        UserError: the file is truncated.
    """
    if file.decoder == "soundfile" and file.seconds:
        read_stretch(file, max(file.seconds - MISSING, 0.0))


def _by_soundfile(file: AudioFile) -> Iterator[np.ndarray]:
    try:
        with file.open_sound() as sound:
            rate = sound.samplerate
            resampler = None
            if rate != RATE:
                resampler = soxr.ResampleStream(rate, RATE, 1, dtype="float32")
            remaining = file.frames or sys.maxsize
            while len(
                block := sound.read(min(BLOCK_SAMPLES, remaining), dtype="float32", always_2d=True)
            ):
                remaining -= len(block)
                mono = block[:, 0] if block.shape[1] == 1 else block.mean(1)
                yield resampler.resample_chunk(mono) if resampler else mono
            if resampler:
                yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
    except (OSError, RuntimeError) as error:
        raise _corrupted(file, decoder_error(error)) from error


def _by_ffmpeg(file: AudioFile) -> Iterator[np.ndarray]:
    output = ["-f", "f32le", "-ac", "1", "-ar", str(RATE), "-"]
    with file.on_disk() as path, tempfile.TemporaryFile() as log:
        command = ["ffmpeg", "-nostdin", "-v", "level+warning", *SELF_CONTAINED, *VERIFY_CHECKSUMS]
        command += ["-i", f"file:{path}", *output]
        yield from _output_of(command, file, log)


def _output_of(command: list[str], file: AudioFile, log: IO[bytes]) -> Iterator[np.ndarray]:
    """Yield the float32 samples that ffmpeg writes, and raise UserError if it fails."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        try:
            while data := process.stdout.read(4 * BLOCK_SAMPLES):
                yield np.frombuffer(data[: len(data) // 4 * 4], "<f4")
        except GeneratorExit:  # the caller needs no more samples
            process.kill()
            raise
        status = process.wait()
        log.seek(0)
        messages = log.read().decode(errors="replace")
        errors = [line for line in messages.splitlines() if SEVERE.search(line)]
        if status or _has_undecoded(file, "\n".join(errors)):
            first = SEVERE.sub("", ADDRESS.sub("", errors[0] if errors else messages[:200]))
            raise _corrupted(file, f"ffmpeg: {first[:200]}")


def _has_undecoded(file: AudioFile, messages: str) -> bool:
    """Return whether ffmpeg succeeded although a packet was incomplete or could not be decoded.

    The headers of a chained Ogg file's second stream are such packets, and so is the end of ADX.
    `stream_problem` checks Ogg, and `length_problem` checks ADX.
    """
    with file.open_bytes() as content:
        is_checked = content[:4] == b"OggS" or is_adx(content)
    return not is_checked and any(words in messages for words in NOT_DECODED)
