"""Audio as a caller has it, a file or an array, to a batch of waveforms."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from asrllm.audio.reader import read_audio, resample
from asrllm.defaults import RATE
from asrllm.errors import UserError


class ExtractsFeatures(nn.Module):
    """An encoder that computes the features of raw audio."""

    features: nn.Module

    @torch.no_grad()
    def extract_feature(self, audio: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Compute the features that `generate` takes instead of audio.

        Args:
            audio: files, float arrays or tensors at 16 kHz, or pairs (array, rate in Hz).

        Returns:
            Features (N, T, F) and the number of frames of each (N,), on the encoder's device.

        Raises:
            UserError: an audio cannot be read; it is named by its place in the list.
        """
        items = as_list(audio)
        waves, lengths = padded(items, [read_wave(item, i) for i, item in enumerate(items)])
        device = next(self.parameters()).device
        features, frames = self.features(waves.to(device), lengths.to(device))
        return features, frames


def padded(items: Sequence[Any], waves: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Return waveforms of different lengths as (N, samples), with their lengths (N,)."""
    if not items:
        raise UserError("the list of audios is empty: give one at least")
    tensors = [torch.from_numpy(wave) for wave in waves]
    lengths = torch.tensor([len(wave) for wave in waves])
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True), lengths


def read_wave(item: Any, i: int) -> np.ndarray:
    """Return the i-th audio of a list as (samples,) float32 at RATE."""
    return (
        read_audio(item) if isinstance(item, (str, Path)) else read_array(item, audio_name(item, i))
    )


def audio_name(item: Any, i: int) -> str:
    """What a UserError calls the i-th audio."""
    return f"audio {i} ({str(item)!r})" if isinstance(item, (str, Path)) else f"audio {i}"


def as_list(audio: Any) -> list[Any]:
    """A list of audios. Raises UserError for what is one audio by itself."""
    alone = isinstance(audio, (str, Path, np.ndarray, Tensor)) or (
        isinstance(audio, tuple) and len(audio) == 2 and _is_rate(audio[1])
    )
    if alone or not isinstance(audio, (list, tuple)):
        raise UserError(
            f"the input is a {type(audio).__name__}: give a list of audios, [audio], or features as (x, x_lens)"
        )
    return list(audio)


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def read_array(item: Any, name: str) -> np.ndarray:
    """A float array or tensor at 16 kHz, or a pair (array, rate) -> (samples,) float32 at RATE.

    name: what a UserError calls it.
    """
    item, rate = (
        item if isinstance(item, tuple) and len(item) == 2 and _is_rate(item[1]) else (item, RATE)
    )
    if isinstance(item, Tensor):
        item = item.detach().cpu()
        item = (item.float() if item.is_floating_point() else item).numpy()  # numpy has no bfloat16
    try:
        wave = np.asarray(item)
    except ValueError as error:  # rows of different lengths
        raise UserError(f"{name} is no array of samples: {error}") from error
    if wave.ndim != 1:
        raise UserError(
            f"{name} has the shape {wave.shape}: give one channel of samples, such as the mean of them"
        )
    if not len(wave):
        raise UserError(f"{name} is empty")
    if not np.issubdtype(wave.dtype, np.floating):
        raise UserError(
            f"{name} holds samples of the type {wave.dtype}: give floats from -1 to 1, 16-bit samples divided by 32768"
        )
    if not np.isfinite(wave).all():
        raise UserError(f"{name} holds NaN or infinite values")
    if not 1000 <= rate <= 1_000_000:
        raise UserError(f"{name} has the sampling rate {rate}: give it in Hz, (array, 48000)")
    with np.errstate(over="ignore"):
        single = wave.astype(np.float32)
    if not np.isfinite(single).all():
        raise UserError(
            f"{name} holds samples beyond the numbers of float32: give floats from -1 to 1"
        )
    return np.ascontiguousarray(resample(single, int(rate)))
