"""What a training step takes of a device's memory, said before any weight is loaded.

Weights, masters, moments and gradients are counted; activations are measured, by running the LLM's forward pass on the meta device, where
tensors have a shape and no memory, and summing what autograd keeps for the backward pass.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import masking_utils

from asrllm.data.index import RATE
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.asr_llm.serialization import parameters_on_meta
from asrllm.models.encoders.registry import build_encoder
from asrllm.models.loss import LOGITS
from asrllm.models.model_args import ModelConfig
from asrllm.models.pretrained import empty_llm

MASTER, MOMENTS = 4, 8  # bytes of a trained weight: in float32; AdamW's two
CHUNKS = 3  # tensors of a loss chunk's size that live at a time: logits in working precision and in float32, and what reduces them
PROBES = (256, 512)  # tokens
CONTEXT, SLACK = 1 << 30, 0.05  # of CUDA and its libraries; what the allocator cannot use


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of elements. largest: of what ZeRO-3 gathers at once; persistent: in weights that it never divides."""

    weights: int
    trained: int
    largest: int
    persistent: int


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes kept for the backward pass, fixed + each * tokens; chunk: of the loss at its largest."""

    fixed: float
    each: float
    chunk: int

    def bytes(self, tokens: int) -> int:
        return max(0, int(self.fixed + self.each * tokens)) + self.chunk

    def tokens(self, free: float) -> int:
        """The most that fit."""
        return max(0, math.floor((free - self.chunk - self.fixed) / self.each)) if self.each else 0


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device. host: in the host's memory instead, where something is offloaded."""

    weights: int
    masters: int
    moments: int
    gradients: int
    gathered: int
    activations: int
    host: int = 0

    @property
    def device(self) -> int:
        """The peak: gradients grow while activations are given back, and the larger of the two decides."""
        held = self.weights + self.masters + self.moments + self.gathered
        return (
            held
            + max(self.activations, self.gradients)
            + min(self.activations, self.gradients) // 2
        )

    def as_dict(self) -> dict[str, int]:
        return asdict(self) | {"device": self.device}


def on_meta(description: AsrLlmConfig, config: ModelConfig, dtype: torch.dtype) -> AsrLlmModel:
    """The model as it will be trained, with shapes and without memory."""
    with parameters_on_meta():
        model = AsrLlmModel(description, llm=empty_llm(description.llm or {}, dtype))
    model.freeze(*config.frozen_parts, patterns=config.frozen_parameters)
    model.causal_lm.config.asrllm_attention = "sdpa"  # what flash attention keeps is about the same
    return model.to("meta").to(dtype)


def count_sizes(model: AsrLlmModel, *, threshold: int) -> Sizes:
    """threshold: stage3_param_persistence_threshold."""
    parameters = list(model.parameters())
    unsplit = tuple(model.unsplit_modules())
    leaves: list[nn.Module] = [module for module in model.modules() if isinstance(module, unsplit)]
    singles = [
        sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()
    ]
    return Sizes(
        weights=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        largest=max([sum(p.numel() for p in module.parameters()) for module in leaves] + singles),
        persistent=sum(p.numel() for p in parameters if p.numel() < threshold),
    )


def state_memory(
    sizes: Sizes, ds: dict[str, Any], *, ranks: int, width: int, activations: int
) -> Memory:
    """ds: DeepSpeed's configuration of a stage; width: bytes of a working weight."""
    zero = ds["zero_optimization"]
    stage, share = zero["stage"], 1 / ranks
    optimizer_on_host = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    weights_on_host = (zero.get("offload_param") or {}).get("device", "none") != "none"
    weights = sizes.weights * width * (share if stage == 3 else 1)
    # in float32 without ZeRO the weights are the masters
    masters = (
        0 if stage == 0 and width == MASTER else sizes.trained * MASTER * (share if stage else 1)
    )
    moments = sizes.trained * MOMENTS * (share if stage else 1)
    gradients = sizes.trained * width * (share if stage >= 2 else 1)
    bucket = zero.get("reduce_bucket_size", 0) if stage >= 2 else 0
    gradients += 2 * min(bucket, sizes.trained) * width
    gradients += (
        0 if stage == 0 and width == MASTER else sizes.trained * MASTER * (share if stage else 1)
    )  # in float32, for the update
    prefetched = min(zero.get("stage3_prefetch_bucket_size", 0), sizes.weights)
    gathered = (
        (
            sizes.persistent * (1 - share)
            + min(sizes.largest + prefetched, sizes.weights) * (ranks > 1)
        )
        * width
        if stage == 3
        else 0
    )
    host = (masters + moments + gradients) * optimizer_on_host + weights * weights_on_host
    if optimizer_on_host:
        masters, moments, gradients = 0, 0, 2 * min(bucket, sizes.trained) * width
    return Memory(
        weights=0 if weights_on_host else int(weights),
        masters=int(masters),
        moments=int(moments),
        gradients=int(gradients),
        gathered=int(gathered),
        activations=activations,
        host=int(host),
    )


