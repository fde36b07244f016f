"""The utterances that sources yield. Their audio is loaded later, possibly in another process."""

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from asrllm.data.audio_file import AudioFile
from asrllm.data.audio_files import open_audio, read_segment
from asrllm.data.waveforms import to_mono
from asrllm.errors import UserError, error_chain
from asrllm.text_files import missing_problem

ARCHIVE_PLACE = re.compile(r"(.*\.ark):\d+", re.DOTALL)


class RejectedError(Exception):
    """An utterance cannot become a sample. Its arguments are (reason, detail).

    The reason is a word to count by; the detail is a message.
    """


def check_installed(error: BaseException, where: str) -> None:
    """Raise UserError if audio cannot be read because a package is missing.

    Args:
        error: the error of the audio's reader.
        where: what was read, as the beginning of the message.
    """
    for link in error_chain(error):
        text = " ".join(str(link).split())
        # Lhotse raises RuntimeError for a missing torchaudio
        if isinstance(link, ImportError) or "install torchaudio" in text:
            raise UserError(
                f"{where} needs a package that is not installed: {text}. For scipy and pyloudnorm "
                "use pip install 'asrllm[cuts]'; torchaudio must have the version of torch."
            ) from error


def no_audio() -> tuple[np.ndarray, int]:
    """Raise RejectedError. This is the `load` of an utterance without audio."""
    raise RejectedError("missing_audio", "the source names no audio")


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One utterance of a source.

    Attributes:
        key: its key.
        text: its transcript.
        load: returns the waveform (samples,) as float32 mono, and the sampling rate in Hz. It is
            picklable, and its repr describes what it loads.
        duration: seconds, if the source states it.
        fields: speaker, lang, and other fields of the sample's JSON.
        file: the audio file, if the utterance is exactly the whole file.
        problem: (reason, detail) if the utterance is rejected before its audio is loaded.
    """

    key: str
    text: str
    load: Callable[[], tuple[np.ndarray, int]] = no_audio
    duration: float | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    file: Path | None = None
    problem: tuple[str, str] | None = None


@dataclass(frozen=True)
class AudioSegment:
    """A `load` that reads a part of an audio file without decoding the rest.

    Attributes:
        audio: path of the file, or a function that opens it.
        start: seconds.
        end: seconds; None means the end of the file.
        channel: counted from 0; None means the mean of all channels.
    """

    audio: Path | Callable[[], BinaryIO]
    start: float = 0.0
    end: float | None = None
    channel: int | None = None

    def __call__(self) -> tuple[np.ndarray, int]:
        wave, rate = read_segment(self._open(), self.start, self.end)
        if self.channel is None:
            return to_mono(wave), rate
        channels = wave.shape[1]
        if self.channel >= channels:
            raise RejectedError(
                "missing_channel",
                f"{str(self.audio)!r} has {channels} channels, but no channel {self.channel}",
            )
        return wave[:, self.channel], rate

    def _open(self) -> AudioFile:
        if not isinstance(self.audio, Path):
            return open_audio("the audio", self.audio().read())
        return open_cached(str(self.audio))


@functools.lru_cache(maxsize=1)  # the parts of a recording usually follow each other
def open_cached(path: str) -> AudioFile:
    """Open an audio file, or return it if it was the last one to be opened.

    Raises:
        RejectedError: the file does not exist, or is a pipe or device.
        UserError: the file cannot be read.
    """
    if not os.path.exists(path):
        detail = f"{path!r} {missing_problem(path)}".rstrip(".")
        archive = ARCHIVE_PLACE.fullmatch(path)
        if archive and os.path.exists(archive[1]):
            detail = (
                f"{path!r} is a place in a Kaldi archive, which only a Kaldi data directory can "
                "name. Use 'asrllm shards make --kaldi DIR' with its wav.scp"
            )
        raise RejectedError("missing_audio", detail)
    if not os.path.isfile(path):  # reading could wait forever
        raise RejectedError(
            "unreadable_audio",
            f"{path!r} is not a regular file. Only 'asrllm transcribe' reads FIFOs",
        )
    return open_audio(path)
