"""Estimate of the device memory that a training step takes, without loading any weights.

Weights, master weights, moments and gradients are counted. Activations are measured: the LLM's
forward pass runs on the meta device, where tensors have a shape but no memory, and the tensors that
autograd saves for the backward pass are summed.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import masking_utils

from asrllm.defaults import RATE, PadTo30s
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.encoders.registry import build_encoder
from asrllm.models.loss import MAX_CHUNK_LOGITS
from asrllm.models.meta_device import parameters_on_meta
from asrllm.models.model_args import ModelConfig
from asrllm.models.pretrained import empty_llm
from asrllm.models.projectors.base import StackProjector
from asrllm.training.ds_keys import DsConfig

MASTER = 4  # bytes of a trained weight in float32
MOMENTS = 8  # bytes of AdamW's two moments per trained weight
# Tensors of a loss chunk's size that exist at the same time: logits in working precision and in
# float32, and the temporary of the reduction.
CHUNKS = 3
TRIAL_TOKENS = (256, 512)  # tokens
CUDA_CONTEXT = 1 << 30  # bytes of CUDA and its libraries
SLACK = 0.05  # ratio of the memory that the allocator cannot use
AUDIO_PROBE = 10 * RATE  # samples


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of elements.

    Attributes:
        weights: elements of all weights.
        trained: elements of the trained weights.
        largest: most elements that ZeRO-3 gathers at once.
        persistent: elements of the weights that ZeRO-3 never partitions.
    """

    weights: int
    trained: int
    largest: int
    persistent: int


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes saved for the backward pass: fixed + each * tokens, and the loss.

    Attributes:
        fixed: bytes that do not depend on the number of tokens.
        each: bytes per token.
        chunk: bytes of the largest chunk of the loss.
    """

    fixed: float
    each: float
    chunk: int

    def bytes(self, tokens: int) -> int:
        """Return the bytes of a row of tokens."""
        return max(0, int(self.fixed + self.each * tokens)) + self.chunk

    def tokens(self, free: float) -> int:
        """Return the largest number of tokens that fits in the free bytes."""
        if not self.each:
            return 0
        return max(0, math.floor((free - self.chunk - self.fixed) / self.each))


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device.

    Attributes:
        weights: weights in working precision.
        masters: float32 master weights.
        moments: moments of the optimizer.
        gradients: gradients and their buckets.
        gathered: weights that ZeRO-3 gathers.
        activations: tensors saved for the backward pass.
        host: bytes in host memory instead, if something is offloaded.
    """

    weights: int
    masters: int
    moments: int
    gradients: int
    gathered: int
    activations: int
    host: int = 0

    @property
    def device(self) -> int:
        """Peak bytes on the device.

        Gradients grow while activations are freed, so the larger of the two decides.
        """
        permanent = self.weights + self.masters + self.moments + self.gathered
        larger = max(self.activations, self.gradients)
        smaller = min(self.activations, self.gradients)
        return permanent + larger + smaller // 2

    def as_dict(self) -> dict[str, int]:
        """Return all fields and the peak on the device."""
        return asdict(self) | {"device": self.device}


def on_meta(description: AsrLlmConfig, config: ModelConfig, dtype: torch.dtype) -> AsrLlmModel:
    """Return the model on the meta device, frozen as it will be trained."""
    with parameters_on_meta():
        model = AsrLlmModel(description, llm=empty_llm(description.llm or {}, dtype))
    model.freeze(*config.frozen_parts, patterns=config.frozen_parameters)
    # flash attention saves about as much
    model.causal_lm.config.asrllm_attention = "sdpa"
    return model.to("meta").to(dtype)


def count_sizes(model: AsrLlmModel, *, threshold: int) -> Sizes:
    """Count the elements of a model's weights.

    Args:
        model: model, frozen as it will be trained.
        threshold: stage3_param_persistence_threshold.
    """
    parameters = list(model.parameters())
    unsplit = tuple(model.unsplit_modules())
    gathered = []
    for module in model.modules():
        gathered.append(sum(p.numel() for p in module.parameters(recurse=False)))
        if isinstance(module, unsplit):
            gathered.append(sum(p.numel() for p in module.parameters()))
    return Sizes(
        weights=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        largest=max(gathered),
        persistent=sum(p.numel() for p in parameters if p.numel() < threshold),
    )


