"""Read the audio of Lhotse cuts with soundfile, whatever the name of the file.

Lhotse chooses a reader by the name of a file, and some of its readers (.sph, .opus) put that name into
a shell command. A file name in a manifest could then run any command. This module imports Lhotse,
which takes seconds.
"""

import io
import os
from typing import Any

import numpy as np
import soundfile
from lhotse.audio.backend import (
    AudioBackend,
    get_current_audio_backend,
    set_current_audio_backend,
)
from lhotse.utils import compute_num_samples

from asrllm.data.sources.kaldi import run_command
from asrllm.data.sources.utterance import RejectedError
from asrllm.data.storage import read_bytes


class Command(str):
    """A shell command that writes an audio file to its standard output."""


class Url(str):
    """The address of an audio file."""


class CutAudioBackend(AudioBackend):
    """The only reader of the audio of cuts."""

    def read_audio(
        self,
        path_or_fd: Any,
        offset: float = 0.0,
        duration: float | None = None,
        force_opus_sampling_rate: int | None = None,
    ) -> tuple[np.ndarray, int]:
        """Read a part of an audio file.

        Args:
            path_or_fd: a path, a Command, a Url, or an open file.
            offset: start in seconds.
            duration: length in seconds; None reads to the end.
            force_opus_sampling_rate: ignored; libsndfile knows the rate.

        Returns:
            Samples (channels, samples) as float32, and the sampling rate in Hz.
        """
        with soundfile.SoundFile(_open(path_or_fd)) as file:
            rate = file.samplerate
            if offset > 0:
                file.seek(compute_num_samples(offset, rate))
            frames = -1 if duration is None else compute_num_samples(duration, rate)
            return file.read(frames, dtype="float32", always_2d=True).T, rate


def load_cut(cut: Any) -> tuple[np.ndarray, int]:
    """Return the mean of a cut's channels, (samples,) float32, and its sampling rate in Hz."""
    before = get_current_audio_backend()
    set_current_audio_backend(CutAudioBackend())
    try:
        wave = cut.load_audio()
    except Exception as error:
        # Lhotse replaces each error by one of the same class with a longer text
        raise _first_cause(error) from error
    finally:
        set_current_audio_backend(before)
    return wave.mean(0, dtype=np.float32), cut.sampling_rate


def _first_cause(error: BaseException) -> BaseException:
    while error.__context__ is not None and not isinstance(error, RejectedError):
        error = error.__context__
    return error


def _open(source: Any) -> Any:
    if isinstance(source, Command):
        return io.BytesIO(run_command(str(source)))
    if isinstance(source, Url):
        return io.BytesIO(read_bytes(str(source)))
    if isinstance(source, str) and not os.path.isfile(source):
        raise RejectedError("missing_audio", f"{source!r} does not exist")
    return source
