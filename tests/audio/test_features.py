"""Parity of the features with transformers and Lhotse, and independence of the batch."""

import lhotse
import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from asrllm.audio.features import KaldiFeatures, WhisperFeatures


@pytest.fixture
def waves():
    rng = np.random.default_rng(0)
    return [
        (rng.standard_normal(n) * np.linspace(0.5, 0.01, n)).astype(np.float32)
        for n in (16000, 23456, 8000, 401)
    ]


def padded(waves):
    tensors = [torch.from_numpy(w) for w in waves]
    lengths = torch.tensor([len(w) for w in waves])
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True), lengths


@pytest.mark.parametrize("bins", [80, 128])
def test_whisper_features_match_transformers(waves, bins):
    reference = WhisperFeatureExtractor(feature_size=bins)
    features, lengths = WhisperFeatures(bins)(*padded(waves))
    assert lengths.tolist() == [len(w) // 160 for w in waves]
    for wave, mine, length in zip(waves, features, lengths, strict=True):
        inputs = reference(wave, sampling_rate=16000, padding=False, return_tensors="pt")
        theirs = inputs.input_features[0].T
        assert theirs.std() > 0.1
        torch.testing.assert_close(mine[:length], theirs[:length], atol=1e-5, rtol=0)
        assert not mine[length:].any()


@pytest.mark.parametrize("bins", [80, 128])
def test_whisper_features_padded_to_30_s_match_transformers(waves, bins):
    reference = WhisperFeatureExtractor(feature_size=bins)
    theirs = reference(waves, sampling_rate=16000, return_tensors="pt").input_features
    features, lengths = WhisperFeatures(bins, pad_to_30s=True)(*padded(waves))
    assert lengths.tolist() == [len(w) // 160 for w in waves]
    torch.testing.assert_close(features, theirs.transpose(1, 2), atol=1e-5, rtol=0)


def test_kaldi_features_match_lhotse(waves):
    reference = lhotse.Fbank(lhotse.FbankConfig(num_filters=80, dither=0.0, snip_edges=False))
    features, lengths = KaldiFeatures()(*padded(waves))
    for wave, mine, length in zip(waves, features, lengths, strict=True):
        theirs = torch.from_numpy(reference.extract(wave, 16000))
        assert theirs.std() > 0.1
        assert length == len(theirs)
        torch.testing.assert_close(mine[:length], theirs, atol=2e-4, rtol=0)


@pytest.mark.parametrize("features", [WhisperFeatures(), KaldiFeatures()])
def test_features_do_not_depend_on_the_batch(waves, features):
    together, lengths = features(*padded(waves))
    for i, wave in enumerate(waves):
        alone, length = features(*padded([wave]))
        assert length == lengths[i]
        torch.testing.assert_close(together[i, :length], alone[0], atol=1e-6, rtol=0)
