"""Features on the waveform's device: Whisper's log-mel spectrogram and Kaldi's log-mel filter banks.

Both take waveforms of different lengths, padded with zeros to one length, and give the frames of the true lengths only.
"""

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from asrllm.data.index import RATE

WHISPER_HOP, WHISPER_WINDOW = 160, 400  # samples: 10 ms, 25 ms
KALDI_HOP, KALDI_WINDOW, KALDI_FFT = 160, 400, 512
LOG_EPSILON = 1.1920928955078125e-07  # float32's machine epsilon, Kaldi's floor


class WhisperFeatures(nn.Module):
    """Log-mel spectrogram of Whisper (Radford et al., 2022): Slaney mel filters, log10, clipped to 8 below the maximum.

    The maximum is an utterance's own, over its true frames: what it is batched with changes nothing. With `pad_to_30s` the frames are
    those of the waveform padded with silence to 30 s, as in OpenAI's code. 100 frames a second.
    """

    def __init__(self, num_mel_bins: int = 80, pad_to_30s: bool = False) -> None:
        super().__init__()
        self.num_mel_bins, self.pad_to_30s = num_mel_bins, pad_to_30s

    def forward(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """waves: (N, samples) float32 at 16 kHz, lengths: (N,) -> features (N, T, num_mel_bins) float32, lengths (N,) = samples // 160.

        T is 3000 with pad_to_30s, the longest of the lengths otherwise; the lengths are the true ones in both cases.
        """
        frames = true_frames = whisper_frames(lengths)
        if self.pad_to_30s:
            waves = nn.functional.pad(
                waves[:, : 30 * RATE], (0, 30 * RATE - min(waves.shape[1], 30 * RATE))
            )
            lengths = torch.full_like(lengths, 30 * RATE)
            frames = whisper_frames(lengths)
        window = torch.hann_window(WHISPER_WINDOW, device=waves.device)
        padded = reflect_at_end(waves, lengths, WHISPER_WINDOW // 2)
        spectrum = torch.stft(
            padded, WHISPER_WINDOW, WHISPER_HOP, window=window, center=False, return_complex=True
        )
        power = spectrum[..., : int(frames.max())].abs().square()
        filters = torch.from_numpy(slaney_mel(self.num_mel_bins)).to(waves.device)
        log = torch.log10((filters @ power).clamp(min=1e-10))  # (N, mel, T)
        valid = torch.arange(log.shape[2], device=log.device) < frames[:, None]
        loudest = log.masked_fill(~valid[:, None], -torch.inf).amax((1, 2), keepdim=True)
        features = (torch.maximum(log, loudest - 8.0) + 4.0) / 4.0
        return features.mul(valid[:, None]).transpose(1, 2), true_frames


def whisper_frames(samples: Any) -> Any:
    """Frames that so many samples give: an int, array or tensor, as given."""
    return samples // WHISPER_HOP


def reflect_at_end(waves: Tensor, lengths: Tensor, pad: int) -> Tensor:
    """(N, samples) -> (N, samples + 2 pad): every row mirrored at its own two ends, as if it were alone."""
    n = waves.shape[1]
    at = torch.arange(-pad, n + pad, device=waves.device).expand(len(waves), -1).abs()
    last = (lengths - 1)[:, None]
    mirrored = torch.where(at > last, 2 * last - at, at)
    inside = (mirrored >= 0) & (mirrored < lengths[:, None])
    return waves.gather(1, mirrored.clamp(0, n - 1)) * inside


@functools.cache
def slaney_mel(bins: int, fft: int = WHISPER_WINDOW, rate: int = RATE) -> np.ndarray:
    """(bins, fft // 2 + 1) triangular filters on Slaney's mel scale (linear to 1 kHz, then logarithmic), each of unit area."""

    def to_hz(mel: np.ndarray) -> np.ndarray:
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * math.log(6.4) / 27))

    top = 15 + 27 * math.log(rate / 2 / 1000) / math.log(6.4)
    edges = to_hz(np.linspace(0, top, bins + 2))
    hz = np.linspace(0, rate / 2, fft // 2 + 1)
    rising = (hz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - hz) / (edges[2:] - edges[1:-1])[:, None]
    area = 2 / (edges[2:] - edges[:-2])
    return (np.maximum(0, np.minimum(rising, falling)) * area[:, None]).astype(np.float32)


class KaldiFeatures(nn.Module):
    """Kaldi's log-mel filter banks as icefall uses them: 25 ms Povey windows every 10 ms, edges snapped to whole frames by reflection
    (snip_edges=False), no dither, pre-emphasis 0.97, DC removed, 20 Hz to 400 Hz below Nyquist, power spectrum, natural logarithm."""

    def __init__(self, num_mel_bins: int = 80) -> None:
        super().__init__()
        self.num_mel_bins = num_mel_bins

    def forward(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """waves: (N, samples) float32 in [-1, 1] at 16 kHz -> features (N, T, num_mel_bins), lengths (N,) = (samples + 80) // 160."""
        counts = kaldi_frames(lengths)
        starts = (
            torch.arange(int(counts.max()), device=waves.device) * KALDI_HOP
            - (KALDI_WINDOW - KALDI_HOP) // 2
        )
        at = starts[:, None] + torch.arange(KALDI_WINDOW, device=waves.device)  # (T, window)
        last = (lengths - 1)[:, None, None]
        at = torch.where(at < 0, -at - 1, at).expand(len(waves), -1, -1)
        at = torch.where(at > last, 2 * last - at + 1, at).clamp(min=0)
        frames = waves.gather(1, at.flatten(1).clamp(max=waves.shape[1] - 1)).view(at.shape)
        frames = frames - frames.mean(2, keepdim=True)
        before = torch.cat([frames[..., :1], frames[..., :-1]], 2)
        frames = (frames - 0.97 * before) * povey_window(waves.device)
        power = torch.fft.rfft(frames, KALDI_FFT).abs().square()
        filters = torch.from_numpy(kaldi_mel(self.num_mel_bins)).to(waves.device)
        features = (power @ filters.T).clamp(min=LOG_EPSILON).log()
        valid = torch.arange(features.shape[1], device=waves.device) < counts[:, None]
        return features * valid[..., None], counts


def kaldi_frames(samples: Any) -> Any:
    """As whisper_frames."""
    return (samples + KALDI_HOP // 2) // KALDI_HOP


def povey_window(device: torch.device) -> Tensor:
    return torch.hann_window(KALDI_WINDOW, periodic=False, device=device).pow(0.85)


@functools.cache
def kaldi_mel(bins: int, low: float = 20.0, high: float = RATE / 2 - 400) -> np.ndarray:
    """(bins, KALDI_FFT // 2 + 1) triangles of equal width on Kaldi's mel scale, 1127 ln(1 + f / 700)."""

    def to_mel(hz: np.ndarray | float) -> np.ndarray:
        return 1127.0 * np.log1p(np.asarray(hz) / 700.0)

    edges = np.linspace(to_mel(low), to_mel(high), bins + 2)
    mel = to_mel(np.arange(KALDI_FFT // 2 + 1) * RATE / KALDI_FFT)
    rising = (mel - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - mel) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.maximum(0, np.minimum(rising, falling))
    filters[:, -1] = 0  # Kaldi leaves the Nyquist bin out
    return filters.astype(np.float32)
