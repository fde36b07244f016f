"""Count the floating-point operations of a training step, and look up what devices can do.

A linear layer takes 2 operations per weight and position in the forward pass, 2 more if its input
needs a gradient, and 2 more if its weight is trained (a frozen weight has no gradient). Attention
takes 2 per attending pair, channel and product, and twice that in the backward pass. In the LLM a
token attends to those before it. The head has supervised tokens only.

Only true frames and tokens count: padding and the recomputation of gradient checkpointing do not.
Embeddings, norms and features are not counted, and sliding windows are ignored.
"""

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from asrllm.defaults import RATE
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.encoders.hf import HfEncoder
from asrllm.models.encoders.hf_families import WHISPER_30S
from asrllm.models.encoders.whisper import WhisperEncoder
from asrllm.models.encoders.zipformer.layers import ZipformerLayer
from asrllm.models.encoders.zipformer.modeling import (
    DownsampledStack,
    FrontEnd,
    ZipformerEncoder,
    ZipformerStack,
)
from asrllm.models.projectors import AudioProjector
from asrllm.models.projectors.conv import ConvProjector
from asrllm.models.projectors.qformer import QformerProjector
from asrllm.models.state_dict import is_adapter

# Dense bfloat16 (V100, T4: float16) by a word or words of the device's name. The figures are the
# manufacturers'.
PEAK_TFLOPS = {
    "V100": 112,
    "T4": 65,
    "A10": 125,
    "A30": 165,
    "A40": 150,
    "A100": 312,
    "A800": 312,
    "L4": 121,
    "L40": 181,
    "L40S": 362,
    "H20": 148,
    "H100": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H800": 989,
    "H200": 989,
    "GH200": 989,
    "B200": 2250,
    "RTX 3090": 71,
    "RTX 4090": 165,
    "RTX A6000": 155,
    "MI250X": 383,
    "MI300X": 1307,
}
Encoder = WhisperEncoder | ZipformerEncoder | HfEncoder
MEASURED_SECONDS = (10, 20)  # of audio, with which an encoder of transformers is measured


def peak_tflops(device_name: str) -> float | None:
    """Return a device's peak dense bf16 throughput in TFLOP/s, or None if it is unknown."""
    known = [name for name in PEAK_TFLOPS if re.search(rf"\b{name}\b", device_name)]
    if not known:
        return None
    return float(PEAK_TFLOPS[max(known, key=len)])


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations of the forward and backward pass per unit of work.

    Attributes:
        frame: per frame of the encoder's output.
        frame_pair: per pair of such frames.
        audio_token: per audio token in the projector.
        token: per token in the LLM.
        pair: per attending pair of tokens in the LLM.
        target: per supervised token in the head.
        config: the model's configuration, which gives the number of audio tokens of a waveform.
        frame_lengths: maps lengths in samples to the encoder's frames.
        pad_to: minimum number of frames of an utterance.
    """

    frame: float
    frame_pair: float
    audio_token: float
    token: float
    pair: float
    target: float
    config: AsrLlmConfig
    frame_lengths: Callable[[Tensor], Tensor]
    pad_to: int

    def of_batch(self, wave_lengths: Tensor, cu_seqlens: Tensor, targets: int) -> float:
        """Return the operations of a packed batch.

        Args:
            wave_lengths: lengths of the waveforms in samples (N,), on the CPU.
            cu_seqlens: boundaries of the utterances in the row (N + 1,), on the CPU.
            targets: number of supervised tokens.
        """
        frames = self.frame_lengths(wave_lengths).clamp(min=self.pad_to).double()
        tokens = cu_seqlens.diff().double()
        audio = self.config.num_audio_tokens(wave_lengths)
        per_utterance = self.frame * frames + self.frame_pair * frames**2 + self.audio_token * audio
        per_utterance += self.token * tokens + self.pair * tokens * (tokens + 1) / 2
        return float(per_utterance.sum()) + self.target * targets


def count_flops(model: AsrLlmModel) -> Flops:
    """Count the operations of a model's training step."""
    encoder = model.audio_encoder
    llm = model.causal_lm
    frame, frame_pair = encoder_flops(encoder)
    needs_gradient = any(p.requires_grad for p in encoder.parameters())
    audio_token = 0.0
    for module, positions in projector_positions(model.projector):
        audio_token += positions * weight_flops(module, input_gradient=needs_gradient)
        needs_gradient |= any(p.requires_grad for p in module.parameters())
    head = llm.get_output_embeddings()
    layers = [module for module in linear_layers(model.llm) if module is not head]
    text = llm.config.get_text_config()
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token = sum(weight_flops(module, input_gradient=True) for module in layers)
    return Flops(
        frame=frame,
        frame_pair=frame_pair,
        audio_token=audio_token,
        token=token + expert_flops(model.llm),
        pair=text.num_hidden_layers * 3 * 4 * text.num_attention_heads * head_width,
        target=weight_flops(head, input_gradient=True),
        config=model.config,
        frame_lengths=functools.partial(
            encoder.frame_lengths,
            values=(model.config.audio_encoder or {}) | {"pad_to_30s": model.config.pad_to_30s},
        ),
        pad_to=encoder.max_frames if getattr(encoder, "pad_to_30s", False) else 0,
    )


