"""Compare the counted operations with torch's counter of all products."""

import math

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.cpu_linear import CpuLinear
from asrllm.models.flops import count_flops, peak_tflops
from asrllm.models.projectors import PROJECTORS
from asrllm.testing import TINY_ZIPFORMER


@pytest.fixture(autouse=True)
def layers_of_torch(monkeypatch):
    """torch's counter does not know the operator of oneDNN."""
    monkeypatch.setattr(CpuLinear, "_suits", lambda layer, x: False)


WHISPER = {
    "model_type": "whisper",
    "num_mel_bins": 80,
    "d_model": 64,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
}
ENCODERS = {
    "whisper": WHISPER | {"encoder_ffn_dim": 128},
    "zipformer": {"model_type": "zipformer"} | TINY_ZIPFORMER,
    "hf": {
        "model_type": "hf",
        "config": transformers.HubertConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            conv_dim=[32] * 3,
            conv_kernel=[10, 8, 4],
            conv_stride=[10, 8, 4],
            num_conv_pos_embedding_groups=2,
            apply_spec_augment=False,
            layerdrop=0.0,
        ).to_dict(),
        "preprocessor": {},
    },
}
LLM = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "tie_word_embeddings": False,
}
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}


EXPERTS = LLM | {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "head_dim": 16,
}


def make_model(
    kind: str, lora: dict | None, frozen: tuple[str, ...], llm: dict = LLM, **changes: object
) -> AsrLlmModel:
    torch.manual_seed(0)
    more = {
        "audio_token_id": 301,
        "projector_hidden_size": 48,
        "audio_encoder_projector_ds_rate": 4,
    }
    more |= changes
    model = AsrLlmModel(AsrLlmConfig(audio_encoder=ENCODERS[kind], llm=llm, lora=lora, **more))
    model.freeze(*frozen)
    return model.train()


def make_batch(model: AsrLlmModel) -> dict[str, torch.Tensor]:
    """Return three utterances of the same length, because torch would count padding."""
    lengths = torch.full((3,), 64000)
    audio = [int(n) for n in model.config.num_audio_tokens(lengths)]
    rows = [torch.cat([torch.full((n,), 301), torch.randint(0, 300, (40,))]) for n in audio]
    size = torch.tensor([len(row) for row in rows])
    ends = size.cumsum(0)
    positions = torch.cat([torch.arange(int(end) - 20, int(end) - 1) for end in ends])
    return {
        "waves": torch.randn(3, 64000) * 0.1,
        "wave_lengths": lengths,
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(int(n)) for n in size])[None],
        "cu_seqlens": torch.nn.functional.pad(ends, (1, 0)).int(),
        "target_positions": positions,
        "targets": torch.randint(0, 300, (len(positions),)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize(
    ("lora", "frozen"),
    [
        (LORA, ("audio_encoder", "llm")),
        (None, ("llm",)),
        (LORA, ("audio_encoder", "llm", "projector")),
        (None, ()),
    ],
)
def test_count_matches_torchs_counter(kind, lora, frozen):
    check_count(make_model(kind, lora, frozen))


@pytest.mark.slow
@pytest.mark.parametrize("projector", PROJECTORS)
def test_count_of_a_projector_matches_torchs_counter(projector):
    # wide, so that the projector has most of the operations
    changes = {"projector": projector, "projector_hidden_size": 256}
    check_count(make_model("whisper", None, ("audio_encoder", "llm"), **changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "frozen"),
    [
        (LORA | {"target_modules": ["q_proj", "v_proj"]}, ("audio_encoder", "llm")),
        (None, ("audio_encoder",)),
    ],
)
def test_count_of_a_mixture_of_experts_matches_torchs_counter(lora, frozen):
    model = make_model("whisper", lora, frozen, llm=EXPERTS)
    model.llm.set_experts_implementation("eager")  # torch does not count grouped products
    check_count(model)


def check_count(model: AsrLlmModel) -> None:
    """Compare the operations of a step, forward and backward, with torch's count."""
    batch = make_batch(model)
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: convolution_backward}
    )
    with sdpa_kernel(SDPBackend.MATH), counter:  # the fused kernel of the CPU is not counted
        model(**batch).loss.backward()
    counts = {
        name: sum(of_module.values()) for name, of_module in counter.get_flop_counts().items()
    }
    flops = count_flops(model)
    mine = flops.of_batch(batch["wave_lengths"], batch["cu_seqlens"], len(batch["targets"]))
    tokens = batch["cu_seqlens"].diff().double()
    mine += flops.pair * float(
        (tokens**2 - tokens * (tokens + 1) / 2).sum()
    )  # plain products include what a causal mask saves
    assert mine == pytest.approx(
        counts["Global"] - counts.get("AsrLlmModel.audio_encoder.features", 0), rel=0.05
    )


def convolution_backward(gradient, x, weight, *arguments, out_shape, **_):
    """Count the gradient of grouped convolutions, for which torch ignores the groups."""
    return 2 * math.prod(gradient) * math.prod(weight[1:]) * sum(arguments[-1][:2])


def test_peak_tflops_is_known_by_device_name():
    names = {
        "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA A10": 125,
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA L40S": 362,
    }
    names |= {
        "Tesla V100-SXM2-32GB": 112,
        "NVIDIA GeForce RTX 4090": 165,
        "NVIDIA H200": 989,
        "NVIDIA GeForce GTX 1080": None,
    }
    assert {name: peak_tflops(name) for name in names} == names
