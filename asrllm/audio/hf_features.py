"""Features of Hugging Face's audio encoders, on the waveform's device.

Each gives the numbers of transformers' feature extractor of that name for an utterance alone, and
ignores the padding of a batch.
"""

import torch
from torch import Tensor, nn

from asrllm.audio.features import (
    KALDI_FFT,
    KALDI_HOP,
    KALDI_WINDOW,
    LOG_EPSILON,
    Count,
    kaldi_mel,
    povey_window,
    slaney_mel,
)
from asrllm.defaults import RATE

WAVE_EPSILON = 1e-7
PARAKEET_FFT = 512
PARAKEET_WINDOW = 400
PARAKEET_HOP = 160
PARAKEET_PREEMPHASIS = 0.97
PARAKEET_GUARD = 2.0**-24  # added before the logarithm
PARAKEET_EPSILON = 1e-5
SEAMLESS_STACK = 2


class WaveFeatures(nn.Module):
    """Samples, optionally normalized to zero mean and unit variance (Wav2Vec2FeatureExtractor)."""

    def __init__(self, normalize: bool) -> None:
        super().__init__()
        self.normalize = normalize

    def forward(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Map waveforms (N, samples) and lengths (N,) to (N, samples, 1) and lengths (N,)."""
        if self.normalize:
            valid = torch.arange(waves.shape[1], device=waves.device) < lengths[:, None]
            mean, variance = _moments(waves[..., None], valid, lengths, unbiased=False)
            waves = (waves - mean[:, 0]) / (variance[:, 0] + WAVE_EPSILON).sqrt() * valid
        return waves[..., None], lengths


class SeamlessFeatures(nn.Module):
    """Kaldi's filter banks, normalized and stacked in pairs (SeamlessM4TFeatureExtractor).

    Frames that do not fit into the waveform are left out (snip_edges=True).
    """

    def __init__(self, num_mel_bins: int) -> None:
        super().__init__()
        self.num_mel_bins = num_mel_bins

    def forward(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Map waveforms (N, samples) and lengths (N,) to features and lengths.

        Returns:
            (N, T, 2 x num_mel_bins), and the numbers of pairs of frames (N,).
        """
        counts = seamless_frames(lengths)
        # float64, because a few frames that are nearly equal are scaled to unit variance
        scaled = waves.double() * 2.0**15
        frames = scaled.unfold(1, KALDI_WINDOW, KALDI_HOP)  # (N, T, window)
        frames = frames - frames.mean(2, keepdim=True)
        previous = torch.cat([frames[..., :1], frames[..., :-1]], 2)
        frames = (frames - 0.97 * previous) * povey_window(waves.device)
        power = torch.fft.rfft(frames, KALDI_FFT).abs().square()
        filters = kaldi_mel(self.num_mel_bins, high=RATE / 2)
        mel = power @ torch.from_numpy(filters).to(power).T
        log = mel.clamp(min=LOG_EPSILON).log()
        valid = torch.arange(log.shape[1], device=log.device) < counts[:, None]
        mean, variance = _moments(log, valid, counts, unbiased=True)
        normalized = (log - mean) / (variance + WAVE_EPSILON).sqrt() * valid[..., None]
        # The last frame of an odd number has no partner.
        pairs = counts // SEAMLESS_STACK
        normalized = normalized[:, : SEAMLESS_STACK * int(pairs.max())]
        stacked = normalized.unflatten(1, (-1, SEAMLESS_STACK)).flatten(2)
        inside = torch.arange(stacked.shape[1], device=log.device) < pairs[:, None]
        return (stacked * inside[..., None]).to(waves.dtype), pairs


def seamless_frames(samples: Count) -> Count:
    """Return the number of frames, before they are stacked, for a number of samples."""
    return (samples - KALDI_WINDOW) // KALDI_HOP + 1


class ParakeetFeatures(nn.Module):
    """NeMo's log-mel spectrogram, normalized by bins (ParakeetFeatureExtractor)."""

    def __init__(self, num_mel_bins: int) -> None:
        super().__init__()
        self.num_mel_bins = num_mel_bins

    def forward(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Map waveforms (N, samples) and lengths (N,) to features and lengths.

        Returns:
            (N, T, num_mel_bins), and the numbers of frames (N,), which are samples // 160.
        """
        inside = torch.arange(waves.shape[1], device=waves.device) < lengths[:, None]
        emphasized = waves[:, 1:] - PARAKEET_PREEMPHASIS * waves[:, :-1]
        waves = torch.cat([waves[:, :1], emphasized], 1) * inside
        spectrum = torch.stft(
            waves,
            PARAKEET_FFT,
            PARAKEET_HOP,
            PARAKEET_WINDOW,
            torch.hann_window(PARAKEET_WINDOW, periodic=False, device=waves.device),
            pad_mode="constant",
            return_complex=True,
        )
        counts = lengths // PARAKEET_HOP
        power = spectrum[..., : int(counts.max())].abs().square()
        filters = torch.from_numpy(slaney_mel(self.num_mel_bins, PARAKEET_FFT)).to(waves.device)
        log = (filters @ power + PARAKEET_GUARD).log().transpose(1, 2)
        valid = torch.arange(log.shape[1], device=log.device) < counts[:, None]
        mean, variance = _moments(log, valid, counts, unbiased=True)
        normalized = (log - mean) / (variance.sqrt() + PARAKEET_EPSILON)
        return normalized * valid[..., None], counts


def _moments(x: Tensor, valid: Tensor, lengths: Tensor, *, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance of each utterance over its true frames.

    Args:
        x: (N, T, C).
        valid: which frames are true (N, T).
        lengths: number of true frames (N,).
        unbiased: divide the squared differences by one less than their number.

    Returns:
        Two tensors (N, 1, C).
    """
    valid = valid[..., None]
    counts = lengths[:, None, None]
    mean = (x * valid).sum(1, keepdim=True) / counts
    squares = ((x - mean) * valid).square().sum(1, keepdim=True)
    return mean, squares / (counts - int(unbiased))