def encoder_flops(encoder: Encoder) -> tuple[float, float]:
    """Return an encoder's operations per frame of its output, and per pair of frames."""
    if isinstance(encoder, HfEncoder):
        return hf_flops(encoder)
    frame = 0.0
    needs_gradient = False
    for module, positions in encoder_positions(encoder):
        frame += positions * weight_flops(module, input_gradient=needs_gradient)
        needs_gradient |= any(p.requires_grad for p in module.parameters())
    frame_pair = pair_flops(encoder)
    if needs_gradient:
        frame_pair *= 3
    return frame, frame_pair


def hf_flops(encoder: HfEncoder) -> tuple[float, float]:
    """Measure the forward pass of an encoder of transformers on the meta device.

    Gradients of its input are counted like a forward pass, and those of its weights like another.
    """
    with torch.device("meta"):
        copy = HfEncoder(config=encoder.config, preprocessor={}).eval()
    values = {"config": encoder.config}
    width, hop = HfEncoder.feature_shape(values)
    measured: list[tuple[int, int]] = []
    for seconds in MEASURED_SECONDS:
        samples = seconds * RATE
        length = WHISPER_30S if encoder.pad_to_30s else samples // hop
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            output = copy.run_one(torch.empty(length, width, device="meta"))
        measured.append((len(output), counter.get_total_flops()))
    (few, less), (many, more) = measured
    passes = 1
    if any(p.requires_grad for p in encoder.parameters()):
        passes += 1
    if any(p.requires_grad and not is_adapter(n) for n, p in encoder.named_parameters()):
        passes += 1
    if few == many:
        return passes * less / few, 0.0
    pair = (more / many - less / few) / (many - few)
    return passes * (less / few - pair * few), passes * pair


def linear_layers(module: nn.Module) -> Iterator[nn.Linear]:
    """Yield the linear layers of a module, in order of their construction."""
    return (m for m in module.modules() if isinstance(m, nn.Linear))


def expert_flops(llm: nn.Module) -> float:
    """Return the operations of an LLM's mixtures of experts per token.

    transformers stores the weights of all experts of a layer as one tensor (experts, out, in), of
    which a token uses some experts.
    """
    text = llm.config.get_text_config()
    used = getattr(text, "num_experts_per_tok", 0)
    total = 0.0
    for weight in llm.parameters():
        shape = getattr(weight, "ds_shape", weight.shape)  # of a weight that ZeRO-3 partitions
        if used and len(shape) == 3:
            total += size_flops(weight, input_gradient=True) * used / shape[0]
    return total


def weight_flops(module: nn.Module, *, input_gradient: bool) -> float:
    """Return the operations of a layer at one position.

    Args:
        module: the layer.
        input_gradient: whether the layer's input needs a gradient.
    """
    return size_flops(module.weight, input_gradient=input_gradient)


