"""Read the audio formats that soundfile does not read, with ffmpeg."""

import os
import re
import select
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import IO, Any

import numpy as np

from asrllm.data.audio_file import ADDRESS, BLOCK_SAMPLES, FORMATS, AudioFile
from asrllm.data.container_lengths import is_adx
from asrllm.defaults import RATE
from asrllm.text_files import JsonObject, parse_json

LOCAL_ONLY = ("-protocol_whitelist", "file")
# Containers of audio. Others, for example HLS, DASH and concat, name further files, which ffmpeg
# would open: a manifest or an upload could read any file of this machine.
CONTAINERS = (
    *("aac", "ac3", "adx", "aiff", "amr", "amrnb", "amrwb", "ape", "asf", "ast", "au", "avi"),
    *("caf", "dts", "dtshd", "eac3", "flac", "flv", "loas", "matroska"),
    *("mlp", "mov", "mp3", "mpc", "mpc8", "mpeg", "mpegts", "nistsphere", "nut", "ogg", "oma"),
    *("rm", "sbc", "shn", "sox", "tak", "truehd", "tta", "voc", "w64", "wav", "wv", "xwma"),
)
SELF_CONTAINED = (*LOCAL_ONLY, "-format_whitelist", ",".join(CONTAINERS))
FFPROBE_SECONDS = 60  # how long ffprobe may take
STALLED_SECONDS = 300  # how long ffmpeg may write nothing: audio can follow gigabytes of video
# what ffmpeg 5, 6 and 7 write about a packet that is corrupted
NOT_DECODED = (
    r"\[(?:error|fatal|panic)\] .*(?:Error while decoding|Error submitting packet|CRC error"
    r"|CRC mismatch)|corrupt input packet|Lossless check failed"
)
SKIPPED = "non monotonically increasing dts"  # all that ffmpeg 5 writes about skipped FLAC frames
# Errors of the decoder, whose name begins as that of its codec. Those of others may be about a tag
# after the recording, or about a picture.
DECODER_ERROR = r"^\[{}\w* @ [^]]*\] \[(?:error|fatal|panic)\] "
DECODERS = {"dts": "dca", "amr_nb": "amrnb", "amr_wb": "amrwb"}  # which are named differently
LEVEL = re.compile(r"\[(?:warning|error|fatal|panic)\] ")
# otherwise decoders ignore most checksums, and conceal what they cannot decode
VERIFY = ("-err_detect", "crccheck+bitstream+buffer+explode")
VARIABLE = ("aac", "amr")  # have no header: ffprobe guesses the length from the first bitrate
ALAC_PACKET = 4096  # samples
PROBED = (
    "stream=codec_name,start_time,duration,sample_rate,channels"
    ":format=format_name,nb_streams,duration"
)


# ffmpeg runs as a process, so that a hostile file cannot end training, a corpus or the server. PyAV
# 18.1, which has FFmpeg 8.1, runs in this process: 39 of 37,793 files with random damage in 73
# formats ended it (SIGFPE, all by headers of ADX), and with 18.0 a truncated MP4 did, too
# (https://github.com/PyAV-Org/PyAV/issues/2344). It is not more exact: of 3599 damaged files, both
# with our other checks, ffmpeg 5.1 rejects 2546 and PyAV 2532. Of 361 and 364, the audio is right.
# The others are mostly of formats without checksums: see docs/data.md. It would not save lines
# either: its module had 201. PyAV is faster: 15 ms instead of 115 ms for a file of 4 s.
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
    container = found.get("format", {})
    start = stream.get("start_time")
    if container.get("format_name") == "flac" and start and float(start) > 0:
        raise file.corrupted(f"FLAC frames before {float(start):.2f} s are missing")
    rate = int(stream.get("sample_rate", RATE))  # ffprobe omits an unknown rate
    file.check_rate(rate)
    seconds = _promised_seconds(stream, container)
    channels = max(int(stream.get("channels", 1)), 1)
    codec = stream.get("codec_name", "")
    return replace(
        file, seconds=seconds, decoder="ffmpeg", codec=codec, rate=rate, channels=channels
    )


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
                timeout=FFPROBE_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            problem = f"cannot be read within {FFPROBE_SECONDS} s by ffprobe. Convert it to WAV."
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
    if container.get("format_name") in VARIABLE:
        return None
    seconds = stream.get("duration")
    if not seconds and container.get("nb_streams") == 1:
        seconds = container.get("duration")
    if not seconds:
        return None
    if container.get("format_name") == "caf":
        # ffprobe counts whole packets. ALAC's are the longest, with 4096 samples
        return max(float(seconds) - ALAC_PACKET / int(stream["sample_rate"]), 0.0)
    return float(seconds)


