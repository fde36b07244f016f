"""Features on the waveform's device: Whisper's log-mel spectrogram and Kaldi's filter banks.

Both take waveforms of different lengths, padded with zeros to one length, and ignore the padding.
"""

import functools
import math
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from asrllm.defaults import RATE, WHISPER_WINDOW

WHISPER_HOP = 160  # samples: 10 ms
WHISPER_FFT = 400  # samples: 25 ms
KALDI_HOP = 160
KALDI_WINDOW = 400
KALDI_FFT = 512
LOG_EPSILON = 1.1920928955078125e-07  # float32's machine epsilon, Kaldi's floor

Count = TypeVar("Count", int, np.ndarray, Tensor)


class WhisperFeatures(nn.Module):
    """Whisper's log-mel spectrogram (Radford et al., 2022), 100 frames per second.

    It has Slaney mel filters and log10, clipped to 8 below the maximum. The maximum is over the
    true frames of one utterance, so that the other utterances of a batch change nothing.
    """

    def __init__(self, num_mel_bins: int = 80, pad_to_30s: bool = False) -> None:
        """
        Args:
            num_mel_bins: features per frame.
            pad_to_30s: pad the waveform with silence to 30 s, as OpenAI's code does.
        """
        super().__init__()
        self.num_mel_bins = num_mel_bins
        self.pad_to_30s = pad_to_30s

    def forward(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the features of a batch.

        Args:
            waves: (N, samples) float32 at 16 kHz.
            lengths: (N,) samples of each.

        Returns:
            Features (N, T, num_mel_bins) float32, and the numbers of true frames (N,), which are
            samples // 160. T is 3000 with pad_to_30s, and the largest of these numbers otherwise.
        """
        true_frames = whisper_frames(lengths)
        frames = true_frames
        if self.pad_to_30s:
            samples = round(WHISPER_WINDOW * RATE)
            waves = nn.functional.pad(waves[:, :samples], (0, max(0, samples - waves.shape[1])))
            lengths = torch.full_like(lengths, samples)
            frames = whisper_frames(lengths)
        window = torch.hann_window(WHISPER_FFT, device=waves.device)
        padded = reflect_at_end(waves, lengths, WHISPER_FFT // 2)
        spectrum = torch.stft(
            padded, WHISPER_FFT, WHISPER_HOP, window=window, center=False, return_complex=True
        )
        power = spectrum[..., : int(frames.max())].abs().square()
        filters = torch.from_numpy(slaney_mel(self.num_mel_bins)).to(waves.device)
        log = torch.log10((filters @ power).clamp(min=1e-10))  # (N, mel, T)
        valid = torch.arange(log.shape[2], device=log.device) < frames[:, None]
        masked = log.masked_fill(~valid[:, None], -torch.inf)
        loudest = masked.amax((1, 2), keepdim=True)
        features = (torch.maximum(log, loudest - 8.0) + 4.0) / 4.0
        return features.mul(valid[:, None]).transpose(1, 2), true_frames


def whisper_frames(samples: Count) -> Count:
    """Return the number of Whisper's frames for a number of samples."""
    return samples // WHISPER_HOP


def reflect_at_end(waves: Tensor, lengths: Tensor, pad: int) -> Tensor:
    """Mirror every row at both ends of its own waveform.

    Args:
        waves: (N, samples).
        lengths: (N,) samples of each.
        pad: samples to add at each end.

    Returns:
        (N, samples + 2 * pad).
    """
    n = waves.shape[1]
    positions = torch.arange(-pad, n + pad, device=waves.device)
    positions = positions.expand(len(waves), -1).abs()
    last = (lengths - 1)[:, None]
    mirrored = torch.where(positions > last, 2 * last - positions, positions)
    inside = (mirrored >= 0) & (mirrored < lengths[:, None])
    return waves.gather(1, mirrored.clamp(0, n - 1)) * inside


@functools.cache
def slaney_mel(bins: int, fft: int = WHISPER_FFT, rate: int = RATE) -> np.ndarray:
    """Return triangular filters of unit area on Slaney's mel scale.

    The scale is linear up to 1 kHz and logarithmic above.

    Returns:
        (bins, fft // 2 + 1) float32.
    """

    def to_hz(mel: np.ndarray) -> np.ndarray:
        linear = mel * 200 / 3
        logarithmic = 1000 * np.exp((mel - 15) * math.log(6.4) / 27)
        return np.where(mel < 15, linear, logarithmic)

    top = 15 + 27 * math.log(rate / 2 / 1000) / math.log(6.4)
    edges = to_hz(np.linspace(0, top, bins + 2))
    hz = np.linspace(0, rate / 2, fft // 2 + 1)
    height = 2 / (edges[2:] - edges[:-2])
    filters = triangles(edges, hz) * height[:, None]
    return filters.astype(np.float32)


def triangles(edges: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Evaluate triangles of height 1.

    Args:
        edges: (n + 2,) where a triangle begins, the next one peaks and the one after that ends.
        points: (p,) where to evaluate them.

    Returns:
        (n, p).
    """
    width = np.diff(edges)[:, None]
    rising = (points - edges[:-2, None]) / width[:-1]
    falling = (edges[2:, None] - points) / width[1:]
    return np.maximum(0, np.minimum(rising, falling))


class KaldiFeatures(nn.Module):
    """Kaldi's log-mel filter banks with the settings of icefall.

    Windows are Povey's, 25 ms long and 10 ms apart. Edges are extended by reflection
    (snip_edges=False). Dither is off, DC is removed and the pre-emphasis is 0.97. Filters reach
    from 20 Hz to 400 Hz below Nyquist. The power spectrum and the natural logarithm are used.
    """

    def __init__(self, num_mel_bins: int = 80) -> None:
        super().__init__()
        self.num_mel_bins = num_mel_bins

    def forward(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the features of a batch.

        Args:
            waves: (N, samples) float32 in [-1, 1] at 16 kHz.
            lengths: (N,) samples of each.

        Returns:
            Features (N, T, num_mel_bins) and the numbers of frames (N,), which are
            (samples + 80) // 160.
        """
        counts = kaldi_frames(lengths)
        hops = torch.arange(int(counts.max()), device=waves.device) * KALDI_HOP
        starts = hops - (KALDI_WINDOW - KALDI_HOP) // 2
        offsets = torch.arange(KALDI_WINDOW, device=waves.device)
        positions = starts[:, None] + offsets  # (T, window)
        last = (lengths - 1)[:, None, None]
        positions = torch.where(positions < 0, -positions - 1, positions)
        positions = positions.expand(len(waves), -1, -1)  # (N, T, window)
        positions = torch.where(positions > last, 2 * last - positions + 1, positions).clamp(min=0)
        flat = positions.flatten(1).clamp(max=waves.shape[1] - 1)
        frames = waves.gather(1, flat).view(positions.shape)
        frames = frames - frames.mean(2, keepdim=True)
        previous = torch.cat([frames[..., :1], frames[..., :-1]], 2)
        frames = (frames - 0.97 * previous) * povey_window(waves.device)
        power = torch.fft.rfft(frames, KALDI_FFT).abs().square()
        filters = torch.from_numpy(kaldi_mel(self.num_mel_bins)).to(waves.device)
        features = (power @ filters.T).clamp(min=LOG_EPSILON).log()
        valid = torch.arange(features.shape[1], device=waves.device) < counts[:, None]
        return features * valid[..., None], counts


def kaldi_frames(samples: Count) -> Count:
    """Return the number of Kaldi's frames for a number of samples."""
    return (samples + KALDI_HOP // 2) // KALDI_HOP


def povey_window(device: torch.device) -> Tensor:
    """Return Kaldi's window, a Hann window to the power of 0.85."""
    return torch.hann_window(KALDI_WINDOW, periodic=False, device=device).pow(0.85)


@functools.cache
def kaldi_mel(bins: int, low: float = 20.0, high: float = RATE / 2 - 400) -> np.ndarray:
    """Return triangular filters of equal width on Kaldi's mel scale, 1127 ln(1 + f / 700).

    Returns:
        (bins, KALDI_FFT // 2 + 1) float32.
    """

    def to_mel(hz: np.ndarray | float) -> np.ndarray:
        return 1127.0 * np.log1p(np.asarray(hz) / 700.0)

    edges = np.linspace(to_mel(low), to_mel(high), bins + 2)
    mel = to_mel(np.arange(KALDI_FFT // 2 + 1) * RATE / KALDI_FFT)
    filters = triangles(edges, mel)
    filters[:, -1] = 0  # Kaldi omits the Nyquist bin
    return filters.astype(np.float32)