def state_memory(sizes: Sizes, ds: DsConfig, *, ranks: int, width: int, activations: int) -> Memory:
    """Return the memory of one device.

    Args:
        sizes: elements of the weights.
        ds: complete DeepSpeed configuration.
        ranks: number of processes.
        width: bytes of a weight in working precision.
        activations: bytes of the activations.
    """
    zero = ds["zero_optimization"]
    stage = zero["stage"]
    partition = 1 / ranks  # ratio of a partition to the whole
    optimizer_on_host = _is_offloaded(zero, "offload_optimizer")
    weights_on_host = _is_offloaded(zero, "offload_param")
    weights = sizes.weights * width * (partition if stage == 3 else 1)
    moments = sizes.trained * MOMENTS * (partition if stage else 1)
    masters: float = sizes.trained * MASTER * (partition if stage else 1)
    if stage == 0 and width == MASTER:  # in float32 without ZeRO the weights are the masters
        masters = 0
    bucket = 0
    if stage >= 2:
        bucket = zero.get("reduce_bucket_size", 0)
    buckets = 2 * min(bucket, sizes.trained) * width
    gradients = sizes.trained * width * (partition if stage >= 2 else 1)
    gradients += buckets
    gradients += masters  # gradients in float32 for the update have the size of the masters
    host = 0.0
    if optimizer_on_host:
        host += masters + moments + gradients
        masters = 0
        moments = 0
        gradients = buckets
    if weights_on_host:
        host += weights
        weights = 0
    return Memory(
        weights=int(weights),
        masters=int(masters),
        moments=int(moments),
        gradients=int(gradients),
        gathered=int(_gathered_memory(sizes, zero, ranks, width)),
        activations=activations,
        host=int(host),
    )


def _gathered_memory(sizes: Sizes, zero: DsConfig, ranks: int, width: int) -> float:
    """Return the bytes of the weights that ZeRO-3 gathers on one device."""
    if zero["stage"] != 3:
        return 0.0
    prefetched = min(zero.get("stage3_prefetch_bucket_size", 0), sizes.weights)
    temporary = min(sizes.largest + prefetched, sizes.weights) * (ranks > 1)
    return (sizes.persistent * (1 - 1 / ranks) + temporary) * width


def _is_offloaded(zero: DsConfig, key: str) -> bool:
    """Return whether a part is in host memory or on a disk."""
    return (zero.get(key) or {}).get("device", "none") != "none"


def measure_activations(
    model: AsrLlmModel, *, dtype: torch.dtype, recompute: bool, audio: float
) -> Activations:
    """Measure the bytes that autograd saves.

    Args:
        model: model on the meta device, frozen as it will be trained.
        dtype: working precision.
        recompute: trainer.gradient_checkpointing.
        audio: ratio of audio tokens to all tokens.
    """
    measured = []
    for tokens in TRIAL_TOKENS:
        llm_bytes = saved_by_llm(model, tokens, dtype, recompute)
        audio_bytes = _audio_bytes(model, round(tokens * audio), dtype, recompute)
        measured.append(llm_bytes + audio_bytes)
    low, high = measured
    each = (high - low) / (TRIAL_TOKENS[1] - TRIAL_TOKENS[0])
    vocabulary = model.causal_lm.get_output_embeddings().weight.shape[0]
    return Activations(
        fixed=low - each * TRIAL_TOKENS[0],
        each=each,
        chunk=CHUNKS * min(MAX_CHUNK_LOGITS, vocabulary * TRIAL_TOKENS[1]) * MASTER,
    )


