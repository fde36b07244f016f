"""The encoder: parity with the public code, sizes, lengths, padding and precision."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from asrllm.errors import UserError
from asrllm.models import zipformer
from asrllm.models.encoders.zipformer.configuration import PUBLIC_SIZES, ZipformerConfig
from asrllm.models.encoders.zipformer.layers import (
    AttentionWeights,
    relative_positions,
    swoosh_l,
    swoosh_r,
)
from asrllm.models.encoders.zipformer.modeling import ZipformerEncoder, match_width
from asrllm.models.encoders.zipformer.weights import without_dead_keys
from asrllm.testing import TINY_ZIPFORMER
from tests.conftest import REPOSITORY

OUTSIDE = (
    Path(os.environ.get("ASRLLM_PARITY", REPOSITORY.parent / "shared" / "parity")) / "zipformer"
)
SMALL_CASE = Path(__file__).parent / "parity" / "zipformer_stacks.safetensors"
CHUNKS = {
    "chunk32_left64": {"chunk_size": [32], "left_context_frames": [64]},
    "chunk_all": {"chunk_size": [-1], "left_context_frames": [-1]},
}


def test_public_import_path_has_the_encoder():
    assert zipformer.ZipformerConfig is ZipformerConfig
    assert zipformer.ZipformerEncoder is ZipformerEncoder


def tiny(seed=0, isolate=False, **changes):
    torch.manual_seed(seed)
    return ZipformerEncoder(ZipformerConfig(**TINY_ZIPFORMER | changes), isolate=isolate).eval()


def features(*lengths, width=80, seed=0):
    x = torch.randn(
        len(lengths), max(lengths), width, generator=torch.Generator().manual_seed(seed)
    )
    return x, torch.tensor(lengths)


def read_case(path):
    with safe_open(path, "pt") as file:
        fields = json.loads(file.metadata()["config"])
    tensors = load_file(path)
    return (
        fields,
        tensors,
        {
            key.removeprefix("model."): tensor
            for key, tensor in tensors.items()
            if key.startswith("model.")
        },
    )


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["a_six_stacks", "b_batch", "c_short", "d_causal"])
def test_outputs_match_the_published_encoder(name):
    """Compare with the public encoder for random weights.

    The files are not in the repository; ASRLLM_PARITY is their directory.
    """
    if not OUTSIDE.is_dir():
        pytest.skip(f"no parity files in {OUTSIDE}")
    fields, tensors, state = read_case(OUTSIDE / f"{name}.safetensors")
    cases = sorted(key.removesuffix(".x") for key in tensors if key.endswith(".x"))
    assert cases
    for case in cases:
        encoder = ZipformerEncoder(ZipformerConfig(**fields | CHUNKS.get(case, {}))).eval()
        encoder.load_state_dict(state)
        x, lengths = tensors[f"{case}.x"], tensors[f"{case}.x_lens"]
        out, out_lengths = encoder(x, lengths)
        torch.testing.assert_close(
            encoder.encoder_embed(x, None), tensors[f"{case}.embed"], atol=1e-4, rtol=0
        )
        torch.testing.assert_close(out, tensors[f"{case}.out"], atol=1e-4, rtol=0)
        assert out_lengths.tolist() == tensors[f"{case}.out_lens"].tolist()


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 3])
def test_outputs_match_the_published_stacks(count):
    """Compare the outputs of stacks at the rates 1, 1/2 and 1/4, given the front end's output.

    These files are small enough to be in the repository.
    """
    fields, tensors, state = read_case(SMALL_CASE)
    per_stack = {
        name: value[:count]
        for name, value in fields.items()
        if isinstance(value, list) and len(value) == 6
    }
    encoder = ZipformerEncoder(ZipformerConfig(**fields | per_stack)).eval()
    encoder.encoder.load_state_dict(
        {
            key.removeprefix("encoder."): tensor
            for key, tensor in without_dead_keys(state).items()
            if not key.startswith(tuple(f"encoder.encoders.{i}." for i in range(count, 6)))
        }
    )
    x = tensors["embed"]
    out = encoder.encoder(x, torch.zeros(x.shape[:2], dtype=torch.bool), False)
    theirs = tensors["out_full"][count - 1]
    assert theirs.std() > 0.1
    torch.testing.assert_close(match_width(out, theirs.shape[2]), theirs, atol=1e-4, rtol=0)


# --- sizes and names ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "causal", "parameters"),
    [
        ("icefall-small", False, 21_989_779),
        ("icefall-medium", False, 63_994_103),
        ("icefall-medium", True, 64_556_023),
        ("icefall-large", False, 146_625_594),
        ("auden-base", False, 65_913_719),
        ("auden-large", False, 152_675_514),
    ],
)
def test_parameter_counts_match_the_published_sizes(size, causal, parameters):
    """The published count includes an unused parameter per layer, which is not built here."""
    config = ZipformerConfig.public(size, causal=causal)
    with torch.device("meta"):
        encoder = ZipformerEncoder(config)
    dead = sum(
        n * width for n, width in zip(config.num_encoder_layers, config.encoder_dim, strict=True)
    )
    assert sum(p.numel() for p in encoder.parameters()) + dead == parameters
    assert (
        sum(p.numel() for p in encoder.encoder_embed.parameters())
        == 611_953 + (config.encoder_dim[0] - 192) * 2434
    )


def linear(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def layer_shapes(width, hidden, heads, kernel, causal):
    """Return the shapes of a layer's weights, from the documentation of the published code."""
    shapes = {
        "bypass.bypass_scale": (width,),
        "bypass_mid.bypass_scale": (width,),
        "norm.log_scale": (),
        "norm.bias": (width,),
    }
    shapes |= linear("self_attn_weights.in_proj", width, heads * (2 * 32 + 4))
    shapes["self_attn_weights.linear_pos.weight"] = (heads * 4, 48)
    for i, size in ((1, hidden * 3 // 4), (2, hidden), (3, hidden * 5 // 4)):
        shapes |= linear(f"feed_forward{i}.in_proj", width, size) | linear(
            f"feed_forward{i}.out_proj", size, width
        )
    between = 3 * width // 4
    shapes |= linear("nonlin_attention.in_proj", width, 3 * between) | linear(
        "nonlin_attention.out_proj", between, width
    )
    for i in (1, 2):
        shapes |= linear(f"self_attn{i}.in_proj", width, heads * 12) | linear(
            f"self_attn{i}.out_proj", heads * 12, width
        )
        conv = f"conv_module{i}"
        shapes |= linear(f"{conv}.in_proj", width, 2 * width) | linear(
            f"{conv}.out_proj", width, width
        )
        if causal:
            shapes |= {f"{conv}.depthwise_conv.causal_conv.weight": (width, 1, (kernel + 1) // 2)}
            shapes |= {f"{conv}.depthwise_conv.chunkwise_conv.weight": (width, 1, kernel)}
            shapes |= {
                f"{conv}.depthwise_conv.{part}_conv.bias": (width,)
                for part in ("causal", "chunkwise")
            }
            shapes |= {f"{conv}.depthwise_conv.chunkwise_conv_scale": (2, width, kernel)}
        else:
            shapes |= {
                f"{conv}.depthwise_conv.weight": (width, 1, kernel),
                f"{conv}.depthwise_conv.bias": (width,),
            }
    return shapes


def all_shapes(config):
    embed = {
        "conv.0.weight": (8, 1, 3, 3),
        "conv.0.bias": (8,),
        "conv.4.weight": (32, 8, 3, 3),
        "conv.4.bias": (32,),
    }
    embed |= {
        "conv.7.weight": (128, 32, 3, 3),
        "conv.7.bias": (128,),
        "convnext.depthwise_conv.weight": (128, 1, 7, 7),
    }
    embed |= {
        "convnext.depthwise_conv.bias": (128,),
        "convnext.pointwise_conv1.weight": (384, 128, 1, 1),
    }
    embed |= {
        "convnext.pointwise_conv1.bias": (384,),
        "convnext.pointwise_conv2.weight": (128, 384, 1, 1),
    }
    embed |= {
        "convnext.pointwise_conv2.bias": (128,),
        "out_norm.log_scale": (),
        "out_norm.bias": (config.encoder_dim[0],),
    }
    embed |= linear("out", 2432, config.encoder_dim[0])
    shapes = {f"encoder_embed.{name}": shape for name, shape in embed.items()} | {
        "encoder.downsample_output.bias": (2,)
    }
    for i, width in enumerate(config.encoder_dim):
        at, rate = f"encoder.encoders.{i}.", config.downsampling_factor[i]
        if rate > 1:
            shapes |= {f"{at}downsample.bias": (rate,), f"{at}out_combiner.bypass_scale": (width,)}
            at += "encoder."
        own = layer_shapes(
            width,
            config.feedforward_dim[i],
            config.num_heads[i],
            config.cnn_module_kernel[i],
            config.causal,
        )
        for j in range(config.num_encoder_layers[i]):
            shapes |= {f"{at}layers.{j}.{name}": shape for name, shape in own.items()}
    return shapes


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", PUBLIC_SIZES)
def test_state_dict_has_the_published_names_and_shapes(size, causal):
    config = ZipformerConfig.public(size, causal=causal)
    with torch.device("meta"):
        state = ZipformerEncoder(config).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == all_shapes(config)


def test_invalid_configuration_is_rejected():
    fields = TINY_ZIPFORMER | {"causal": True, "chunk_size": [16], "left_context_frames": [32]}
    ZipformerConfig(**fields)
    for changes, message in (
        ({"num_heads": [1, 2, 3]}, "num_heads .* 3 .*encoder_dim .* 2 "),
        ({"cnn_module_kernel": [7, 4]}, "cnn_module_kernel=4 "),
        (
            {"encoder_unmasked_dim": [8, 32]},
            "encoder_unmasked_dim=32 .* encoder_dim=24",
        ),
        ({"pos_dim": 15}, "pos_dim=15 "),
        ({"chunk_size": [15]}, "chunk_size=15 .* downsampling_factor=2"),
        (
            {"chunk_size": [2], "left_context_frames": [2]},
            "left_context_frames=2 .*chunk_size=2 .* 3 ",
        ),
        ({"chunk_size": [0]}, r"chunk_size=\[0\] "),
    ):
        with pytest.raises(UserError, match=message):
            ZipformerConfig(**fields | changes)
    with pytest.raises(UserError, match=r"'icefall-smal' .*'icefall-small'"):
        ZipformerConfig.public("icefall-smal")


# --- lengths and padding ---


@pytest.mark.slow
@torch.no_grad()
def test_frame_lengths_match_the_output_lengths():
    encoder = tiny(
        feature_dim=8, num_encoder_layers=[1, 1]
    )  # few bins for speed: they do not matter here
    for frames in range(9, 401):
        out, lengths = encoder(torch.zeros(1, frames, 8), torch.tensor([frames]))
        assert out.shape == (1, (frames - 5) // 4, 24)
        assert lengths.tolist() == [(frames - 5) // 4]


@torch.no_grad()
def test_frame_lengths_of_waveforms_match_the_output_lengths():
    encoder = tiny()
    shortest, _ = encoder.sample_limits({})
    for samples in (shortest, shortest + 1, 5000, 16000, 47999):
        x, lengths = encoder.features(torch.randn(1, samples), torch.tensor([samples]))
        out, out_lengths = encoder(x, lengths)
        assert out.shape[1] == out_lengths[0] == encoder.frame_lengths(samples, {})
    _, lengths = encoder.features(torch.randn(1, shortest - 1), torch.tensor([shortest - 1]))
    assert lengths.tolist() == [8]


@pytest.mark.slow
@pytest.mark.parametrize("length", [0, 1, 8])
def test_too_short_utterance_is_rejected(length):
    with pytest.raises(
        UserError,
        match=rf"utterance 1 .* {length} .* 9 \(90 ms\)",
    ):
        tiny()(torch.zeros(3, 50, 80), torch.tensor([50, length, 20]))
    with pytest.raises(UserError, match=r"utterance 2 .* 51 .* x_lens, .* 50\."):
        tiny()(torch.zeros(3, 50, 80), torch.tensor([50, 20, 51]))


@torch.no_grad()
@pytest.mark.parametrize("isolate", [False, True])
def test_padding_beyond_the_longest_utterance_does_not_change_frames(isolate):
    """Padding to 30 s, for example, does not change the frames."""
    encoder = tiny(isolate=isolate)
    x, lengths = features(120, 77)
    longer = torch.nn.functional.pad(x, (0, 0, 0, 80))
    for i, n in enumerate(lengths):
        longer[i, n:] = 0.0
    far = longer.clone()
    far[:, 160:] = 100.0
    out, out_lengths = encoder(longer, lengths)
    again, _ = encoder(far, lengths)
    assert out.shape[1] == (200 - 5) // 4
    for i, n in enumerate(out_lengths):
        torch.testing.assert_close(again[i, :n], out[i, :n], atol=1e-5, rtol=0)


@torch.no_grad()
def test_frames_do_not_depend_on_the_rest_of_the_batch():
    encoder = tiny()
    x, lengths = features(90, 61, 90)
    out, out_lengths = encoder(x, lengths)
    other, _ = encoder(torch.cat([x[1:2], x[:1] * 3]), torch.tensor([61, 40]))
    torch.testing.assert_close(
        other[0, : out_lengths[1]], out[1, : out_lengths[1]], atol=1e-5, rtol=0
    )


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("chunk", [None, 16, 48, -1])
def test_isolated_utterance_is_encoded_alone_as_in_a_batch(chunk):
    """In the published code, padding changes the last frames. In a model it does not."""
    x, lengths = features(200, 9, 41, 97, 150)
    padded = x.clone()
    for i, n in enumerate(lengths):
        padded[i, n:] = 100.0  # arbitrary values in the padding
    rates = {"downsampling_factor": [1, 8]} | (
        {"causal": True, "chunk_size": chunk, "left_context_frames": 64} if chunk else {}
    )
    encoder, published = random_again(tiny(isolate=True, **rates)), random_again(tiny(**rates))
    together, out_lengths = encoder(padded, lengths)
    differs = False
    for i, (n, out_n) in enumerate(zip(lengths.tolist(), out_lengths.tolist(), strict=True)):
        alone, _ = published(x[i : i + 1, :n], lengths[i : i + 1])
        torch.testing.assert_close(together[i, :out_n], alone[0], atol=1e-5, rtol=0)
        differs |= not torch.allclose(published(padded, lengths)[0][i, :out_n], alone[0], atol=1e-3)
    assert differs


@torch.no_grad()
def test_padding_changes_only_the_last_frames_of_the_front_end():
    encoder = tiny()
    x, _ = features(200, 97)
    together, alone = encoder.encoder_embed(x, None)[1], encoder.encoder_embed(x[1:, :97], None)[0]
    near = (together[: len(alone)] - alone).abs().amax(1) > 1e-5
    assert near.any()
    assert not near[:-3].any()


# --- causal ---


@torch.no_grad()
def test_causal_encoder_does_not_look_past_the_chunk():
    encoder = tiny(causal=True, chunk_size=[8], left_context_frames=[16])
    x, lengths = features(9 + 2 * 31)  # 32 frames after the front end, 4 chunks
    later = x.clone()
    later[:, 9 + 2 * 19 :] += (
        1.0  # the front end's frames from 16 on may see this (its kernels look 3 frames ahead)
    )
    one, two = (encoder(y, lengths)[0][0] for y in (x, later))
    torch.testing.assert_close(
        one[:8], two[:8], atol=1e-6, rtol=0
    )  # two chunks of 8 frames at 50 Hz are 8 at 25 Hz
    assert not torch.allclose(one[8:], two[8:], atol=1e-3)


@pytest.mark.slow
@torch.no_grad()
def test_left_context_is_limited():
    encoder = tiny(
        causal=True,
        chunk_size=[4],
        left_context_frames=[4],
        num_encoder_layers=[1, 1],
        cnn_module_kernel=[3, 3],
    )
    x, lengths = features(9 + 2 * 63)
    earlier = x.clone()
    earlier[:, :10] += 1.0
    one, two = (encoder(y, lengths)[0][0] for y in (x, earlier))
    assert not torch.allclose(one[:4], two[:4], atol=1e-3)
    torch.testing.assert_close(one[16:], two[16:], atol=1e-6, rtol=0)


@torch.no_grad()
def test_evaluation_always_uses_the_largest_chunk():
    several = tiny(causal=True, chunk_size=[8, -1, 16], left_context_frames=[16, 32])
    x, lengths = features(150)
    whole = tiny(causal=True)
    whole.load_state_dict(several.state_dict())
    outputs = [several(x, lengths)[0] for _ in range(4)] + [whole(x, lengths)[0]]
    assert all(torch.equal(out, outputs[0]) for out in outputs)
    assert several.encoder._chunks(40, x.device)[0] == -1
    assert (
        tiny(causal=True, chunk_size=[8, 16], left_context_frames=[16]).encoder._chunks(
            40, x.device
        )[0]
        == 16
    )


# --- precision ---


def random_again(encoder, seed=1):
    """Draw all parameters again as in the parity files: the default initialization is too small."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return encoder


@pytest.mark.slow
@torch.no_grad()
def test_bfloat16_is_near_float32_and_does_not_change_later_calls():
    encoder = random_again(tiny())
    x, lengths = features(200, 120)
    whole, out_lengths = encoder(x, lengths)
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    half, _ = encoder.bfloat16()(x, lengths)
    assert half.dtype == torch.bfloat16
    for i, n in enumerate(out_lengths):
        assert torch.nn.functional.cosine_similarity(whole[i, :n], half[i, :n].float()).min() > 0.99
    encoder.float().load_state_dict(state)
    assert torch.equal(encoder(x, lengths)[0], whole)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_utterance_after_a_short_one(dtype):
    encoder = tiny().to(dtype)
    encoder(*features(100))
    out, lengths = encoder(*features(2300))
    assert lengths.tolist() == [573]
    assert out.isfinite().all()


def test_positions_and_swoosh_are_precise_in_bfloat16():
    positions = relative_positions(1200, 48, torch.device("cpu"))
    assert positions.shape == (2399, 48)
    assert positions.dtype == torch.float32
    assert (positions[:, -1] == 1).all()
    assert (
        positions[:-1].sub(positions[1:]).abs().amax(1).min() > 0
    )  # all distances have different encodings
    x = torch.linspace(-30, 30, 200, dtype=torch.float64)
    for swoosh, shift, offset in ((swoosh_l, 4, 0.035), (swoosh_r, 1, 0.313261687)):
        y = x.float().requires_grad_()
        out = swoosh(y)
        torch.testing.assert_close(
            out.double(), (1 + (x - shift).exp()).log() - 0.08 * x - offset, atol=1e-5, rtol=1e-6
        )
        out.sum().backward()
        torch.testing.assert_close(
            y.grad.double(), (x - shift).sigmoid() - 0.08, atol=1e-6, rtol=1e-5
        )
        near = swoosh(x.bfloat16())
        assert near.dtype == torch.bfloat16
        torch.testing.assert_close(
            near.double(), swoosh(x.bfloat16().float()).double(), atol=1e-3, rtol=1e-2
        )


@torch.no_grad()
def test_attention_weights_have_the_dtype_of_the_model():
    """In float32 those of 8 x 30 s would take 273 MiB per layer.

    Their sum is 1 up to the dtype's precision.
    """
    attention = (
        AttentionWeights(16, heads=2, query_head_dim=8, pos_head_dim=4, pos_dim=16)
        .bfloat16()
        .eval()
    )
    x, positions = (
        torch.randn(1, 600, 16).bfloat16(),
        relative_positions(600, 16, torch.device("cpu")).bfloat16(),
    )
    weights = attention(x, positions, torch.zeros(1, 1, 1, 600, dtype=torch.bool))
    assert weights.dtype == torch.bfloat16
    torch.testing.assert_close(weights.float().sum(3), torch.ones(1, 2, 600), atol=0.01, rtol=0)


@torch.no_grad()
def test_position_scores_are_by_key_minus_query():
    """Compare the scores with those of an explicit index for every pair."""
    attention = AttentionWeights(16, heads=2, query_head_dim=8, pos_head_dim=4, pos_dim=16).eval()
    attention.linear_pos.weight.normal_()
    x, positions = torch.randn(2, 13, 16), relative_positions(13, 16, torch.device("cpu"))
    query, key, place = (
        t.unflatten(2, (2, -1)) for t in attention.in_proj(x).split((16, 16, 8), 2)
    )
    distance = torch.arange(13) - torch.arange(13)[:, None] + 12  # [query, key]
    encoded = attention.linear_pos(positions).unflatten(1, (2, 4))[distance]
    scores = torch.einsum("nqhd,nkhd->nhqk", query, key) + torch.einsum(
        "nqhd,qkhd->nhqk", place, encoded
    )
    mine = attention(x, positions, torch.zeros(2, 1, 1, 13, dtype=torch.bool))
    torch.testing.assert_close(mine, scores.softmax(3), atol=1e-6, rtol=1e-5)


def test_configuration_survives_json():
    config = ZipformerConfig.public("auden-base", causal=True, chunk_size=[16, -1])
    assert ZipformerConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
