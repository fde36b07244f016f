import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import WhisperConfig, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder as TheirEncoder

from asrllm.errors import CorruptedError, UserError
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.encoders.whisper import WhisperEncoder
from asrllm.models.encoders.whisper_weights import from_openai
from asrllm.models.pretrained import pretrained_encoder


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
def test_thirty_seconds_match_transformers(world, pad_to_30s):
    x, lengths = features(3000, 3000)
    theirs = (
        WhisperModel.from_pretrained(world.whisper).encoder(x.transpose(1, 2)).last_hidden_state
    )
    mine, out_lengths = load(world.whisper, pad_to_30s=pad_to_30s)(x, lengths)
    assert out_lengths.tolist() == [1500, 1500]
    assert theirs.std() > 0.1
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


@torch.no_grad()
def test_padded_audio_matches_transformers_with_pad_to_30s(world):
    x, _ = features(3000)
    theirs = (
        WhisperModel.from_pretrained(world.whisper).encoder(x.transpose(1, 2)).last_hidden_state
    )
    mine, out_lengths = load(world.whisper, pad_to_30s=True)(x, torch.tensor([211]))
    assert out_lengths.tolist() == [106]
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


@torch.no_grad()
def test_kept_silence_has_the_frames_of_transformers(world):
    x, _ = features(3000)
    theirs = (
        WhisperModel.from_pretrained(world.whisper).encoder(x.transpose(1, 2)).last_hidden_state
    )
    encoder = load(world.whisper, pad_to_30s="keep_silence")
    mine, out_lengths = encoder(x, torch.tensor([211]))
    assert out_lengths.tolist() == [1500]
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="211 frames"):
        encoder(x[:, :211], torch.tensor([211]))


def test_kept_silence_is_counted_for_every_length():
    values = {"pad_to_30s": "keep_silence"}
    assert WhisperEncoder.frame_lengths(160, values) == 1500
    for samples in (np.array([160, 480000]), torch.tensor([160, 480000])):
        counts = WhisperEncoder.frame_lengths(samples, values)
        assert type(counts) is type(samples)
        assert counts.tolist() == [1500, 1500]


@pytest.mark.parametrize("pad_to_30s", [True, "keep_silence"])
def test_padding_needs_positions_for_30_seconds(world, pad_to_30s):
    fields, _ = WhisperEncoder.read_pretrained(str(world.whisper))
    with pytest.raises(UserError, match=r"max_source_positions=1499 .*data\.pad_to_30s=false"):
        WhisperEncoder(**fields | {"max_source_positions": 1499}, pad_to_30s=pad_to_30s)


@torch.no_grad()
def test_utterance_is_encoded_alone_as_in_a_batch(world):
    encoder = load(world.whisper)
    x, lengths = features(300, 41, 200, 1)
    x[1, 41:] = 100.0  # arbitrary values in the padding
    together, out_lengths = encoder(x, lengths)
    assert out_lengths.tolist() == [150, 21, 100, 1]
    for i, length in enumerate(lengths.tolist()):
        alone, _ = encoder(x[i : i + 1, :length], lengths[i : i + 1])
        torch.testing.assert_close(together[i, : out_lengths[i]], alone[0], atol=1e-5, rtol=0)


def alone_through_transformers(encoder, x):
    """Run an utterance x (T, mel) through transformers' modules. Their encoder needs 30 s."""
    x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(x.T[None])))).transpose(1, 2)
    x = x + encoder.embed_positions.weight[: x.shape[1]]
    for layer in encoder.layers:
        x = layer(x, None)
        x = x[0] if isinstance(x, tuple) else x
    return encoder.layer_norm(x)[0]


