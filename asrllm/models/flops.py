"""The operations of a training step, counted from the model's layers, and what devices can do of them.

A linear layer has 2 for each weight and position forward, 2 more where its input's gradient is wanted, 2 more where its weight is trained
(a frozen weight has no gradient). Attention has 2 for each pair that attends, channel and product, and twice that backward; in the LLM a
token attends to those before it. The head has supervised tokens alone. Only true frames and tokens count: padding is no work, nor is what
gradient checkpointing computes again. Embeddings, norms and features are left out, and sliding windows are not looked at.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.encoders.whisper import WhisperEncoder
from asrllm.models.encoders.zipformer.layers import ZipformerLayer
from asrllm.models.encoders.zipformer.modeling import (
    DownsampledStack,
    ZipformerEncoder,
    ZipformerStack,
)

# dense bfloat16 (V100, T4: float16) by a word or words of the device's name, the makers' figures
PEAK_TFLOPS = {
    "V100": 112, "T4": 65, "A10": 125, "A30": 165, "A40": 150, "A100": 312, "A800": 312, "L4": 121, "L40": 181, "L40S": 362, "H20": 148,
    "H100": 989, "H100 PCIe": 756, "H100 NVL": 835, "H800": 989, "H200": 989, "GH200": 989, "B200": 2250, "RTX 3090": 71, "RTX 4090": 165,
    "RTX A6000": 155, "MI250X": 383, "MI300X": 1307,
}  # fmt: skip


def peak_tflops(device_name: str) -> float | None:
    """Of a device by its name; None: not known."""
    known = [name for name in PEAK_TFLOPS if re.search(rf"\b{name}\b", device_name)]
    return float(PEAK_TFLOPS[max(known, key=len)]) if known else None


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations forward and backward, for one of each: an encoder's frame, a pair of its frames, an audio token in the projector, a token
    in the LLM, a pair that attends there, a supervised token in the head.

    config: the model's, which knows how many audio tokens a waveform has. pad_to: frames that an utterance has at least.
    """

    frame: float
    frame_pair: float
    audio_token: float
    token: float
    pair: float
    target: float
    config: Any
    frame_lengths: Any
    pad_to: int

    def of_batch(self, wave_lengths: Tensor, cu_seqlens: Tensor, targets: int) -> float:
        """wave_lengths (N,) in samples, cu_seqlens (N + 1,), on the CPU."""
        frames, tokens = (
            self.frame_lengths(wave_lengths).clamp(min=self.pad_to).double(),
            cu_seqlens.diff().double(),
        )
        audio = self.config.num_audio_tokens(wave_lengths)
        per_utterance = self.frame * frames + self.frame_pair * frames**2 + self.audio_token * audio
        per_utterance += self.token * tokens + self.pair * tokens * (tokens + 1) / 2
        return float(per_utterance.sum()) + self.target * targets


def count_flops(model: AsrLlmModel) -> Flops:
    encoder, llm = model.audio_encoder, model.causal_lm
    frame, trained = 0.0, False
    for module, positions in encoder_positions(encoder):
        frame += positions * of_weights(module, input_wanted=trained)
        trained |= any(p.requires_grad for p in module.parameters())
    audio_token, trained_to_here = 0.0, trained
    for module in linears(model.projector):
        audio_token += of_weights(module, input_wanted=trained_to_here)
        trained_to_here |= any(p.requires_grad for p in module.parameters())
    head, text = llm.get_output_embeddings(), llm.config.get_text_config()
    width = text.num_attention_heads * (
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    )
    return Flops(
        frame=frame,
        frame_pair=pair_flops(encoder) * (3 if trained else 1),
        audio_token=audio_token,
        token=sum(
            of_weights(module, input_wanted=True)
            for module in linears(model.llm)
            if module is not head
        ),
        pair=text.num_hidden_layers * 3 * 4 * width,
        target=of_weights(head, input_wanted=True),
        config=model.config,
        frame_lengths=encoder.frame_lengths,
        pad_to=encoder.max_frames if getattr(encoder, "pad_to_30s", False) else 0,
    )


def linears(module: nn.Module) -> Iterator[nn.Linear]:
    return (m for m in module.modules() if isinstance(m, nn.Linear))


def of_weights(module: nn.Module, *, input_wanted: bool) -> float:
    """At one position. ZeRO-3 holds a weight in parts and keeps its shape beside."""
    weight: Any = module.weight
    size = getattr(weight, "ds_numel", weight.numel())
    return float(size * (2 + 2 * input_wanted + 2 * weight.requires_grad))


def encoder_positions(encoder: Any) -> Iterator[tuple[nn.Module, float]]:
    """Layers with weights in the order of the forward pass, and how often each is applied for a frame that the encoder gives out."""
    if isinstance(encoder, WhisperEncoder):
        yield encoder.conv1, 2
        yield encoder.conv2, 1
        yield from ((module, 1) for module in linears(encoder))
        return
    assert isinstance(encoder, ZipformerEncoder)
    front, bins = encoder.encoder_embed, encoder.config.feature_dim
    rows = (
        (bins - 1) // 2,
        ((bins - 1) // 2 - 1) // 2,
    )  # of frequency after the second and the third convolution
    for module, positions in zip(
        (front.conv[0], front.conv[4], front.conv[7]), (2 * bins, rows[0], rows[1]), strict=True
    ):
        yield module, 2 * positions  # two frames at 50 Hz for one given out
    for module in (
        front.convnext.depthwise_conv,
        front.convnext.pointwise_conv1,
        front.convnext.pointwise_conv2,
    ):
        yield module, 2 * rows[1]
    yield front.out, 2
    for stack, rate in stacks(encoder):
        weighted = (m for m in stack.modules() if isinstance(m, (nn.Linear, nn.Conv1d)))
        positioned = {
            layer.self_attn_weights.linear_pos for layer in stack.layers
        }  # applied to distances, once for a batch
        yield from ((module, 2 / rate) for module in weighted if module not in positioned)


def stacks(encoder: ZipformerEncoder) -> Iterator[tuple[ZipformerStack, int]]:
    for stack in encoder.encoder.encoders:
        yield (stack.encoder, stack.rate) if isinstance(stack, DownsampledStack) else (stack, 1)  # type: ignore[misc]


def pair_flops(encoder: Any) -> float:
    """The attention of all layers, forward, for a pair of frames that the encoder gives out."""
    if isinstance(encoder, WhisperEncoder):
        return 4.0 * encoder.output_dim * len(encoder.layers)
    return sum(
        4 / rate**2 * _layer_pair(layer)
        for stack, rate in stacks(encoder)
        for layer in stack.layers
    )  # type: ignore[arg-type]


def _layer_pair(layer: ZipformerLayer) -> float:
    """Scores by content and by distance (twice as many distances as keys), and what two attentions and the gated one weigh."""
    query, _, position = layer.self_attn_weights.sizes
    values = (
        layer.self_attn1.in_proj.out_features
        + layer.self_attn2.in_proj.out_features
        + layer.nonlin_attention.out_proj.in_features
    )
    return 2.0 * (query + 2 * position + values)
