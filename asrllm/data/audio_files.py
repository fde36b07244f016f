"""Read audio files of any length and format in blocks at 16 kHz, and explain what is wrong."""

import os
import re
import stat
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
import soxr

from asrllm.data.audio_file import BLOCK_SAMPLES, AudioFile, OutsideError, decoder_error
from asrllm.data.audio_headers import (
    JOIN_WITH_SOX,
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
from asrllm.data.container_lengths import has_several_voc_blocks, length_problem
from asrllm.data.ffmpeg import open_by_ffmpeg, read_by_ffmpeg
from asrllm.data.recording_end import tail_problem
from asrllm.data.waveforms import to_mono
from asrllm.defaults import RATE
from asrllm.errors import UserError
from asrllm.text_files import pointer_problem

MISSING = 0.1  # seconds that may be missing at a file's end: encoders round
OVERSHOOT = 0.5  # seconds after the end that a part may include, as in Kaldi's extract-segments
PROBLEMS = {
    "MP3": mp3_problem,
    "MPEG": mp3_problem,
    "NIST": sphere_problem,
    "W64": w64_problem,
    "WAV": wav_problem,
    "WAVEX": wav_problem,
}
# Formats of soundfile whose length is not in the header or not compared with the file
UNKNOWN_LENGTH = ("AVR", "IRCAM", "MAT4", "MAT5", "MPC2K", "PAF", "PVF", "WVE", "XI")
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
LOUDEST = 1000.0  # times full scale; larger values are not audio between -1 and 1
NO_LENGTH = 1 << 40  # samples; libsndfile returns more if the header has no length
AUDIO_PAGE = re.compile(rb"OggS\0[\0\1\4\5](?!\0{8})")  # a page in which samples end
FIRST_PAGE = re.compile(rb"OggS\0[\2\6]\0{8}")  # start of the first page of an Ogg stream
# libsndfile's log of a header that promises more bytes than the file has
TRUNCATED = re.compile(r"^(?!\s*(?:Bytes/sec|Block Align)).*:\s*(\d+) \(should be (\d+)\)", re.M)


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
    _check_content(file, path if content is None else None)
    _check_not_raw(file)
    try:
        with file.open_sound() as sound:
            frames = _frames_without_padding(file, sound)
            file.check_rate(sound.samplerate)
            seconds = frames / sound.samplerate
            is_padded = frames < sound.frames
            sound_format = sound.format
            if sound_format == "RAW":  # libsndfile guessed it from the name
                _check_headerless(file, sound.subtype)
            if sound_format in UNKNOWN_LENGTH:
                raise file.error(
                    f"has the format {sound_format}, which does not show whether the file is "
                    "complete. Convert it to WAV: sox IN OUT.wav"
                )
            log = sound.extra_info
            is_reliable = has_reliable_length(file, sound)
    except (OSError, RuntimeError) as error:
        if "malformed" in str(error):
            raise file.corrupted(decoder_error(error)) from error
        return open_by_ffmpeg(file, decoder_error(error))
    if not is_reliable:
        return replace(open_by_ffmpeg(file, "soundfile would not read it to its end"), seconds=None)
    if not seconds:
        return _open_without_length(file, sound_format)
    _check_not_truncated(file, sound_format, log)
    return replace(file, seconds=seconds, frames=frames if is_padded else None)


def _check_content(file: AudioFile, path: str | None) -> None:
    """Raise UserError for content that a decoder would read without noticing what is wrong.

    Args:
        file: the file.
        path: its path if it is on disk.
    """
    with file.open_bytes() as content:
        problem = (
            pointer_problem(content, path) or stream_problem(content) or length_problem(content)
        )
        tail = tail_problem(content)
        second = find_second_recording(content)
    if problem:
        raise file.error(problem)
    if second is not None:
        raise file.error(
            f"has a second recording at byte {second}, which a decoder would not read. "
            f"{JOIN_WITH_SOX}"
        )
    if tail:
        raise file.error(tail)


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


def _check_not_truncated(file: AudioFile, sound_format: str, log: str) -> None:
    """Raise UserError if the file is shorter than its header promises."""
    if sound_format in PROBLEMS:
        with file.open_bytes() as content:
            problem = PROBLEMS[sound_format](content)
        if problem:
            raise file.error(problem)
    for promised, present in TRUNCATED.findall(log):
        if int(present) < int(promised) < UNKNOWN_SIZE:
            raise file.error(truncated(present, promised))


def _streamed(path: str) -> bytes | None:
    """Return the content of a stream, which cannot be read twice, or None for a file."""
    if path == "-":
        return sys.stdin.buffer.read()
    if stat.S_ISFIFO(os.stat(path).st_mode):
        return Path(path).read_bytes()
    return None


def has_reliable_length(file: AudioFile, sound: soundfile.SoundFile) -> bool:
    """Return whether soundfile reads the whole file.

    It reads as many samples as it derives from the header.
    """
    if sound.format == "FLAC":
        return 0 < sound.frames < NO_LENGTH
    with file.open_bytes() as content:
        if sound.format in ("MP3", "MPEG"):
            return has_frame_count(content) and not is_several_mp3s(content)
        if sound.format == "VOC":
            return not has_several_voc_blocks(content)
    return sound.format != "OGG" or not is_chained(file)


def is_chained(file: AudioFile) -> bool:
    """Return whether an Ogg file has another stream after the audio of the first (RFC 3533)."""
    with file.open_bytes() as pages:
        audio = AUDIO_PAGE.search(pages)
        return audio is not None and FIRST_PAGE.search(pages, audio.end()) is not None


def read_blocks(file: AudioFile) -> Iterator[np.ndarray]:
    """Yield the audio of a file block by block; channels are averaged.

    Yields:
        (samples,) float32 at RATE.

    Raises:
        UserError: the file is corrupted, is shorter than its header promises, or has values that
            are not audio.
    """
    samples = 0
    source = read_by_ffmpeg(file) if file.decoder == "ffmpeg" else _read_by_soundfile(file)
    for block in _at_common_rate(source):
        loudest = np.abs(block).max(initial=0)
        if not np.isfinite(loudest):
            first = samples + int(np.isfinite(block).argmin())
            raise file.error(f"has NaN or infinite values at {first / RATE:.2f} s. Write it again.")
        _check_loudness(file, loudest)
        samples += len(block)
        yield block
    if not samples:
        raise file.error("has no samples. Copy it again.")
    _check_all_read(file, samples / RATE)


def _check_loudness(file: AudioFile, loudest: float) -> None:
    if loudest > LOUDEST:
        raise file.error(f"has samples as large as {loudest:.3g}. Scale them to -1 to 1.")


def _check_all_read(file: AudioFile, seconds: float) -> None:
    """Raise UserError if less audio was read than the header promises."""
    if file.seconds and seconds < file.seconds - MISSING:
        raise file.corrupted(f"it ends after {seconds:.1f} s of {file.seconds:.1f} s")


def read_segment(
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
    read = _read_segment_by_ffmpeg if file.decoder == "ffmpeg" else _read_segment_by_soundfile
    wave, rate = read(file, start, end)
    loudest = np.abs(wave).max(initial=0)
    if np.isfinite(loudest):
        _check_loudness(file, loudest)
    return wave, rate


def _read_segment_by_ffmpeg(
    file: AudioFile, start: float, end: float | None
) -> tuple[np.ndarray, int]:
    """Read a part of a file with ffmpeg. The whole file is decoded to check its length."""
    parts = []
    frames = 0
    for block, rate in read_by_ffmpeg(file):
        begin = max(round(start * rate) - frames, 0)
        stop = len(block) if end is None else max(round(end * rate) - frames, 0)
        parts.append(block[begin:stop])
        frames += len(block)
    if not parts:
        raise file.error("has no samples. Copy it again.")
    _check_all_read(file, frames / rate)
    _frames_of(file, start, end, rate, frames)
    return np.concatenate(parts), rate


def _read_segment_by_soundfile(
    file: AudioFile, start: float, end: float | None
) -> tuple[np.ndarray, int]:
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
        raise file.corrupted(decoder_error(error)) from error
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
        read_segment(file, max(file.seconds - MISSING, 0.0))


def _read_by_soundfile(file: AudioFile) -> Iterator[tuple[np.ndarray, int]]:
    """Yield samples (samples, channels) as float32, and the sampling rate in Hz."""
    try:
        with file.open_sound() as sound:
            remaining = file.frames or sys.maxsize
            while len(
                block := sound.read(min(BLOCK_SAMPLES, remaining), dtype="float32", always_2d=True)
            ):
                remaining -= len(block)
                yield block, sound.samplerate
    except (OSError, RuntimeError) as error:
        raise file.corrupted(decoder_error(error)) from error


def _at_common_rate(blocks: Iterator[tuple[np.ndarray, int]]) -> Iterator[np.ndarray]:
    """Yield the mean of the channels of blocks at RATE."""
    resampler = None
    for block, rate in blocks:
        if rate != RATE and resampler is None:
            resampler = soxr.ResampleStream(rate, RATE, 1, dtype="float32")
        mono = to_mono(block)
        yield resampler.resample_chunk(mono) if resampler else mono
    if resampler:
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
