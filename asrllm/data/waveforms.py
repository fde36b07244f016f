"""Bring waveforms to one channel at 16 kHz."""

import numpy as np
import soxr

from asrllm.defaults import RATE


def to_mono(wave: np.ndarray) -> np.ndarray:
    """Return the mean (samples,) of the channels of a waveform (samples, channels)."""
    if wave.shape[1] == 1:
        return wave[:, 0]
    return wave.mean(1)


def resample(wave: np.ndarray, rate: int) -> np.ndarray:
    """Resample (samples,) from a rate in Hz to RATE."""
    if rate == RATE:
        return wave
    return soxr.resample(wave, rate, RATE)