def test_outputs_and_gradients_match_transformers_layers_on_each_utterance(world):
    mine, theirs = load(world.whisper), WhisperModel.from_pretrained(world.whisper).encoder.eval()
    x, lengths = features(300, 41, 200, 1)
    weight = torch.randn(4, 150, 16, generator=torch.Generator().manual_seed(1))
    outputs, out_lengths = mine(x, lengths)
    loss, expected_loss = (outputs * weight).sum(), 0.0
    for i, (length, frames) in enumerate(zip(lengths, out_lengths, strict=True)):
        expected = alone_through_transformers(theirs, x[i, :length])
        torch.testing.assert_close(outputs[i, :frames], expected, atol=1e-5, rtol=0)
        assert not outputs[i, frames:].any()
        expected_loss = expected_loss + (expected * weight[i, :frames]).sum()
    loss.backward()
    expected_loss.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in mine.named_parameters():
        if name != "embed_positions.weight":  # transformers never trains them
            assert grads[name].abs().max() > 0, name
            torch.testing.assert_close(parameter.grad, grads[name], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("pad_to_30s", [True, False])
def test_waveform_is_encoded_alone_as_in_a_shuffled_batch_of_16(world, pad_to_30s):
    generator = torch.Generator().manual_seed(0)
    encoder = load(world.whisper, pad_to_30s=pad_to_30s)
    lengths = torch.randint(160, 32000, (16,), generator=generator)
    waves = [torch.randn(int(n), generator=generator) * 0.1 for n in lengths]
    alone = [
        encoder(*encoder.features(wave[None], n[None]))
        for wave, n in zip(waves, lengths, strict=True)
    ]
    order = torch.randperm(16, generator=generator)
    batch = torch.nn.utils.rnn.pad_sequence([waves[i] for i in order], batch_first=True)
    together, frames = encoder(*encoder.features(batch, lengths[order]))
    for row, i in enumerate(order.tolist()):
        one, count = alone[i]
        assert frames[row] == count[0]
        torch.testing.assert_close(
            together[row, : frames[row]], one[0, : frames[row]], atol=1e-5, rtol=0
        )


@torch.no_grad()
def test_frame_lengths_match_the_output_lengths(world):
    encoder = load(world.whisper)
    for samples in (160, 161, 319, 320, 5000, 47999):
        waves = torch.randn(1, samples)
        x, lengths = encoder.features(waves, torch.tensor([samples]))
        out, out_lengths = encoder(x, lengths)
        assert out.shape[1] == out_lengths[0] == encoder.frame_lengths(samples, {})


def test_bfloat16_is_near_float32(world):
    encoder = load(world.whisper)
    x, lengths = features(200, 100)
    with torch.no_grad():
        whole, out_lengths = encoder(x, lengths)
        half, _ = encoder.bfloat16()(x, lengths)
    for i, n in enumerate(out_lengths):
        assert torch.nn.functional.cosine_similarity(whole[i, :n], half[i, :n].float()).min() > 0.99


@pytest.mark.parametrize("length", [0, 3001])
def test_too_short_and_too_long_utterances_are_rejected(world, length):
    with pytest.raises(UserError, match=f"10 ms .* 30 s .* {length / 100:g} s "):
        load(world.whisper)(torch.zeros(1, max(length, 1), 80), torch.tensor([length]))


def test_directory_of_another_model_is_rejected(world, tmp_path):
    with pytest.raises(UserError, match=rf"'{tmp_path}' .*config\.json"):
        WhisperEncoder.read_pretrained(str(tmp_path))
    with pytest.raises(
        UserError, match=f"'{world.llm}' .*'qwen2' .*model.audio_encoder.model_type"
    ):
        WhisperEncoder.read_pretrained(str(world.llm))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "whisper"}))
    with pytest.raises(
        UserError, match=rf"'{tmp_path}' .*model\.safetensors, .*pytorch_model\.bin"
    ):
        WhisperEncoder.read_pretrained(str(tmp_path))


def test_activation_checkpointing_does_not_change_the_gradients(world):
    x, lengths = features(60, 41)
    grads = []
    for recompute in (False, True):
        encoder = load(world.whisper).train()
        if recompute:
            encoder.gradient_checkpointing_enable()
        calls = []
        encoder.layers[0].fc1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        encoder(x, lengths)[0].square().mean().backward()
        assert len(calls) == 1 + recompute
        grads.append([p.grad for p in encoder.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))


# --- files ---

