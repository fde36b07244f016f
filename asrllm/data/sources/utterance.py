"""What every source gives: utterances whose audio is loaded later, in another process perhaps."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile


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
    load: Callable[[], tuple[np.ndarray, int]] = no_audio  # picklable, with a repr that says what it loads
    duration: float | None = None  # in seconds, where the source says one
    fields: dict[str, Any] = field(default_factory=dict)  # speaker, lang, ...
    file: Path | None = None
    problem: tuple[str, str] | None = None


@dataclass(frozen=True)
class Stretch:
    """Loads an audio file from `start` to `end` seconds without decoding the rest. audio: its path, or what opens it."""

    audio: Path | Callable[[], BinaryIO]
    start: float = 0.0
    end: float | None = None

    def __call__(self) -> tuple[np.ndarray, int]:
        if isinstance(self.audio, Path) and not os.path.exists(self.audio):
            raise RejectedError("missing_audio", f"{str(self.audio)!r} does not exist")
        with soundfile.SoundFile(self.audio if isinstance(self.audio, Path) else self.audio()) as file:
            begin = round(self.start * file.samplerate)
            if begin > file.frames:
                raise RejectedError(
                    "duration_mismatch", f"it begins at {self.start} s, the audio has {file.frames / file.samplerate:.3f} s"
                )
            if begin:
                file.seek(begin)
            frames = -1 if self.end is None else round((self.end - self.start) * file.samplerate)
            wave = file.read(frames, dtype="float32", always_2d=True)
            return wave[:, 0] if wave.shape[1] == 1 else wave.mean(1), file.samplerate
