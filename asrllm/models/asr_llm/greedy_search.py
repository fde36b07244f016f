"""Greedy search for a batch, whose finished rows are removed while the others continue."""

import inspect
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

# Finished rows are removed once they are this fraction of the batch, because each removal copies
# the keys and values of the rows that remain.
REMOVE_AT = 1 / 4


class Stopping(Protocol):
    """Decides which rows are done; see `answers.RowStopping`."""

    limits: Tensor

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows only."""

    def __call__(self, input_ids: Tensor, scores: Tensor | None) -> Tensor:
        """Return which rows are done (N,) bool, given their new tokens (N, T)."""


def greedy(
    decoder: "DynamicCacheDecoder",
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
        # The token that ends a row still counts.
        lengths[rows] += ~finished
        finished |= torch.isin(chosen, stop_tokens)
        finished |= stopping(tokens[rows, : step + 1], None)
        done = int(finished.sum())
        if done == len(rows):
            break
        if done >= REMOVE_AT * len(rows):
            running = (~finished).nonzero()[:, 0]
            decoder.keep(running)
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
        """Read prompts, and return the logits of the next tokens (N, vocabulary) in float32.

        Args:
            embeddings: prompts, padded on the left (N, T, width).
            mask: attention mask of the prompts (N, T).
        """
        self.mask = mask
        return self._logits(
            inputs_embeds=embeddings, position_ids=positions(mask), **self.prompt_options
        )

    def step(self, tokens: Tensor) -> Tensor:
        """Read the next token of each row (N,), and return logits as `prompt` does."""
        ones = self.mask.new_ones(len(tokens), 1)
        self.mask = torch.cat([self.mask, ones], 1)
        # The padding on the left has no positions.
        position_ids = self.mask.sum(1, keepdim=True) - 1
        return self._logits(input_ids=tokens[:, None], position_ids=position_ids)

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows only."""
        # It selects rows by index, also fewer than there are.
        self.cache.reorder_cache(rows)
        self.mask = self.mask[rows]

    def _logits(self, **inputs: Tensor) -> Tensor:
        cache = {self.cache_argument: self.cache}
        output = self.llm(**inputs, attention_mask=self.mask, **cache, use_cache=True)
        return output.logits[:, -1].float()


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
