"""Greedy search for a batch, with key-value caches of growing or of fixed size."""

import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

# Finished rows are removed once they are this fraction of the batch, because each removal copies
# the keys and values of the rows that remain.
REMOVE_AT = 1 / 4
# Recorded batches have a power of two of rows and a multiple of this length, so that one recording
# serves many batches.
LENGTH_STEP = 128


class StepDecoder(Protocol):
    """An LLM that first reads a prompt and then one token at a time.

    Both steps return the logits of the next token, (N, vocabulary) float32.
    """

    def prompt(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Read prompts that are padded on the left: embeddings (N, T, width) and mask (N, T)."""

    def step(self, tokens: Tensor) -> Tensor:
        """Read the next token of each row (N,)."""

    def keep(self, rows: Tensor) -> bool:
        """Continue with these rows only. Return False if all rows must remain."""


class Stopping(Protocol):
    """Decides which rows are done; see `generation.RowStopping`."""

    limits: Tensor

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows only."""

    def __call__(self, input_ids: Tensor, scores: Tensor | None) -> Tensor:
        """Return which rows are done (N,) bool, given their new tokens (N, T)."""


def greedy(
    decoder: StepDecoder,
    embeddings: Tensor,
    mask: Tensor,
    stop_ids: Sequence[int],
    stopping: Stopping,
    check: Callable[[Tensor], None],
) -> list[list[int]]:
    """Choose the most probable token until each row stops, as transformers' greedy search does.

    Args:
        decoder: the LLM.
        embeddings: prompts, padded on the left (N, T, width).
        mask: attention mask of the prompts (N, T).
        stop_ids: tokens that end a row.
        stopping: further reasons to end a row.
        check: called with the first logits.

    Returns:
        The new tokens of each row.
    """
    stop_tokens = torch.tensor(stop_ids, device=mask.device)
    rows = torch.arange(len(mask), device=mask.device)  # indices of the rows still in the batch
    finished = torch.zeros_like(rows, dtype=torch.bool)
    tokens = mask.new_zeros(len(mask), int(stopping.limits.max()))
    lengths = torch.zeros_like(rows)
    logits = decoder.prompt(embeddings, mask)
    check(logits)
    for step in range(tokens.shape[1]):
        chosen = logits.argmax(-1)
        tokens[rows, step] = chosen
        lengths[rows] += ~finished
        finished |= torch.isin(chosen, stop_tokens)
        finished |= stopping(tokens[rows, : step + 1], None)
        done = int(finished.sum())
        if done == len(rows):
            break
        if done >= REMOVE_AT * len(rows):
            running = (~finished).nonzero()[:, 0]
            if decoder.keep(running):
                rows = rows[running]
                chosen = chosen[running]
                finished = finished[running]
                stopping.keep(running)
        logits = decoder.step(chosen)
    rows_and_lengths = zip(tokens.tolist(), lengths.tolist(), strict=True)
    return [row[:length] for row, length in rows_and_lengths]


class DynamicCacheDecoder:
    """Decoder whose key-value cache grows with the answers and shrinks when rows are removed."""

    def __init__(self, llm: PreTrainedModel, causal_lm: PreTrainedModel) -> None:
        """Create an empty cache.

        Args:
            llm: the LLM as it is called, with its adapters.
            causal_lm: the transformers model inside it.
        """
        self.llm = llm
        self.mask = torch.empty(0)
        self.cache_argument = cache_argument(causal_lm)
        self.cache = DynamicCache(config=causal_lm.config.get_text_config(decoder=True))
        self.prompt_options = last_logits_option(causal_lm)

    def prompt(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """See StepDecoder."""
        self.mask = mask
        return self._logits(
            inputs_embeds=embeddings, position_ids=positions(mask), **self.prompt_options
        )

    def step(self, tokens: Tensor) -> Tensor:
        """See StepDecoder."""
        ones = self.mask.new_ones(len(tokens), 1)
        self.mask = torch.cat([self.mask, ones], 1)
        position_ids = self.mask.sum(1, keepdim=True) - 1
        return self._logits(input_ids=tokens[:, None], position_ids=position_ids)

    def keep(self, rows: Tensor) -> bool:
        """See StepDecoder."""
        self.cache.reorder_cache(rows)
        self.mask = self.mask[rows]
        return True

    def _logits(self, **inputs: Tensor) -> Tensor:
        cache = {self.cache_argument: self.cache}
        output = self.llm(**inputs, attention_mask=self.mask, **cache, use_cache=True)
        return output.logits[:, -1].float()


class CudaGraphDecoder:
    """Decoder with a key-value cache of fixed size, for LLMs whose layers all have full attention.

    On CUDA a step is recorded as a graph. Replaying it does not launch its kernels one by one. The
    decoder is reused for the next batch of the same numbers of rows and tokens.
    """

    def __init__(
        self, llm: PreTrainedModel, causal_lm: PreTrainedModel, rows: int, length: int
    ) -> None:
        """Allocate the cache. The LLMs are those of `DynamicCacheDecoder`.

        Args:
            rows: number of rows.
            length: number of tokens of a row, prompt and answer together.
        """
        config = causal_lm.config.get_text_config(decoder=True)
        self.llm = weakref.proxy(llm)
        self.rows = rows
        self.length = length
        self.cache = StaticCache(config=config, max_cache_len=length)
        self.cache_argument = cache_argument(causal_lm)
        self.prompt_options = last_logits_option(causal_lm)
        self.device = next(causal_lm.parameters()).device
        self.key = recording_key(llm, causal_lm, rows, length)
        self.tokens = torch.zeros(rows, 1, dtype=torch.long, device=self.device)
        self.positions = torch.zeros(rows, 1, dtype=torch.long, device=self.device)
        self.mask = torch.zeros(rows, 1, 1, length, dtype=torch.bool, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits = torch.empty(0)
        self.batch_size = 0
        self.tokens_read = 0

    @classmethod
    def for_batch(
        cls, llm: PreTrainedModel, causal_lm: PreTrainedModel, mask: Tensor, tokens: int
    ) -> "CudaGraphDecoder":
        """Return a decoder for a batch, the previous one if it fits.

        Args:
            llm: the LLM as it is called, with its adapters.
            causal_lm: the transformers model inside it.
            mask: attention mask of the prompts (N, T).
            tokens: maximum number of new tokens.
        """
        rows = 1 << (len(mask) - 1).bit_length()
        length = -(-(mask.shape[1] + tokens) // LENGTH_STEP) * LENGTH_STEP
        decoder = DECODERS.get(causal_lm)
        if decoder is None or decoder.key != recording_key(llm, causal_lm, rows, length):
            DECODERS.pop(causal_lm, None)  # frees its cache before another is allocated
            decoder = cls(llm, causal_lm, rows, length)
            DECODERS[causal_lm] = decoder
        return decoder

    def prompt(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """See StepDecoder."""
        self.batch_size = len(mask)
        self.tokens_read = mask.shape[1]
        embeddings = self._fill_rows(embeddings)
        mask = self._fill_rows(mask)
        if self.cache.is_initialized:
            self.cache.reset()
        shape = (self.tokens_read, self.length)
        causal = torch.ones(shape, dtype=torch.bool, device=self.device).tril()
        self.mask.zero_()
        self.mask[:, 0, 0, : self.tokens_read] = mask.bool()
        self.positions.copy_(mask.sum(1, keepdim=True) - 1)
        logits = self._logits(
            self.mask & causal,
            inputs_embeds=embeddings,
            position_ids=positions(mask),
            **self.prompt_options,
        )
        return logits[: self.batch_size]

    def step(self, tokens: Tensor) -> Tensor:
        """See StepDecoder."""
        self.tokens[: self.batch_size, 0] = tokens
        self.mask[..., self.tokens_read] = True
        self.positions += 1
        self.tokens_read += 1
        if self.device.type != "cuda":
            self.logits = self._step_logits()
        elif self.graph is None:
            self._record()
        else:
            self.graph.replay()
        return self.logits[: self.batch_size]

    def keep(self, rows: Tensor) -> bool:
        """See StepDecoder. The batch has a fixed size."""
        return False

    def _fill_rows(self, x: Tensor) -> Tensor:
        """Repeat the last row: a row without tokens would have nothing to attend to."""
        missing = self.rows - self.batch_size
        copies = x[-1:].expand(missing, *x.shape[1:])
        return torch.cat([x, copies])

    def _step_logits(self) -> Tensor:
        return self._logits(self.mask, input_ids=self.tokens, position_ids=self.positions)

    def _record(self) -> None:
        """Run a step for its logits, which also warms libraries up, and then record it.

        Recording computes nothing.
        """
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                logits = self._step_logits()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.logits = self._step_logits()
            self.logits.copy_(logits)
        self.graph = graph

    def _logits(
        self,
        mask: Tensor,
        **inputs: Tensor,
    ) -> Tensor:
        cache = {self.cache_argument: self.cache}
        output = self.llm(**inputs, attention_mask=mask, **cache, use_cache=True)
        return output.logits[:, -1].float()


# The last decoder of each LLM.
DECODERS: weakref.WeakKeyDictionary[PreTrainedModel, CudaGraphDecoder] = weakref.WeakKeyDictionary()


def can_be_recorded(causal_lm: PreTrainedModel) -> bool:
    """Return whether CudaGraphDecoder supports an LLM."""
    config = causal_lm.config.get_text_config(decoder=True)
    uses_window = getattr(config, "use_sliding_window", True)
    if uses_window and getattr(config, "sliding_window", None) is not None:
        return False
    # dynamic RoPE reads the length of the row on the CPU
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":
        return False
    layer_types = getattr(config, "layer_types", None) or ["full_attention"]
    if set(layer_types) != {"full_attention"}:
        return False
    return len({p.device for p in causal_lm.parameters()}) == 1


def recording_key(
    llm: PreTrainedModel, causal_lm: PreTrainedModel, rows: int, length: int
) -> tuple[object, ...]:
    """Return what a recording depends on: shapes, addresses of the weights, active adapters."""
    adapters = (getattr(llm, "active_adapter", None), getattr(llm, "_adapters_disabled", None))
    addresses = [p.data_ptr() for p in causal_lm.parameters()]
    return rows, length, id(llm), str(adapters), *addresses


def last_logits_option(causal_lm: PreTrainedModel) -> dict[str, Tensor]:
    """Return the option that limits a prompt's logits to its last token, if the LLM has one.

    The token is chosen by its index, because the head is slow for a view of the rows.
    """
    if "logits_to_keep" not in inspect.signature(causal_lm.forward).parameters:
        return {}
    device = next(causal_lm.parameters()).device
    return {"logits_to_keep": torch.tensor([-1], device=device)}


def cache_argument(causal_lm: PreTrainedModel) -> str:
    """Return the name of the forward argument for the cache, which transformers 5.24 renamed."""
    if "cache" in inspect.signature(causal_lm.forward).parameters:
        return "cache"
    return "past_key_values"


def positions(mask: Tensor) -> Tensor:
    """Return the positions of tokens (N, T) in rows that are padded on the left."""
    return (mask.cumsum(1) - 1).clamp(min=0)