def saved_by_llm(model: AsrLlmModel, tokens: int, dtype: torch.dtype, recompute: bool) -> int:
    """Return the bytes that the LLM saves for the backward pass of a packed row.

    Args:
        model: model on the meta device, frozen as it will be trained.
        tokens: length of the row.
        dtype: working precision.
        recompute: whether the layers are recomputed in the backward pass.
    """
    llm = model.causal_lm.base_model.train()
    width = llm.config.get_text_config().hidden_size
    row = torch.empty(1, tokens, width, dtype=dtype, device="meta", requires_grad=True)
    counter = SavedBytes(model)
    with counter, _without_packing_check():
        _pass_row(llm, row)
    if not recompute:
        return counter.total
    # each layer saves its input, and one layer at a time saves all
    layers = llm.config.get_text_config().num_hidden_layers
    return layers * row.nbytes + counter.total // layers


def _pass_row(llm: nn.Module, row: Tensor) -> None:
    """Run the LLM on a row (1, T, C) that is packed with one utterance."""
    tokens = row.shape[1]
    ends = torch.tensor([0, tokens], dtype=torch.int32)
    llm(
        inputs_embeds=row,
        position_ids=torch.arange(tokens, device="meta")[None],
        use_cache=False,
        cu_seq_lens_q=ends,
        cu_seq_lens_k=ends,
        max_length_q=tokens,
        max_length_k=tokens,
    )


@contextlib.contextmanager
def _without_packing_check() -> Iterator[None]:
    """Keep transformers from reading the positions, which have no values on the meta device.

    It reads them to find out whether a row is packed.
    """
    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def _audio_bytes(model: AsrLlmModel, tokens: int, dtype: torch.dtype, recompute: bool) -> int:
    """Return the bytes that the projector, and an encoder that is trained, save."""
    rate = model.projector.rate
    width = model.audio_encoder.output_dim
    frames = torch.empty(1, tokens * rate, width, dtype=dtype, device="meta", requires_grad=True)
    counter = SavedBytes(model)
    with counter:
        if isinstance(model.projector.mlp, StackProjector):
            model.projector.mlp(frames.view(tokens, rate * width))
        else:
            lengths = torch.full((1,), tokens * rate, device="meta")
            model.projector.mlp(frames, lengths)
    total = counter.total
    if any(p.requires_grad for p in model.audio_encoder.parameters()):
        total += int(tokens * rate * _encoder_bytes(model.config, dtype, recompute))
    return total


def _encoder_bytes(config: AsrLlmConfig, dtype: torch.dtype, recompute: bool) -> float:
    """Return the bytes that the encoder saves per output frame.

    The layers of a Whisper encoder have the same size, so it is measured
    with one and with two of them.
    """
    fields = config.audio_encoder or {}
    if "encoder_layers" not in fields:
        return _bytes_per_frame(fields, config.pad_to_30s, dtype)
    one = _bytes_per_frame(fields | {"encoder_layers": 1}, config.pad_to_30s, dtype)
    two = _bytes_per_frame(fields | {"encoder_layers": 2}, config.pad_to_30s, dtype)
    layer = two - one
    if recompute:  # each layer saves its input only
        layer = fields["d_model"] * dtype.itemsize
    return one + (fields["encoder_layers"] - 1) * layer


def _bytes_per_frame(
    fields: Mapping[str, object], pad_to_30s: PadTo30s, dtype: torch.dtype
) -> float:
    """Measure an encoder with new weights on the CPU, with 10 s of audio."""
    encoder = cast(Any, build_encoder(dict(fields), pad_to_30s=pad_to_30s))
    encoder = encoder.to(dtype).train()
    waves = torch.zeros(1, AUDIO_PROBE)
    features, lengths = encoder.features(waves, torch.tensor([AUDIO_PROBE]))
    counter = SavedBytes(encoder)
    with counter:
        _, frames = encoder(features.to(dtype), lengths)
    return counter.total / int(frames.sum())


class SavedBytes:
    """Count the bytes that autograd saves in the block: each storage once, without the weights.

    Attributes:
        total: bytes so far.
    """

    def __init__(self, module: nn.Module) -> None:
        """Exclude the weights of a module from the count."""
        self.seen = {p.untyped_storage()._cdata for p in module.parameters()}
        self.total = 0
        self.storages: list[torch.UntypedStorage] = []

    def __enter__(self) -> "SavedBytes":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)
        self.storages.clear()

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.storages.append(storage)  # else a new storage could get the same address
            self.total += storage.nbytes()
        return tensor
