"""Where somebody speaks: Silero's network against the package's own, and how the stream is cut."""

import importlib.util

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


def told(detector, wave, size):
    parts = [detector(wave[i : i + size]) for i in range(0, len(wave), size)]
    return np.concatenate([*parts, detector.finish()])


def test_it_is_silero(network):
    wave = speech_and_silence()
    ours = told(Silero(network), wave, len(wave))
    theirs = torch.jit.load(silero_file())
    padded = torch.from_numpy(np.pad(wave, (0, -len(wave) % FRAME)))
    with torch.no_grad():
        expected = [theirs(frame, 16000).item() for frame in padded.split(FRAME)]
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert ours[:25].max() < 0.2
    assert np.median(ours[35:100]) > 0.8


def test_its_weights_are_found_without_importing_the_package_which_takes_torch_to_one_thread(
    network,
):
    import sys

    assert "silero_vad" not in sys.modules


@pytest.mark.parametrize("make", [Silero, lambda _: Loudness()])
@pytest.mark.parametrize("size", [1, 511, 100_000])
def test_the_blocks_of_a_stream_change_no_bit(network, make, size):
    wave = speech_and_silence()[: 3000 if size == 1 else None]
    assert (told(make(network), wave, size) == told(make(network), wave, len(wave))).all()


def test_two_files_at_once_do_not_mix(network):
    first, second = Silero(network), Silero(network)
    waves = [speech_and_silence(seed) for seed in (0, 5)]
    first(waves[0])
    second(waves[1])
    for detector, wave in zip((first, second), waves, strict=True):
        rest = detector.finish()
        assert (rest == told(Silero(network), wave, len(wave))[-len(rest) :]).all()


def test_loudness_takes_all_for_speech_and_quiet_for_least():
    wave = np.concatenate(
        [tone("one", 0.512), np.zeros(16 * FRAME, np.float32), tone("two", 0.512) / 10]
    )
    loud, silent, low = told(Loudness(), wave, 999).reshape(3, 16)
    assert (silent == 0.5).all()
    assert silent.max() < low.min() <= low.max() < loud.min() <= 1


def test_without_the_package_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs the package silero-vad: pip install .*, or give --no-vad"
    ):
        load_silero()
