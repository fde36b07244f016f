import json

import pytest
import torch
from transformers import WhisperModel

from asrllm.errors import UserError
from asrllm.models.whisper import WhisperEncoder


def load(folder, **options):
    fields, state = WhisperEncoder.read_pretrained(str(folder))
    encoder = WhisperEncoder(**fields, **options).eval()
    encoder.load_state_dict(state)
    return encoder


def features(*lengths, seed=0):
    x = torch.randn(len(lengths), max(lengths), 80, generator=torch.Generator().manual_seed(seed))
    return x, torch.tensor(lengths)


@torch.no_grad()
@pytest.mark.parametrize("pad_to_30s", [True, False])
def test_thirty_seconds_are_transformers_own(world, pad_to_30s):
    x, lengths = features(3000, 3000)
    theirs = WhisperModel.from_pretrained(world.whisper).encoder(x.transpose(1, 2)).last_hidden_state
    mine, out_lengths = load(world.whisper, pad_to_30s=pad_to_30s)(x, lengths)
    assert out_lengths.tolist() == [1500, 1500]
    assert theirs.std() > 0.1
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


@torch.no_grad()
def test_padded_audio_is_transformers_own_where_silence_is_attended_to(world):
    x, _ = features(3000)
    theirs = WhisperModel.from_pretrained(world.whisper).encoder(x.transpose(1, 2)).last_hidden_state
    mine, out_lengths = load(world.whisper, pad_to_30s=True)(x, torch.tensor([211]))
    assert out_lengths.tolist() == [106]
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_utterance_is_the_same_alone_and_in_a_batch(world):
    encoder = load(world.whisper)
    x, lengths = features(300, 41, 200, 1)
    x[1, 41:] = 100.0  # whatever stands in the padding
    together, out_lengths = encoder(x, lengths)
    assert out_lengths.tolist() == [150, 21, 100, 1]
    for i, length in enumerate(lengths.tolist()):
        alone, _ = encoder(x[i : i + 1, :length], lengths[i : i + 1])
        torch.testing.assert_close(together[i, : out_lengths[i]], alone[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_length_formula_is_the_length(world):
    encoder = load(world.whisper)
    for samples in (160, 161, 319, 320, 5000, 47999):
        waves = torch.randn(1, samples)
        x, lengths = encoder.features(waves, torch.tensor([samples]))
        out, out_lengths = encoder(x, lengths)
        assert out.shape[1] == out_lengths[0] == encoder.frame_lengths(samples)


def test_bfloat16_is_near_float32(world):
    encoder = load(world.whisper)
    x, lengths = features(200, 100)
    with torch.no_grad():
        whole, out_lengths = encoder(x, lengths)
        half, _ = encoder.bfloat16()(x, lengths)
    for i, n in enumerate(out_lengths):
        assert torch.nn.functional.cosine_similarity(whole[i, :n], half[i, :n].float()).min() > 0.99


@pytest.mark.parametrize("length", [0, 3001])
def test_too_short_and_too_long_are_one_sentence(world, length):
    with pytest.raises(UserError, match="takes 10 ms to 30 s of audio"):
        load(world.whisper)(torch.zeros(1, max(length, 1), 80), torch.tensor([length]))


def test_a_directory_of_another_model_is_one_sentence(world, tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        WhisperEncoder.read_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="is a 'qwen2' model, not whisper"):
        WhisperEncoder.read_pretrained(str(world.llm))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "whisper"}))
    with pytest.raises(UserError, match=r"has no weights \(none of model\.safetensors"):
        WhisperEncoder.read_pretrained(str(tmp_path))


def test_activation_checkpointing_changes_nothing(world):
    x, lengths = features(60, 41)
    grads = []
    for recompute in (False, True):
        encoder = load(world.whisper).train()
        if recompute:
            encoder.gradient_checkpointing_enable()
        encoder(x, lengths)[0].square().mean().backward()
        grads.append([p.grad for p in encoder.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))
