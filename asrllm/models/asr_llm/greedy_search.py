"""Greedy decoding of a batch."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

LEAVE = 4  # rows leave when one in so many is finished: each leaving copies the keys and values of those that stay
LENGTHS = 128  # Recorded's rows are a power of two, its lengths a multiple of this, so that one recording serves many batches


class Steps(Protocol):
    """An LLM that is given a prompt and then a token at a time; both give the next token's logits, (N, vocabulary) float32."""

    def prompt(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """embeddings (N, T, width), mask (N, T) of prompts padded on the left"""

    def step(self, tokens: Tensor) -> Tensor:
        """tokens (N,)"""

    def keep(self, rows: Tensor) -> bool:
        """Go on with these rows alone; False where all must stay."""


def greedy(
    steps: Steps,
    embeddings: Tensor,
    mask: Tensor,
    stops: Sequence[int],
    ends: Any,
    check: Callable[[Tensor], None],
) -> list[list[int]]:
    """The most probable token again and again, of each row until it stops: what transformers' greedy search gives, row by row.

    embeddings, mask: as in Steps. ends: generation.RowEnds. check: is given the first logits. Gives each row's new tokens.
    """
    stop_ids = torch.tensor(stops, device=mask.device)
    rows = torch.arange(len(mask), device=mask.device)  # the answers that are still in the batch
    finished = torch.zeros_like(rows, dtype=torch.bool)
    tokens = mask.new_zeros(len(mask), int(ends.limits.max()))
    lengths = torch.zeros_like(rows)
    logits = steps.prompt(embeddings, mask)
    check(logits)
    for step in range(tokens.shape[1]):
        chosen = logits.argmax(-1)
        tokens[rows, step] = chosen
        lengths[rows] += ~finished
        finished |= torch.isin(chosen, stop_ids) | ends(tokens[rows, : step + 1], None)
        done = int(finished.sum())
        if done == len(rows):
            break
        if done * LEAVE >= len(rows) and steps.keep(keep := (~finished).nonzero()[:, 0]):
            rows, chosen, finished = rows[keep], chosen[keep], finished[keep]
            ends.keep(keep)
        logits = steps.step(chosen)
    return [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]


class DynamicCacheDecoder:
    """Keys and values grow with the answers and shrink when rows leave. llm, causal_lm: as it is called, and below its adapters."""

    def __init__(self, llm: Any, causal_lm: Any) -> None:
        self.llm, self.mask = llm, torch.empty(0)
        self.name, self.cache = (
            cache_name(causal_lm),
            DynamicCache(config=causal_lm.config.get_text_config(decoder=True)),
        )
        self.last = only_last(causal_lm)

    def prompt(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        self.mask = mask
        return self._forward(inputs_embeds=embeddings, position_ids=positions(mask), **self.last)

    def step(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        return self._forward(
            input_ids=tokens[:, None], position_ids=self.mask.sum(1, keepdim=True) - 1
        )

    def keep(self, rows: Tensor) -> bool:
        self.cache.reorder_cache(rows)
        self.mask = self.mask[rows]
        return True

    def _forward(self, **inputs: Any) -> Tensor:
        return (
            self.llm(**inputs, attention_mask=self.mask, **{self.name: self.cache}, use_cache=True)
            .logits[:, -1]
            .float()
        )


class Recorded:
    """Keys and values have their whole place from the start. On CUDA a step is recorded as a graph, which is replayed without launching
    its kernels one by one; it is kept for the next batch of as many rows and tokens. For LLMs whose layers all attend to everything."""

    def __init__(self, llm: Any, causal_lm: Any, rows: int, length: int) -> None:
        self.llm, self.rows, self.length = weakref.proxy(llm), rows, length
        self.cache = StaticCache(
            config=causal_lm.config.get_text_config(decoder=True), max_cache_len=length
        )
        self.name, weight = cache_name(causal_lm), next(causal_lm.parameters())
        self.last, self.device, self.key = (
            only_last(causal_lm),
            weight.device,
            recording_key(llm, causal_lm, rows, length),
        )
        self.tokens, self.positions = (
            torch.zeros(rows, 1, dtype=torch.long, device=self.device) for _ in range(2)
        )
        self.mask = torch.zeros(rows, 1, 1, length, dtype=torch.bool, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits = torch.empty(0)
        self.batch = self.said = 0

    @classmethod
    def fitting(cls, llm: Any, causal_lm: Any, mask: Tensor, tokens: int) -> Recorded:
        """For a batch of prompts with the mask (N, T) and answers of so many tokens."""
        rows, length = (
            1 << (len(mask) - 1).bit_length(),
            -(-(mask.shape[1] + tokens) // LENGTHS) * LENGTHS,
        )
        kept = RECORDED.get(causal_lm)
        if kept is None or kept.key != recording_key(llm, causal_lm, rows, length):
            RECORDED.pop(causal_lm, None)  # before there is another
            kept = RECORDED[causal_lm] = cls(llm, causal_lm, rows, length)
        return kept

    def prompt(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        self.batch, self.said = len(mask), mask.shape[1]
        more = self.rows - self.batch  # the last row again: rows of nothing would have no attention
        embeddings, mask = (
            torch.cat([x, x[-1:].expand(more, *x.shape[1:])]) for x in (embeddings, mask)
        )
        if self.cache.is_initialized:
            self.cache.reset()
        causal = torch.ones(self.said, self.length, dtype=torch.bool, device=self.device).tril()
        self.mask.zero_()
        self.mask[:, 0, 0, : self.said] = mask.bool()
        self.positions.copy_(mask.sum(1, keepdim=True) - 1)
        logits = self._forward(
            self.mask & causal, inputs_embeds=embeddings, position_ids=positions(mask), **self.last
        )
        return logits[: self.batch]

    def step(self, tokens: Tensor) -> Tensor:
        self.tokens[: self.batch, 0] = tokens
        self.mask[..., self.said] = True
        self.positions += 1
        self.said += 1
        if self.device.type != "cuda":
            self.logits = self._one_step()
        elif self.graph is None:
            self._record()
        else:
            self.graph.replay()
        return self.logits[: self.batch]

    def keep(self, rows: Tensor) -> bool:
        return False

    def _one_step(self) -> Tensor:
        return self._forward(self.mask, input_ids=self.tokens, position_ids=self.positions)

    def _record(self) -> None:
        """The step is done once as it is, which gives its logits and warms libraries up, then recorded, which does nothing."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                logits = self._one_step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.logits = self._one_step()
            self.logits.copy_(logits)
        self.graph = graph

    def _forward(self, mask: Tensor, **inputs: Any) -> Tensor:
        return (
            self.llm(**inputs, attention_mask=mask, **{self.name: self.cache}, use_cache=True)
            .logits[:, -1]
            .float()
        )


RECORDED: weakref.WeakKeyDictionary[Any, Recorded] = (
    weakref.WeakKeyDictionary()
)  # the last of each LLM


def can_be_recorded(causal_lm: Any) -> bool:
    config = causal_lm.config.get_text_config(decoder=True)
    windowed = getattr(config, "sliding_window", None) is not None and getattr(
        config, "use_sliding_window", True
    )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    rope = getattr(config, "rope_parameters", None) or {}
    waits = rope.get("rope_type") == "dynamic"  # it reads on the processor how long the row is
    return (
        not windowed
        and not waits
        and kinds == {"full_attention"}
        and len({p.device for p in causal_lm.parameters()}) == 1
    )


def recording_key(llm: Any, causal_lm: Any, rows: int, length: int) -> tuple[Any, ...]:
    """What a recording holds on to: shapes, where the weights lie, and the adapters that were on."""
    adapters = (getattr(llm, "active_adapter", None), getattr(llm, "_adapters_disabled", None))
    return rows, length, id(llm), str(adapters), *(p.data_ptr() for p in causal_lm.parameters())


def only_last(causal_lm: Any) -> dict[str, Tensor]:
    """Logits of a prompt's last token alone, where the LLM can; taken by its index, since the head is slow for a view of the rows."""
    last = torch.tensor([-1], device=next(causal_lm.parameters()).device)
    return (
        {"logits_to_keep": last}
        if "logits_to_keep" in inspect.signature(causal_lm.forward).parameters
        else {}
    )


def cache_name(causal_lm: Any) -> str:
    """transformers 5.24 renamed it."""
    return (
        "cache" if "cache" in inspect.signature(causal_lm.forward).parameters else "past_key_values"
    )


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)
