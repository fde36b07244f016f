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
from lhotse.cut import Cut, MixedCut

from asrllm.data.audio_file import AudioFile
from asrllm.data.audio_files import open_audio, read_segment
from asrllm.data.sources.kaldi import run_command
from asrllm.data.sources.utterance import RejectedError, open_cached
from asrllm.data.storage import read_bytes
from asrllm.errors import error_chain

MAX_MIXED = 1 << 28  # samples of a mixed cut, 1 GiB


class Command(str):
    """A shell command that writes an audio file to its standard output."""


class Url(str):
    """The address of an audio file."""


class CutAudioBackend(AudioBackend):
    """The only reader of the audio of cuts.

    Args:
        cut: the cut to read.
    """

    def __init__(self, cut: Cut) -> None:
        self.channel_counts: dict[str, set[int]] = {}  # which the audio sources may have
        for part in [track.cut for track in getattr(cut, "tracks", [])] or [cut]:
            recording = getattr(part, "recording", None)
            for source in recording.sources if recording else []:
                if isinstance(source.source, str):
                    counts = self.channel_counts.setdefault(source.source, set())
                    counts.add(len(source.channels))

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

        Raises:
            RejectedError: the file has more or fewer channels than the recording. Lhotse would
                return other channels than those of the cut.
        """
        end = None if duration is None else offset + duration
        file = _open(path_or_fd)
        wave, rate = read_segment(file, offset, end)
        if isinstance(path_or_fd, str):
            self._check_channels(path_or_fd, wave.shape[1])
        return wave.T, rate

    def _check_channels(self, source: str, count: int) -> None:
        counts = self.channel_counts.get(source, {count})
        if count in counts:
            return
        expected = " or ".join(map(str, sorted(counts)))
        raise RejectedError(
            "missing_channel",
            f"{source!r} is read with {count} channels, but the 'channels' of the audio source "
            f"are {expected}",
        )


def load_cut(cut: Cut) -> tuple[np.ndarray, int]:
    """Read a cut.

    Returns:
        The mean of its channels, (samples,) float32, and its sampling rate in Hz.

    Raises:
        RejectedError: it is a mixed cut that would take more than 1 GiB.
    """
    _check_size(cut)
    before = get_current_audio_backend()
    set_current_audio_backend(CutAudioBackend(cut))
    try:
        wave = cut.load_audio()
    except Exception as error:
        raise _original(error) from error
    finally:
        set_current_audio_backend(before)
    return wave.mean(0, dtype=np.float32), cut.sampling_rate


def _check_size(cut: Cut) -> None:
    """Raise RejectedError for an absurd offset or padding, which no file limits."""
    if not isinstance(cut, MixedCut):
        return
    sizes = [cut.num_samples, *(track.cut.num_samples for track in cut.tracks)]
    largest = max(size for size in sizes if size is not None)
    if largest > MAX_MIXED:
        raise RejectedError(
            "bad_field",
            f"the mixed cut {cut.id!r} has {largest} samples, more than {MAX_MIXED}. "
            "Correct the offsets and the padding of its tracks, or split it",
        )


def _original(error: BaseException) -> BaseException:
    """Return the error that Lhotse replaced by others of the same class with longer messages."""
    chain = list(error_chain(error, contexts=True))
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
