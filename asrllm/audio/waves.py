"""Convert the audio that callers pass, files or arrays, to a batch of waveforms."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from asrllm.audio.reader import read_audio
from asrllm.data.waveforms import resample
from asrllm.defaults import RATE
from asrllm.errors import UserError


class ExtractsFeatures(nn.Module):
    """An encoder that computes the features of raw audio.

    Attributes:
        features: see `AudioEncoder`.
        shortest: the smallest number of samples at 16 kHz that it accepts.
    """

    features: nn.Module
    shortest: int = 1

    @torch.no_grad()
    def extract_feature(self, audio: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Compute the features that `generate` takes instead of audio.

        Args:
            audio: files, float arrays or tensors at 16 kHz, or pairs (array, rate in Hz).

        Returns:
            Features (N, T, F) and the number of frames of each (N,), on the encoder's device.

        Raises:
            UserError: an audio cannot be read, or is too short for one frame. The message gives its
                index in the list.
        """
        found = []
        for i, item in enumerate(as_list(audio)):
            wave = read_wave(item, i)
            if len(wave) < self.shortest:
                raise UserError(
                    f"{audio_name(item, i)} is too short: it has {len(wave)} samples at 16 kHz. "
                    "Give a longer recording."
                )
            found.append(wave)
        waves, lengths = padded(found)
        device = next(self.parameters()).device
        features, frames = self.features(waves.to(device), lengths.to(device))
        return features, frames


def padded(waves: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Pad waveforms (samples,) of different lengths with zeros.

    Returns:
        Waveforms (N, samples) and their lengths (N,).
    """
    tensors = [torch.from_numpy(wave) for wave in waves]
    lengths = torch.tensor([len(wave) for wave in waves])
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True), lengths


def read_wave(item: object, i: int) -> np.ndarray:
    """Return the i-th audio of a list as (samples,) float32 at RATE."""
    if isinstance(item, (str, Path)):
        return read_audio(item)
    return read_array(item, audio_name(item, i))


def audio_name(item: object, i: int) -> str:
    """Return the name of the i-th audio of a list in error messages."""
    if isinstance(item, (str, Path)):
        return f"audio {i} ({str(item)!r})"
    return f"audio {i}"


def as_list(audio: object) -> list[Any]:
    """Return audios as a list.

    Raises:
        UserError: the value is a single audio, or not audio, or an empty list.
    """
    if not isinstance(audio, (list, tuple)) or _is_pair(audio):
        raise UserError(
            f"the input has the type {type(audio).__name__}. "
            "Pass a list of audios, [audio], or features as (x, x_lens)."
        )
    if not audio:
        raise UserError("the list of audios is empty. Pass at least one audio.")
    return list(audio)


def _is_pair(item: object) -> bool:
    """Return whether an audio is a pair (array, rate)."""
    if not isinstance(item, tuple) or len(item) != 2:
        return False
    return isinstance(item[1], (int, float, np.number)) and not isinstance(item[1], bool)


def read_array(item: Any, name: str) -> np.ndarray:
    """Convert samples to (samples,) float32 at RATE.

    Args:
        item: a float array or tensor at 16 kHz, or a pair (array, rate in Hz).
        name: the audio's name in error messages.

    Raises:
        UserError: these are not the samples of one channel, or the rate is not in Hz.
    """
    rate = RATE
    if _is_pair(item):
        item, rate = item
    if isinstance(item, Tensor):
        item = item.detach().cpu()
        if item.is_floating_point():
            item = item.float()  # numpy has no bfloat16
        item = item.numpy()
    try:
        wave = np.asarray(item)
    except ValueError as error:  # rows of different lengths
        raise UserError(
            f"{name} is not an array of samples: {str(error).rstrip('.')}. "
            "Pass a one-dimensional array."
        ) from error
    if wave.ndim != 1:
        raise UserError(
            f"{name} has the shape {wave.shape}. Pass one channel, for example the mean of all."
        )
    if not len(wave):
        raise UserError(f"{name} is empty. Remove it.")
    if not np.issubdtype(wave.dtype, np.floating):
        raise UserError(
            f"{name} has samples of type {wave.dtype}. "
            "Pass floats from -1 to 1. Divide 16-bit samples by 32768."
        )
    if not np.isfinite(wave).all():
        raise UserError(f"{name} has NaN or infinite values. Remove them.")
    if not 1000 <= rate <= 1_000_000:
        raise UserError(f"{name} has the sampling rate {rate}. Pass it in Hz: (array, 48000).")
    with np.errstate(over="ignore"):
        single = wave.astype(np.float32)
    if not np.isfinite(single).all():
        raise UserError(f"{name} has samples that overflow float32. Pass floats from -1 to 1.")
    return np.ascontiguousarray(resample(single, int(rate)))
