"""Read the audio of Lhotse cuts like all other audio, whatever the name of the file.

Lhotse chooses a reader by the name of a file, and some of its readers (.sph, .opus) insert that
name into a shell command. A file name in a manifest could then run any command. Importing this
module imports Lhotse, which takes seconds.
"""

from typing import BinaryIO

import numpy as np
from lhotse.audio.backend import (
    AudioBackend,
    get_current_audio_backend,
    set_current_audio_backend,
)
from lhotse.cut import Cut

from asrllm.data.audio_files import AudioFile, open_audio, read_stretch
from asrllm.data.sources.kaldi import run_command
from asrllm.data.sources.utterance import RejectedError, open_cached
from asrllm.data.storage import read_bytes


class Command(str):
    """A shell command that writes an audio file to its standard output."""


class Url(str):
    """The address of an audio file."""


class CutAudioBackend(AudioBackend):
    """The only reader of the audio of cuts."""

    def read_audio(
        self,
        path_or_fd: str | BinaryIO,
        offset: float = 0.0,
        duration: float | None = None,
        force_opus_sampling_rate: int | None = None,
    ) -> tuple[np.ndarray, int]:
        """Read a part of an audio file.

        Args:
            path_or_fd: a path, a Command, a Url, or an open file.
            offset: start in seconds.
            duration: length in seconds; None reads to the end.
            force_opus_sampling_rate: ignored; the file's own rate is used.

        Returns:
            Samples (channels, samples) as float32, and the sampling rate in Hz.
        """
        end = None if duration is None else offset + duration
        wave, rate = read_stretch(_open(path_or_fd), offset, end)
        return wave.T, rate


def load_cut(cut: Cut) -> tuple[np.ndarray, int]:
    """Return the mean of a cut's channels, (samples,) float32, and its sampling rate in Hz."""
    before = get_current_audio_backend()
    set_current_audio_backend(CutAudioBackend())
    try:
        wave = cut.load_audio()
    except Exception as error:
        raise _original(error) from error
    finally:
        set_current_audio_backend(before)
    return wave.mean(0, dtype=np.float32), cut.sampling_rate


def _original(error: BaseException) -> BaseException:
    """Return the error that Lhotse replaced by others of the same class with longer messages."""
    chain = [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    rejected = [link for link in chain if isinstance(link, RejectedError)]
    return rejected[-1] if rejected else chain[-1]


def _open(source: str | BinaryIO) -> AudioFile:
    if isinstance(source, Command):
        return open_audio(str(source), run_command(str(source)))
    if isinstance(source, Url):
        return open_audio(str(source), read_bytes(str(source)))
    if not isinstance(source, str):
        return open_audio("the recording", source.read())
    return open_cached(source)
