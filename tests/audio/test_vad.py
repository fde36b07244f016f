"""Voice activity detection: parity with the package silero-vad, and independence of blocks."""

import importlib.util
import sys

import numpy as np
import pytest
import torch

from asrllm.audio.vad import FRAME, Loudness, Silero, load_silero, silero_file
from asrllm.errors import UserError
from asrllm.testing import tone, vowels


@pytest.fixture(scope="module")
def network():
    return load_silero()


def speech_and_silence(seed=0):
    noise = np.random.default_rng(seed).normal(0, 1e-3, 16000).astype(np.float32)
    return np.concatenate(
        [noise, vowels(2.3, seed=seed), noise[:9000], vowels(1, seed=seed + 1), noise]
    )


def probabilities(detector, wave, size):
    """Feed the waveform in blocks of `size` samples."""
    parts = [detector(wave[i : i + size]) for i in range(0, len(wave), size)]
    return np.concatenate([*parts, detector.finish()])


def test_network_matches_the_package_silero_vad(network):
    wave = speech_and_silence()
    ours = probabilities(Silero(network), wave, len(wave))
    theirs = torch.jit.load(silero_file())
    padded = torch.from_numpy(np.pad(wave, (0, -len(wave) % FRAME)))
    with torch.no_grad():
        expected = [theirs(frame, 16000).item() for frame in padded.split(FRAME)]
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert ours[:25].max() < 0.2
    assert np.median(ours[35:100]) > 0.8


def test_loading_the_weights_does_not_import_the_package(network):
    """Importing silero_vad would limit torch to one thread."""
    assert "silero_vad" not in sys.modules


@pytest.mark.parametrize("make", [Silero, lambda _: Loudness()])
@pytest.mark.parametrize("size", [1, 511, 100_000])
def test_probabilities_do_not_depend_on_the_block_size(network, make, size):
    wave = speech_and_silence()[: 3000 if size == 1 else None]
    in_blocks = probabilities(make(network), wave, size)
    whole = probabilities(make(network), wave, len(wave))
    assert (in_blocks == whole).all()


def test_two_detectors_of_one_network_are_independent(network):
    first = Silero(network)
    second = Silero(network)
    waves = [speech_and_silence(seed) for seed in (0, 5)]
    first(waves[0])
    second(waves[1])
    for detector, wave in zip((first, second), waves, strict=True):
        rest = detector.finish()
        expected = probabilities(Silero(network), wave, len(wave))
        assert (rest == expected[-len(rest) :]).all()


def test_loudness_counts_everything_as_speech_and_silence_least():
    silence = np.zeros(16 * FRAME, np.float32)
    wave = np.concatenate([tone("one", 0.512), silence, tone("two", 0.512) / 10])
    loud, silent, low = probabilities(Loudness(), wave, 999).reshape(3, 16)
    assert (silent == 0.5).all()
    assert silent.max() < low.min() <= low.max() < loud.min() <= 1


def test_missing_package_is_reported(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'silero-vad>=6.*--no-vad"):
        load_silero()
