"""What every source gives: utterances whose audio is loaded later, in another process perhaps."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from asrllm.audio.stream import AudioFile, open_audio, read_stretch


class RejectedError(Exception):
    """Why an utterance does not become a sample: (reason, detail). The reason is a word to count by."""


def no_audio() -> tuple[np.ndarray, int]:
    raise RejectedError("missing_audio", "the source names no audio")


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One utterance of a source. `load()` gives (waveform (samples,) float32 mono, sampling rate in Hz).

    file: the audio file, where the utterance is exactly the whole of it. problem: (reason, detail) of one that is rejected unloaded.
    """

    key: str
    text: str
    load: Callable[[], tuple[np.ndarray, int]] = (
        no_audio  # picklable, with a repr that says what it loads
    )
    duration: float | None = None  # in seconds, where the source says one
    fields: dict[str, Any] = field(default_factory=dict)  # speaker, lang, ...
    file: Path | None = None
    problem: tuple[str, str] | None = None


@dataclass(frozen=True)
class Stretch:
    """Loads a part of an audio file without decoding the rest.

    Attributes:
        audio: its path, or what opens it.
        start: in seconds.
        end: in seconds; None is the end of the file.
        channel: from 0; None is the mean of all.
    """

    audio: Path | Callable[[], BinaryIO]
    start: float = 0.0
    end: float | None = None
    channel: int | None = None

    def __call__(self) -> tuple[np.ndarray, int]:
        if not isinstance(self.audio, Path):
            file = open_audio("the audio", self.audio().read())
        elif self.audio.is_fifo():  # nothing may ever write to it
            raise RejectedError(
                "unreadable_audio",
                f"{str(self.audio)!r} is a FIFO, which 'asrllm transcribe' alone reads",
            )
        elif os.path.exists(self.audio):
            file = opened(str(self.audio))
        else:
            raise RejectedError("missing_audio", f"{str(self.audio)!r} does not exist")
        wave, rate = read_stretch(file, self.start, self.end)
        if self.channel is None:
            return wave[:, 0] if wave.shape[1] == 1 else wave.mean(1), rate
        if self.channel >= wave.shape[1]:
            raise RejectedError(
                "missing_channel",
                f"{str(self.audio)!r} has {wave.shape[1]} channels, none is {self.channel}",
            )
        return wave[:, self.channel], rate


@functools.lru_cache(maxsize=1)  # the parts of one recording follow each other
def opened(path: str) -> AudioFile:
    return open_audio(path)