def size_flops(weight: Tensor, *, input_gradient: bool) -> float:
    """Return the operations of a product with a weight, which ZeRO-3 may have partitioned."""
    size = getattr(weight, "ds_numel", weight.numel())
    return float(size * (2 + 2 * input_gradient + 2 * weight.requires_grad))


def encoder_positions(
    encoder: WhisperEncoder | ZipformerEncoder,
) -> Iterator[tuple[nn.Module, float]]:
    """Yield the layers with weights in the order of the forward pass.

    Each comes with the number of positions to which it is applied, per frame of the encoder's
    output.
    """
    if isinstance(encoder, WhisperEncoder):
        yield encoder.conv1, 2
        yield encoder.conv2, 1
        for module in linear_layers(encoder):
            yield module, 1
        return
    assert isinstance(encoder, ZipformerEncoder)
    yield from _front_end_positions(encoder.encoder_embed, encoder.config.feature_dim)
    for stack, rate in stacks(encoder):
        # applied to distances, once for a batch
        excluded = {layer.self_attn_weights.linear_pos for layer in stack.layers}
        for module in stack.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d)) and module not in excluded:
                yield module, 2 / rate


def _front_end_positions(front: FrontEnd, bins: int) -> Iterator[tuple[nn.Module, float]]:
    """Yield the layers of Zipformer's front end.

    It runs at 50 Hz, so that there are two frames for one of the encoder's output.
    """
    # frequency bins after the second and the third convolution
    second = (bins - 1) // 2
    third = (second - 1) // 2
    yield front.conv[0], 2 * 2 * bins
    yield front.conv[4], 2 * second
    yield front.conv[7], 2 * third
    yield front.convnext.depthwise_conv, 2 * third
    yield front.convnext.pointwise_conv1, 2 * third
    yield front.convnext.pointwise_conv2, 2 * third
    yield front.out, 2


def stacks(encoder: ZipformerEncoder) -> Iterator[tuple[ZipformerStack, int]]:
    """Yield each stack of layers and its downsampling factor."""
    for stack in encoder.encoder.encoders:
        if isinstance(stack, DownsampledStack):
            yield stack.encoder, stack.rate
        else:
            yield stack, 1


def projector_positions(projector: AudioProjector) -> Iterator[tuple[nn.Module, float]]:
    """Yield the layers with weights in the order of the forward pass.

    Each comes with the number of positions to which it is applied, per audio token. Attention among
    the few tokens of an utterance or a window is not counted.
    """
    positions: dict[nn.Module, float] = {}
    if isinstance(projector.mlp, QformerProjector):
        for layer in projector.mlp.layers:
            positions[layer.cross_attention.key] = projector.rate
            positions[layer.cross_attention.value] = projector.rate
    if isinstance(projector.mlp, ConvProjector):
        positions[projector.mlp.linear1] = projector.rate
        for number, convolution in enumerate(projector.mlp.convolutions, 1):
            positions[convolution] = projector.rate / 2**number
    for module in projector.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            yield module, positions.get(module, 1)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            # It is not counted, but if it is trained, the input of the next layer needs a gradient.
            yield module, 0


def pair_flops(encoder: WhisperEncoder | ZipformerEncoder) -> float:
    """Return the operations of all attention layers in the forward pass.

    They are counted per pair of frames of the encoder's output.
    """
    if isinstance(encoder, WhisperEncoder):
        return 4.0 * encoder.output_dim * len(encoder.layers)
    total = 0.0
    for stack, rate in stacks(encoder):
        for layer in stack.layers:
            total += 4 / rate**2 * _layer_pair_flops(layer)
    return total


def _layer_pair_flops(layer: ZipformerLayer) -> float:
    """Return the operations of a layer per pair of its frames.

    Scores by content and by distance (there are twice as many distances as keys), and the products
    with the values of the two attentions and of the gated one.
    """
    query, _, position = layer.self_attn_weights.sizes
    values = (
        layer.self_attn1.in_proj.out_features
        + layer.self_attn2.in_proj.out_features
        + layer.nonlin_attention.out_proj.in_features
    )
    return 2.0 * (query + 2 * position + values)