OPENAI = [  # transformers' names to OpenAI's, in this order
    (r"^model\.", ""),
    (r"layers\.(\d+)", r"blocks.\1"),
    (r"self_attn_layer_norm", "attn_ln"),
    (r"encoder_attn", "cross_attn"),
    (r"self_attn", "attn"),
    (r"q_proj", "query"),
    (r"k_proj", "key"),
    (r"v_proj", "value"),
    (r"out_proj", "out"),
    (r"fc1", "mlp.0"),
    (r"fc2", "mlp.2"),
    (r"final_layer_norm", "mlp_ln"),
    (r"encoder\.layer_norm", "encoder.ln_post"),
    (r"embed_positions\.weight", "positional_embedding"),
]
TINY_DIMS = {
    "n_mels": 80,
    "n_audio_ctx": 1500,
    "n_audio_state": 16,
    "n_audio_head": 2,
    "n_audio_layer": 2,
    "n_vocab": 64,
    "n_text_ctx": 448,
    "n_text_state": 16,
    "n_text_head": 2,
    "n_text_layer": 1,
}


def openai_file(world, path, change=lambda state: None, **more):
    """Write a tiny Whisper in OpenAI's format, and the same one as a directory `hf`.

    Its hidden layers have 4 times the width, as in all models of OpenAI.
    """
    model = WhisperModel(WhisperConfig.from_pretrained(world.whisper, encoder_ffn_dim=64))
    model.save_pretrained(path.parent / "hf")
    state = {}
    for key, tensor in model.state_dict().items():
        for theirs, openai in OPENAI:
            key = re.sub(theirs, openai, key)
        state[key] = tensor.clone()
    change(state)
    torch.save({"dims": TINY_DIMS, "model_state_dict": state} | more, path)
    return path


def encoder_config(fields):
    return AsrLlmConfig(audio_encoder={"model_type": "whisper"} | fields)


@torch.no_grad()
def test_openai_file_gives_the_same_encoder(world, tmp_path):
    file = openai_file(world, tmp_path / "tiny.pt")
    fields, state = WhisperEncoder.read_pretrained(str(file))
    expected_fields, expected = WhisperEncoder.read_pretrained(str(tmp_path / "hf"))
    assert fields == expected_fields
    assert state.keys() == expected.keys()
    x, lengths = features(100, 41)
    mine = pretrained_encoder(encoder_config(fields), str(file)).eval()
    assert torch.equal(mine(x, lengths)[0], load(tmp_path / "hf")(x, lengths)[0])


def test_openai_keys_are_renamed():
    """The names are those of whisper/model.py in OpenAI's repository."""
    block = [
        "attn.query.weight",
        "attn.query.bias",
        "attn.key.weight",
        "attn.value.weight",
        "attn.value.bias",
        "attn.out.weight",
    ]
    block += [
        "attn.out.bias",
        "attn_ln.weight",
        "attn_ln.bias",
        "mlp.0.weight",
        "mlp.0.bias",
        "mlp.2.weight",
        "mlp.2.bias",
    ]
    block += ["mlp_ln.weight", "mlp_ln.bias"]
    top = [
        "conv1.weight",
        "conv1.bias",
        "conv2.weight",
        "conv2.bias",
        "positional_embedding",
        "ln_post.weight",
        "ln_post.bias",
    ]
    keys = [f"encoder.{k}" for k in top] + [
        f"encoder.blocks.{n}.{k}" for n in (0, 10) for k in block
    ]
    renamed = from_openai({k: k for k in keys}, "here")
    assert len(renamed) == len(keys)
    assert renamed["layers.10.self_attn.k_proj.weight"] == "encoder.blocks.10.attn.key.weight"
    assert renamed["layers.10.self_attn_layer_norm.bias"] == "encoder.blocks.10.attn_ln.bias"
    assert renamed["layers.0.final_layer_norm.weight"] == "encoder.blocks.0.mlp_ln.weight"
    assert renamed["layers.0.fc2.bias"] == "encoder.blocks.0.mlp.2.bias"
    assert renamed["layer_norm.weight"] == "encoder.ln_post.weight"
    assert renamed["embed_positions.weight"] == "encoder.positional_embedding"
    for key in (
        "encoder.blocks.0.attn.rotary.weight",
        "encoder.blocks.0.conv1.weight",
        "encoder.mlp.0.weight",
        "encoder.conv1",
    ):
        with pytest.raises(UserError, match=rf"'here' .*{re.escape(repr(key))}"):
            from_openai({key: torch.zeros(1)}, "here")