def measure_activations(
    model: AsrLlmModel, *, dtype: torch.dtype, recompute: bool, audio: float
) -> Activations:
    """model: on the meta device, frozen as it will be trained. recompute: trainer.gradient_checkpointing. audio: share of the tokens."""
    low, high = (
        kept_bytes(model, n, dtype, recompute)
        + _of_audio(model, round(n * audio), dtype, recompute)
        for n in PROBES
    )
    each = (high - low) / (PROBES[1] - PROBES[0])
    vocabulary = model.causal_lm.get_output_embeddings().weight.shape[0]
    return Activations(
        fixed=low - each * PROBES[0],
        each=each,
        chunk=CHUNKS * min(LOGITS, vocabulary * PROBES[1]) * MASTER,
    )


def kept_bytes(model: AsrLlmModel, tokens: int, dtype: torch.dtype, recompute: bool) -> int:
    """What the backward pass of the LLM needs of a packed row."""
    llm = model.causal_lm.base_model.train()
    width = llm.config.get_text_config().hidden_size
    row = torch.empty(1, tokens, width, dtype=dtype, device="meta", requires_grad=True)
    ends = torch.tensor([0, tokens], dtype=torch.int32)
    counter = SavedBytes(model)
    with counter, _packing_unread():
        llm(
            inputs_embeds=row, position_ids=torch.arange(tokens, device="meta")[None], use_cache=False,
            cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=tokens, max_length_k=tokens,
        )  # fmt: skip
    layers = llm.config.get_text_config().num_hidden_layers
    # recomputing, each layer keeps its input, and one at a time has all
    return layers * row.nbytes + counter.total // layers if recompute else counter.total


@contextlib.contextmanager
def _packing_unread() -> Iterator[None]:
    """transformers reads the positions to see whether a row is packed, which has no meaning without numbers."""
    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before


def _of_audio(model: AsrLlmModel, tokens: int, dtype: torch.dtype, recompute: bool) -> int:
    """Of the projector, and of an encoder that is trained."""
    rate, counter = model.projector.rate, SavedBytes(model)
    frames = torch.empty(
        tokens,
        rate * model.audio_encoder.output_dim,
        dtype=dtype,
        device="meta",
        requires_grad=True,
    )
    with counter:
        model.projector.mlp(frames)
    total = counter.total
    if any(p.requires_grad for p in model.audio_encoder.parameters()):
        total += int(tokens * rate * _of_encoder(model.config, dtype, recompute))
    return total


def _of_encoder(config: AsrLlmConfig, dtype: torch.dtype, recompute: bool) -> float:
    """Of a frame. A Whisper's layers are alike: it is measured with one and with two of them."""
    fields = config.audio_encoder or {}
    if "encoder_layers" not in fields:
        return _of_a_frame(fields, config.pad_to_30s, dtype)
    one, two = (
        _of_a_frame(fields | {"encoder_layers": n}, config.pad_to_30s, dtype) for n in (1, 2)
    )
    row = fields["d_model"] * dtype.itemsize
    return one + (fields["encoder_layers"] - 1) * (row if recompute else two - one)


def _of_a_frame(fields: dict[str, Any], pad_to_30s: bool, dtype: torch.dtype) -> float:
    """Measured on the processor, with 10 s of audio and weights of the encoder's sizes."""
    encoder = cast(Any, build_encoder(fields, pad_to_30s=pad_to_30s)).to(dtype).train()
    features, lengths = encoder.features(torch.zeros(1, 10 * RATE), torch.tensor([10 * RATE]))
    counter = SavedBytes(encoder)
    with counter:
        _, frames = encoder(features.to(dtype), lengths)
    return counter.total / int(frames.sum())


class SavedBytes:
    """Within its block: bytes of the tensors that autograd keeps, each storage once, weights apart."""

    def __init__(self, module: nn.Module) -> None:
        self.seen = {p.untyped_storage()._cdata for p in module.parameters()}
        self.total, self.kept = 0, []  # type: ignore[var-annotated]

    def __enter__(self) -> "SavedBytes":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)
        self.kept.clear()

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.kept.append(storage)  # else another could be where it was
            self.total += storage.nbytes()
        return tensor
