"""Read the audio of Lhotse cuts like all other audio, whatever the name of the file.

Lhotse chooses a reader by the name of a file, and some of its readers (.sph, .opus) insert that
name into a shell command. A file name in a manifest could then run any command. Importing this
module imports Lhotse, which takes seconds.
"""

from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
import soxr
from lhotse import Recording
from lhotse.audio.backend import (
    AudioBackend,
    get_current_audio_backend,
    set_current_audio_backend,
)
from lhotse.augmentation import AudioTransform
from lhotse.cut import Cut, MixedCut

from asrllm.data.audio_file import AudioFile
from asrllm.data.audio_files import open_audio, read_segment
from asrllm.data.index import MAX_DURATION_ERROR
from asrllm.data.sources.kaldi import run_command
from asrllm.data.sources.utterance import RejectedError, open_cached
from asrllm.data.storage import read_bytes
from asrllm.data.waveforms import to_mono
from asrllm.errors import error_chain

MAX_MIXED = 1 << 28  # samples of a mixed cut, 1 GiB


class Command(str):
    """A shell command that writes an audio file to its standard output."""


class Url(str):
    """The address of an audio file."""


class _Declared(NamedTuple):
    """What a manifest says of an audio source.

    Attributes:
        channels: number of channels.
        rate: sampling rate in Hz before transforms.
        duration: seconds before transforms.
    """

    channels: int
    rate: int
    duration: float


class CutAudioBackend(AudioBackend):
    """The only reader of the audio of cuts.

    Args:
        cut: the cut to read.
    """

    def __init__(self, cut: Cut) -> None:
        self.declared: dict[str | bytes, list[_Declared]] = {}  # a file may have several recordings
        for part in [track.cut for track in getattr(cut, "tracks", [])] or [cut]:
            recording = getattr(part, "recording", None)
            for source in recording.sources if recording else []:
                declared = _Declared(len(source.channels), *_before_transforms(recording))
                self.declared.setdefault(source.source, []).append(declared)

    def read_audio(
        self,
        path_or_fd: str | BinaryIO,
        offset: float = 0.0,
        duration: float | None = None,
        force_opus_sampling_rate: int | None = None,
    ) -> tuple[np.ndarray, int]:
        """Read a part of an audio file, at the sampling rate that the manifest says.

        Args:
            path_or_fd: a path, a Command, a Url, or an open file.
            offset: start in seconds.
            duration: length in seconds; None reads to the end.
            force_opus_sampling_rate: ignored; every file is resampled if that is necessary.

        Returns:
            Samples (channels, samples) as float32, and the sampling rate in Hz.

        Raises:
            RejectedError: the file has more or fewer channels than the recording, of which Lhotse
                would return others than those of the cut; or its length is another, which Lhotse
                would repeat or cut off.
        """
        end = None if duration is None else offset + duration
        source = path_or_fd if isinstance(path_or_fd, str) else path_or_fd.read()
        wave, rate = read_segment(_open(source), offset, end)
        declared = self.declared.get(source)
        if declared is None:  # an impulse response
            return wave.T, rate
        _check_channels(source, wave.shape[1], [one.channels for one in declared])
        if end is None:
            _check_duration(offset + len(wave) / rate, [one.duration for one in declared])
        expected = declared[0].rate
        if rate != expected:
            wave = soxr.resample(wave, rate, expected)
        return wave.T, expected


def _before_transforms(recording: Recording) -> tuple[int, float]:
    """Return the sampling rate in Hz and the seconds of a recording's sources."""
    rate = recording.sampling_rate
    duration = recording.duration
    for transform in reversed(recording.transforms or []):
        if isinstance(transform, dict):
            transform = AudioTransform.from_dict(transform)
        _, seconds = transform.reverse_timestamps(0.0, duration, rate)
        duration = duration if seconds is None else seconds
        rate = getattr(transform, "source_sampling_rate", rate)
    return rate, duration


def _check_channels(source: str | bytes, count: int, declared: Sequence[int]) -> None:
    """Raise RejectedError if the number of a file's channels is not one of those declared."""
    if count in declared:
        return
    name = source if isinstance(source, str) else "the recording"
    expected = " or ".join(map(str, sorted(set(declared))))
    raise RejectedError(
        "missing_channel",
        f"{name!r} is read with {count} channels, but the 'channels' of the audio source "
        f"are {expected}",
    )


def _check_duration(seconds: float, declared: Sequence[float]) -> None:
    """Raise RejectedError if a file's length is not one of those declared."""
    if all(abs(seconds - duration) > MAX_DURATION_ERROR for duration in declared):
        raise RejectedError(
            "duration_mismatch",
            f"the recording says {declared[0]:.3f} s, the audio has {seconds:.3f} s",
        )


def load_source(source: str | bytes, channels: int) -> tuple[np.ndarray, int]:
    """Read a whole audio source of a cut.

    Args:
        source: a path, a Command, a Url, or the content of a file.
        channels: number of channels that it must have.

    Returns:
        The mean of its channels, (samples,) float32, and its sampling rate in Hz.

    Raises:
        RejectedError: the file has more or fewer channels.
    """
    wave, rate = read_segment(_open(source))
    _check_channels(source, wave.shape[1], [channels])
    return to_mono(wave), rate


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


def _open(source: str | bytes) -> AudioFile:
    if isinstance(source, Command):
        return open_audio(str(source), run_command(str(source)))
    if isinstance(source, Url):
        return open_audio(str(source), read_bytes(str(source)))
    if isinstance(source, bytes):
        return open_audio("the recording", source)
    return open_cached(source)