def test_files_other_than_openais_are_rejected(world, tmp_path):
    def read(path):
        return WhisperEncoder.read_pretrained(str(path))

    (tmp_path / "damaged.pt").write_bytes(
        openai_file(world, tmp_path / "whole.pt").read_bytes()[:1000]
    )
    with pytest.raises(CorruptedError, match=f"'{tmp_path}/damaged.pt'"):
        read(tmp_path / "damaged.pt")
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=f"'{tmp_path}/other.pt' .*'dims' .*'model_state_dict'"):
        read(tmp_path / "other.pt")
    with pytest.raises(UserError, match=f"'{tmp_path}/x.pt' .*'n_audio_head' .*'dims'"):
        read(
            openai_file(
                world,
                tmp_path / "x.pt",
                dims={k: v for k, v in TINY_DIMS.items() if k != "n_audio_head"},
            )
        )
    with pytest.raises(
        UserError, match=rf"'{tmp_path}/x\.pt' .*encoder_layers=1000000, .*'layers\.999999\.'"
    ):
        read(openai_file(world, tmp_path / "x.pt", dims=TINY_DIMS | {"n_audio_layer": 1_000_000}))
    with pytest.raises(UserError, match=rf"'{tmp_path}/x\.pt' .*'encoder\.extra\.weight'"):
        read(
            openai_file(
                world,
                tmp_path / "x.pt",
                lambda state: state.update({"encoder.extra.weight": torch.zeros(1)}),
            )
        )


@pytest.mark.parametrize(
    "options",
    [{"safe_serialization": True, "max_shard_size": "20KB"}, {"bin": 1}, {"bin": 2}],
    ids=str,
)
def test_sharded_and_pickled_directories_are_loaded(world, tmp_path, options):
    shutil.copy(world.whisper / "config.json", tmp_path)
    if "bin" in options:
        state = list(load_file(world.whisper / "model.safetensors").items())
        names = (
            ["pytorch_model.bin"]
            if options["bin"] == 1
            else [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
        )
        for i, name in enumerate(names):
            torch.save(dict(state[i :: len(names)]), tmp_path / name)
    else:
        WhisperModel.from_pretrained(world.whisper).save_pretrained(tmp_path, **options)
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    _, state = WhisperEncoder.read_pretrained(str(tmp_path))
    _, expected = WhisperEncoder.read_pretrained(str(world.whisper))
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("encoder.layers.1.fc1.bias"),
            r" 1 .*'layers\.1\.fc1\.bias'",
        ),
        (
            lambda s: s.update({"encoder.extra": torch.zeros(1)}),
            " 1 .*'extra'",
        ),
        (
            lambda s: s.update({"encoder.conv1.bias": torch.zeros(3)}),
            r"'conv1\.bias' .*\(3,\).*\(16,\)",
        ),
    ],
)
def test_wrong_key_of_a_directory_is_reported(world, tmp_path, change, message):
    shutil.copy(world.whisper / "config.json", tmp_path)
    state = load_file(world.whisper / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    fields, _ = WhisperEncoder.read_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=message):
        pretrained_encoder(encoder_config(fields), str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "layers", "heads", "mels"),
    [
        (384, 4, 6, 80),
        (512, 6, 8, 80),
        (768, 12, 12, 80),
        (1024, 24, 16, 80),
        (1280, 32, 20, 80),
        (1280, 32, 20, 128),
    ],
    ids=[
        "tiny",
        "base",
        "small",
        "medium",
        "large-v2",
        "large-v3",
    ],  # large-v1 is like large-v2, and the encoder of large-v3-turbo like that of large-v3
)
def test_parameter_counts_match_the_published_sizes(width, layers, heads, mels):
    fields = {
        "d_model": width,
        "encoder_layers": layers,
        "encoder_attention_heads": heads,
        "encoder_ffn_dim": 4 * width,
    }
    with torch.device("meta"):
        mine = WhisperEncoder(**fields, num_mel_bins=mels)
        theirs = TheirEncoder(WhisperConfig(**fields, num_mel_bins=mels))
    expected = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.shape for name, tensor in mine.state_dict().items()} == expected
    count = sum(p.numel() for p in mine.parameters())
    assert count == sum(p.numel() for p in theirs.parameters())
    assert (
        0.99 < count / (12 * layers * width**2 + 3 * width * (mels + width) + 1500 * width) < 1.01
    )