def read_by_ffmpeg(file: AudioFile) -> Iterator[tuple[np.ndarray, int]]:
    """Yield samples (samples, channels) as float32, and the sampling rate in Hz.

    The options keep the rate and the channels of the header if they change within the file. ffmpeg
    does not average: it would make the mean of two channels 1.41 times as large.
    """
    output = ["-map", "0:a:0", "-f", "f32le", "-ac", str(file.channels), "-ar", str(file.rate), "-"]
    with file.on_disk() as path, tempfile.TemporaryFile() as log:
        command = ["ffmpeg", "-nostdin", "-v", "level+warning", *SELF_CONTAINED, *VERIFY]
        command += ["-i", f"file:{path}", *output]
        for samples in _output_of(command, file, log):
            yield samples, file.rate


def _output_of(command: list[str], file: AudioFile, log: IO[bytes]) -> Iterator[np.ndarray]:
    """Yield the samples that ffmpeg writes, and raise UserError if it fails."""
    size = 4 * file.channels
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        try:
            while data := _read_block(process.stdout, size * BLOCK_SAMPLES, file):
                whole = data[: len(data) // size * size]
                yield np.frombuffer(whole, "<f4").reshape(-1, file.channels)
        except BaseException:  # Popen would wait for an ffmpeg that hangs, also after SIGTERM
            process.kill()
            raise
        status = process.wait()
        log.seek(0)
        messages = log.read().decode(errors="replace")
        errors = _errors_in(messages, file)
        if status or errors:
            found = errors or [line for line in messages.splitlines() if line.strip()]
            first = LEVEL.sub("", ADDRESS.sub("", found[0])) if found else f"status {status}"
            raise file.corrupted(f"ffmpeg: {first[:200]}")


def _read_block(pipe: IO[bytes], size: int, file: AudioFile) -> bytes:
    """Return the next `size` bytes of a pipe, or fewer at its end.

    Raises:
        UserError: nothing was written for STALLED_SECONDS.
    """
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    block = bytearray()
    while len(block) < size:
        if not poll.poll(1000 * STALLED_SECONDS):
            raise file.error(
                f"cannot be read: ffmpeg wrote nothing for {STALLED_SECONDS} s. Convert it to WAV."
            )
        part = os.read(pipe.fileno(), size - len(block))
        if not part:
            break
        block += part
    return bytes(block)


def _errors_in(messages: str, file: AudioFile) -> list[str]:
    """Return the lines of ffmpeg's log that say that audio is missing or wrong.

    ffmpeg also reports the headers of a chained Ogg file's second stream, and the end of ADX.
    `stream_problem` checks Ogg, and `length_problem` checks ADX.
    """
    with file.open_bytes() as content:
        if content[:4] == b"OggS" or is_adx(content):
            return []
        is_flac = content[:4] == b"fLaC"
    decoder = re.escape(DECODERS.get(file.codec, file.codec))
    signs = [DECODER_ERROR.format(decoder), NOT_DECODED]
    if is_flac:
        signs.append(SKIPPED)
    return [line for line in messages.splitlines() if re.search("|".join(signs), line)]
