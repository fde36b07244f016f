"""Read the audio formats that soundfile does not read, with ffmpeg."""

import re
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
    *("caf", "dts", "dtshd", "eac3", "flac", "flv", "ircam", "loas", "matroska"),
    *("mlp", "mov", "mp3", "mpc", "mpc8", "mpeg", "mpegts", "nistsphere", "nut", "ogg", "oma"),
    *("rm", "sbc", "shn", "sox", "tak", "truehd", "tta", "voc", "w64", "wav", "wv", "xwma"),
)
SELF_CONTAINED = (*LOCAL_ONLY, "-format_whitelist", ",".join(CONTAINERS))
FFPROBE_SECONDS = 60  # how long ffprobe may take
# what ffmpeg 5, 6 and 7 write about a packet that is corrupted
NOT_DECODED = (
    *("Error while decoding", "Error submitting packet", "CRC error", "CRC mismatch"),
    "corrupt input packet",
)
# lines of ffmpeg's log that say that audio is missing; all others are warnings
SEVERE = re.compile(r"\[(?:error|fatal|panic)\] |\[warning\] (?=.*corrupt input packet)")
VERIFY_CHECKSUMS = ("-err_detect", "crccheck")  # otherwise it ignores those of most formats
ALAC_PACKET = 4096  # samples
PROBED = "stream=codec_name,duration,sample_rate:format=format_name,nb_streams,duration"


# ffmpeg runs as a process, so that a hostile file cannot crash training, and PyAV 18 is a wheel of
# 36 MB for formats that are rare in corpora. PyAV is faster: it takes 7 ms instead of 175 ms
# for a file of 10 s. With the same check of the length, ffmpeg rejects 43 and PyAV 44 of 54
# corrupted files.
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
        file.check_rate(int(stream["sample_rate"]))
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


def read_by_ffmpeg(file: AudioFile) -> Iterator[np.ndarray]:
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
            raise file.corrupted(f"ffmpeg: {first[:200]}")


def _has_undecoded(file: AudioFile, messages: str) -> bool:
    """Return whether ffmpeg succeeded although a packet was incomplete or could not be decoded.

    The headers of a chained Ogg file's second stream are such packets, and so is the end of ADX.
    `stream_problem` checks Ogg, and `length_problem` checks ADX.
    """
    with file.open_bytes() as content:
        is_checked = content[:4] == b"OggS" or is_adx(content)
    return not is_checked and any(words in messages for words in NOT_DECODED)
