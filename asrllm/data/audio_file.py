"""An audio file whose header has been read, and the errors that describe it."""

import contextlib
import mmap
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

import soundfile

from asrllm.defaults import RATE
from asrllm.errors import UserError

BLOCK_SAMPLES = 1 << 16  # samples of each channel, at the file's own rate
# the best-known formats that soundfile reads
FORMATS = ("wav", "flac", "mp3", "ogg", "opus", "aiff", "au", "caf", "w64")
# Hz; 1 Hz would make a day of a few seconds, and only ultrasound needs more than 192 kHz
MIN_RATE = 1000
MAX_RATE = 1_000_000
ADDRESS = re.compile(r" ?(?:at|@) 0x[0-9a-f]+")
# libsndfile's message about an unknown format that is named like another one
MISLEADING = re.compile(r"does not exist or is not a regular file")


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
        codec: the name of its codec, if ffmpeg reads it.
        rate: its sampling rate in Hz, if ffmpeg reads it.
        channels: its number of channels, if ffmpeg reads it.
    """

    path: str
    seconds: float | None
    decoder: str = "soundfile"
    content: bytes | None = None
    frames: int | None = None
    codec: str = ""
    rate: int = RATE
    channels: int = 1

    def error(self, problem: str) -> UserError:
        """Return the error for a problem with this file."""
        return UserError(f"the audio file {self.path!r} {problem}")

    def corrupted(self, problem: str) -> UserError:
        """Return the error for content that cannot be decoded."""
        return self.error(f"is corrupted ({problem}). Copy it again.")

    def check_rate(self, rate: int) -> None:
        """Raise UserError for a sampling rate in Hz that no recording has."""
        if not MIN_RATE <= rate <= MAX_RATE:
            raise self.error(
                f"has a sampling rate of {rate} Hz, which is not between {MIN_RATE} and "
                f"{MAX_RATE} Hz. Correct its header, or copy it again."
            )

    @contextlib.contextmanager
    def open_sound(self) -> Iterator[soundfile.SoundFile]:
        """Open the file with soundfile."""
        with contextlib.ExitStack() as stack:
            source: str | int | BinaryIO = self.path
            if self.content is not None:
                source = BytesIO(self.content)
            elif not is_utf8(self.path) or self.path.lower().endswith(".raw"):
                # soundfile rejects such a name, even of a file with a header
                source = stack.enter_context(open(self.path, "rb")).fileno()
            yield stack.enter_context(soundfile.SoundFile(source, closefd=False))

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


def decoder_error(error: Exception) -> str:
    """Return the message of a decoder on one line, without addresses in memory."""
    text = ADDRESS.sub("", str(getattr(error, "error_string", error)))
    if MISLEADING.search(text):
        return "its format is not known"
    return " ".join(text.split()).rstrip(".")
