"""Projectors against implementations of others, and against padding."""

import re
import typing
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Blip2QFormerConfig, LlamaConfig, VoxtralConfig, Wav2Vec2Config
from transformers.models.granite_speech.modeling_granite_speech import (
    GraniteSpeechEncoderProjector,
)
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.voxtral.modeling_voxtral import VoxtralMultiModalProjector
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2Adapter

from asrllm.errors import UserError
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.model_args import ModelConfig
from asrllm.models.projectors import PROJECTORS, AudioProjector
from asrllm.training.memory_estimate import SavedBytes, _audio_bytes

INPUT, OUTPUT, HIDDEN, RATE = 10, 12, 128, 4
LENGTHS = torch.tensor([24, 7, 1, 13, 12])


def make_projector(kind: str, **changes: object) -> AudioProjector:
    torch.manual_seed(0)
    options = {
        "input_size": INPUT,
        "output_size": OUTPUT,
        "rate": RATE,
        "hidden_size": HIDDEN,
        "tag_boundary": False,
    }
    projector = AudioProjector(kind, **options | changes)
    for name, parameter in projector.named_parameters():
        if "norm" in name:  # those of a new layer hide mistakes
            nn.init.normal_(parameter, mean=1.0, std=0.2)
    return projector


def gradients(output: torch.Tensor, module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients of a fixed weighted sum of the output."""
    module.zero_grad()
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    (output * weights).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


def share_weights(ours: nn.Module, theirs: nn.Module, names: dict[str, str]) -> None:
    """Copy our weights to another module.

    Args:
        ours: our projector.
        theirs: the other implementation.
        names: prefixes of our names by prefixes of theirs.
    """
    own = ours.state_dict()
    copied = {}
    for key in theirs.state_dict():
        (prefix,) = [prefix for prefix in names if key.startswith(prefix + ".") or key == prefix]
        copied[key] = own[names[prefix] + key.removeprefix(prefix)]
    theirs.load_state_dict({key: v.view_as(theirs.state_dict()[key]) for key, v in copied.items()})
    assert len(copied) == len(own)


def check_parity(kind: str, theirs: nn.Module, names: dict[str, str], stack: int = RATE) -> None:
    """Compare outputs and gradients of an utterance of full windows."""
    projector = make_projector(kind)
    share_weights(projector.mlp, theirs, names)
    frames = torch.randn(1, 24, INPUT)
    expected = theirs(frames.reshape(1, 24 // stack, INPUT * stack))[0]
    output = projector(frames, torch.tensor([24]))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    own = gradients(output, projector.mlp)
    for key, gradient in gradients(expected, theirs).items():
        (prefix,) = [prefix for prefix in names if key.startswith(prefix + ".") or key == prefix]
        found = own[names[prefix] + key.removeprefix(prefix)]
        torch.testing.assert_close(found.view_as(gradient), gradient, atol=1e-5, rtol=1e-5)


def test_voxtral_matches_transformers():
    config = VoxtralConfig(
        audio_config={"model_type": "voxtral_encoder", "intermediate_size": INPUT * RATE},
        text_config={"model_type": "llama", "hidden_size": OUTPUT, "num_attention_heads": 1},
    )
    theirs = VoxtralMultiModalProjector(config)
    # Theirs has no hidden size of its own.
    theirs.linear_1 = nn.Linear(INPUT * RATE, HIDDEN, bias=False)
    theirs.linear_2 = nn.Linear(HIDDEN, OUTPUT, bias=False)
    check_parity("voxtral", theirs, {"linear_1": "linear1", "linear_2": "linear2"})


class LlamaProjector(nn.Module):
    """Ultravox's projector of the layers of transformers' Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_in = LlamaRMSNorm(INPUT * RATE)
        config = LlamaConfig(
            hidden_size=INPUT * RATE, intermediate_size=HIDDEN, num_attention_heads=1
        )
        self.mlp = LlamaMLP(config)
        self.mlp.down_proj = nn.Linear(HIDDEN, OUTPUT, bias=False)
        self.norm_out = LlamaRMSNorm(OUTPUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm_out(self.mlp(self.norm_in(x)))


def test_swiglu_matches_the_layers_of_llama():
    names = {"mlp.up_proj": "up", "mlp.gate_proj": "gate", "mlp.down_proj": "down"}
    check_parity("swiglu", LlamaProjector(), names | {n: n for n in ("norm_in", "norm_out")})


class AdaptedLinear(nn.Module):
    """transformers' adapter of wav2vec 2.0, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        config = Wav2Vec2Config(
            hidden_size=INPUT, output_hidden_size=HIDDEN, num_adapter_layers=2, layerdrop=0.0
        )
        self.adapter = Wav2Vec2Adapter(config)
        self.linear = nn.Linear(HIDDEN, OUTPUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.adapter(x))


def test_conv_matches_the_adapter_of_wav2vec2():
    names = {
        "adapter.proj": "linear1",
        "adapter.proj_layer_norm": "norm",
        "adapter.layers.0.conv": "convolutions.0",
        "adapter.layers.1.conv": "convolutions.1",
        "linear": "linear2",
    }
    check_parity("conv", AdaptedLinear(), names, stack=1)


def test_qformer_matches_granite_speech():
    qformer = Blip2QFormerConfig(
        hidden_size=HIDDEN,
        encoder_hidden_size=INPUT,
        intermediate_size=4 * HIDDEN,
        num_attention_heads=HIDDEN // 64,
        num_hidden_layers=2,
        cross_attention_frequency=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        use_qformer_text_input=False,
    )
    config = SimpleNamespace(
        projector_config=qformer,
        downsample_rate=RATE,
        window_size=3 * RATE,
        text_config=SimpleNamespace(hidden_size=OUTPUT),
    )
    names = {"query": "query", "linear": "linear", "qformer.layernorm": "norm"}
    for number in range(2):
        theirs, ours = f"qformer.encoder.layer.{number}", f"layers.{number}"
        for their_part, part in (("attention", "self"), ("crossattention", "cross")):
            for name in ("query", "key", "value"):
                names[f"{theirs}.{their_part}.attention.{name}"] = f"{ours}.{part}_attention.{name}"
            names[f"{theirs}.{their_part}.output.dense"] = f"{ours}.{part}_attention.out"
            names[f"{theirs}.{their_part}.output.LayerNorm"] = f"{ours}.{part}_norm"
        names[f"{theirs}.intermediate_query.dense"] = f"{ours}.fc1"
        names[f"{theirs}.output_query.dense"] = f"{ours}.fc2"
        names[f"{theirs}.output_query.LayerNorm"] = f"{ours}.norm"
    check_parity("qformer", GraniteSpeechEncoderProjector(config), names, stack=1)


class TorchProjector(nn.Module):
    """A projector of torch's Transformer layers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(INPUT * RATE, HIDDEN)
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(HIDDEN, HIDDEN // 64, 4 * HIDDEN, **options)
        self.encoder = nn.TransformerEncoder(
            layer, 2, nn.LayerNorm(HIDDEN), enable_nested_tensor=False
        )
        self.linear2 = nn.Linear(HIDDEN, OUTPUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1])[:, None]
        angles = positions / 10000 ** (torch.arange(HIDDEN // 2) / (HIDDEN // 2))
        x = self.linear1(x) + torch.cat([angles.sin(), angles.cos()], 1)
        return self.linear2(self.encoder(x))


def test_transformer_matches_the_layers_of_torch():
    projector = make_projector("transformer").mlp
    theirs = TorchProjector()
    state = {}
    for key, tensor in projector.state_dict().items():
        new = key.replace("layers.", "encoder.layers.").replace("attention_norm", "norm1")
        new = new.replace("attention.out", "self_attn.out_proj")
        new = new.replace("fc1", "linear1").replace("fc2", "linear2")
        new = re.sub(r"(layers\.\d\.)norm\.", r"\1norm2.", new)
        state[re.sub(r"^norm", "encoder.norm", new)] = tensor
    for number in range(2):
        for kind in ("weight", "bias"):
            part = f"encoder.layers.{number}."
            names = [f"{part}attention.{name}.{kind}" for name in ("query", "key", "value")]
            state[f"{part}self_attn.in_proj_{kind}"] = torch.cat([state.pop(n) for n in names])
    theirs.load_state_dict(state)
    frames = torch.randn(1, 24, INPUT)
    ours = projector(frames, torch.tensor([24]))
    expected = theirs(frames.reshape(1, 6, INPUT * RATE))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    own = gradients(ours, projector)
    other = gradients(expected, theirs)
    names = ("linear1.weight", "linear2.weight", "layers.1.fc1.weight", "layers.0.fc2.bias")
    for name in names:
        key = name.replace("layers.", "encoder.layers.") if "layers" in name else name
        key = key.replace("fc1", "linear1").replace("fc2", "linear2")
        torch.testing.assert_close(own[name], other[key], atol=1e-5, rtol=1e-4)
    query = own["layers.0.attention.query.weight"]
    packed = other["encoder.layers.0.self_attn.in_proj_weight"]
    torch.testing.assert_close(query, packed[:HIDDEN], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", PROJECTORS)
@pytest.mark.parametrize("drop_ragged", [False, True])
def test_tokens_and_gradients_do_not_depend_on_padding(kind, drop_ragged):
    projector = make_projector(kind, drop_ragged=drop_ragged)
    parts = [torch.randn(length, INPUT) for length in LENGTHS.tolist()]
    frames = torch.full((len(parts), 31, INPUT), 1e3)
    for row, part in zip(frames, parts, strict=True):
        row[: len(part)] = part
    together = projector(frames, LENGTHS)
    alone = torch.cat([projector(part[None], torch.tensor([len(part)])) for part in parts])
    counts = LENGTHS // RATE if drop_ragged else -(-LENGTHS // RATE)
    assert len(together) == counts.sum()
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    own = gradients(together, projector)
    for name, gradient in gradients(alone, projector).items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(own[name], gradient, atol=1e-4, rtol=1e-4)


def test_qformer_attends_to_no_frame_beyond_the_end():
    projector = make_projector("qformer")
    frames = torch.randn(1, 7, INPUT)
    x = projector.mlp.norm(projector.mlp.query)[None]
    for layer in projector.mlp.layers:
        x = layer(x, frames, torch.ones(1, 7, dtype=torch.bool))
    expected = projector.mlp.linear(x)[0, :2]
    torch.testing.assert_close(projector(frames, torch.tensor([7])), expected)


@pytest.mark.parametrize("kind", PROJECTORS)
def test_a_batch_without_tokens_reaches_every_weight(kind):
    """A rank whose batch has no audio takes part in the reduction of gradients."""
    projector = make_projector(kind, drop_ragged=True)
    output = projector(torch.randn(1, RATE - 1, INPUT), torch.tensor([RATE - 1]))
    assert output.shape == (0, OUTPUT)
    own = gradients(output, projector)
    assert all(gradient.abs().max() == 0 for gradient in own.values())


@pytest.mark.parametrize("kind", PROJECTORS)
def test_the_estimate_of_memory_is_what_autograd_saves(kind, tiny_model):
    model = tiny_model(kind)
    frames = torch.randn(1, 96, model.audio_encoder.output_dim, requires_grad=True)
    counter = SavedBytes(model)
    with counter:
        model.projector(frames, torch.tensor([96]))
    estimate = _audio_bytes(tiny_model(kind, device="meta"), 24, torch.float32, False)
    assert estimate == pytest.approx(counter.total, rel=0.15)


@pytest.fixture
def tiny_model():
    def build(kind: str, device: str = "cpu") -> AsrLlmModel:
        config = AsrLlmConfig(
            audio_encoder={
                "model_type": "whisper",
                "num_mel_bins": 80,
                "d_model": 64,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 64,
            },
            llm={
                "model_type": "qwen2",
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "vocab_size": 50,
            },
            projector=kind,
            projector_hidden_size=128,
            audio_encoder_projector_ds_rate=RATE,
            audio_token_id=50,
        )
        with torch.device(device):
            model = AsrLlmModel(config)
        model.freeze("audio_encoder", "llm")
        return model

    return build


def test_the_configuration_accepts_every_projector():
    hint = typing.get_type_hints(ModelConfig)["projector"]
    assert set(typing.get_args(hint)) == set(PROJECTORS)


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("conv", {"audio_encoder_projector_ds_rate": 5}, "audio_encoder_projector_ds_rate=5"),
        ("conv", {"audio_encoder_projector_ds_rate": 1}, "audio_encoder_projector_ds_rate=1"),
        ("qformer", {"projector_hidden_size": 200}, "projector_hidden_size=200"),
        ("transformer", {"projector_hidden_size": 63}, "projector_hidden_size=63"),
        ("voxtral", {"projector_init": "aligned"}, "mlp or normed"),
        ("qformer", {"projector_init": "aligned"}, "mlp or normed"),
    ],
)
def test_sizes_that_a_projector_does_not_support_are_rejected(kind, changes, named):
    with pytest.raises(UserError) as caught:
        ModelConfig(projector=kind, **changes)
    assert named in str(caught.value)
    assert kind in str(caught.value)
