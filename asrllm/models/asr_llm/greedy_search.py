"""Greedy search for a batch, whose rows join and leave while the others continue."""

import inspect
from collections.abc import Callable, Container, Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from asrllm.models.asr_llm.answers import LoopDetector

# Finished rows are removed once they are this fraction of the batch, because each removal copies
# the keys and values of the rows that remain.
REMOVE_AT = 1 / 4


class Row:
    """The answer of a row while it is decoded.

    Attributes:
        tokens: its new tokens, with the token that ended it.
        is_done: whether it has ended. Setting it removes the row from its batch.
    """

    def __init__(self, limit: int, guard: int | None) -> None:
        """
        Args:
            limit: maximum number of tokens.
            guard: ends a row that loops, see `answers.LoopDetector`; None never does.
        """
        self.limit = limit
        self.loops = LoopDetector(guard) if guard else None
        self.tokens: list[int] = []
        self.is_done = False

    def add(self, token: int, stop_ids: Container[int]) -> None:
        """Append the next token, unless the row is done."""
        if self.is_done:
            return
        self.tokens.append(token)
        is_loop = self.loops is not None and self.loops.add(token) is not None
        self.is_done = is_loop or token in stop_ids or len(self.tokens) >= self.limit


class GreedyBatch:
    """Rows that are decoded together, as transformers' greedy search does.

    Rows join between steps, and those that are done leave.

    Attributes:
        rows: rows that are decoded. Some may be done already.
    """

    def __init__(self, decoder: "DynamicCacheDecoder", stop_ids: Container[int]) -> None:
        """
        Args:
            decoder: the LLM with an empty cache.
            stop_ids: tokens that end a row.
        """
        self.decoder = decoder
        self.stop_ids = stop_ids
        self.rows: list[Row] = []
        self.logits = torch.empty(0)

    def join(
        self,
        embeddings: Tensor,
        mask: Tensor,
        rows: Sequence[Row],
        check: Callable[[Tensor], None],
    ) -> None:
        """Read prompts, and decode their answers from the next step on.

        Args:
            embeddings: prompts, padded on the left (N, T, width).
            mask: attention mask of the prompts (N, T).
            rows: their answers.
            check: called with the logits of the first tokens (N, vocabulary).
        """
        if not self.rows:
            self.logits = self.decoder.prompt(embeddings, mask)
            check(self.logits)
        else:
            newcomers = self.decoder.with_empty_cache()
            logits = newcomers.prompt(embeddings, mask)
            check(logits)
            self.decoder.append(newcomers)
            self.logits = torch.cat([self.logits, logits])
        self.rows += rows

    def step(self) -> None:
        """Append the most probable token to each row."""
        chosen = self.logits.argmax(-1)
        for row, token in zip(self.rows, chosen.tolist(), strict=True):
            row.add(token, self.stop_ids)
        running = [i for i, row in enumerate(self.rows) if not row.is_done]
        if not running:
            self.rows = []
            self.decoder = self.decoder.with_empty_cache()
            return
        if len(self.rows) - len(running) >= REMOVE_AT * len(self.rows):
            kept = torch.tensor(running, device=chosen.device)
            self.decoder.keep(kept)
            chosen = chosen[kept]
            self.rows = [self.rows[i] for i in running]
        self.logits = self.decoder.step(chosen)


def greedy(
    decoder: "DynamicCacheDecoder",
    embeddings: Tensor,
    mask: Tensor,
    stop_ids: Container[int],
    rows: Sequence[Row],
    check: Callable[[Tensor], None],
) -> list[list[int]]:
    """Choose the most probable token until each row is done.

    Args:
        decoder: the LLM with an empty cache.
        embeddings: prompts, padded on the left (N, T, width).
        mask: attention mask of the prompts (N, T).
        stop_ids: tokens that end a row.
        rows: their empty answers.
        check: called with the first logits.

    Returns:
        The new tokens of each row.
    """
    batch = GreedyBatch(decoder, stop_ids)
    batch.join(embeddings, mask, rows, check)
    while batch.rows:
        batch.step()
    return [row.tokens for row in rows]


class DynamicCacheDecoder:
    """Decoder whose key-value cache grows with the answers and shrinks when rows are removed."""

    def __init__(self, llm: PreTrainedModel, causal_lm: PreTrainedModel) -> None:
        """Create an empty cache.

        Args:
            llm: the LLM as it is called, with its adapters.
            causal_lm: the transformers model inside it.
        """
        self.llm = llm
        self.causal_lm = causal_lm
        self.mask = torch.empty(0)
        self.cache_argument = cache_argument(causal_lm)
        self.cache = DynamicCache(config=causal_lm.config.get_text_config(decoder=True))
        self.prompt_options = last_logits_option(causal_lm)

    def with_empty_cache(self) -> "DynamicCacheDecoder":
        """Return a decoder of the same LLM with an empty cache."""
        return DynamicCacheDecoder(self.llm, self.causal_lm)

    @property
    def can_append(self) -> bool:
        """Whether other rows can be appended: recurrent layers, for example, have no columns."""
        known = (DynamicLayer, DynamicSlidingWindowLayer)
        return all(type(layer) in known for layer in self.cache.layers)

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

    def append(self, other: "DynamicCacheDecoder") -> None:
        """Continue with the rows of another decoder of the same LLM, after the rows there are.

        The last tokens of all rows come to lie in one column, and the shorter rows are padded on
        the left. Columns that no row uses any more are removed first.
        """
        self._remove_unused_columns()
        width = max(self.mask.shape[1], other.mask.shape[1])
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            if not mine.is_initialized:  # it shares the keys and values of another layer
                continue
            stored = max(mine.keys.shape[-2], theirs.keys.shape[-2])
            mine.keys = _stacked(mine.keys, theirs.keys, stored)
            mine.values = _stacked(mine.values, theirs.values, stored)
            if mine.is_sliding:
                mine.cumulative_length = width
        self.mask = _stacked(self.mask[..., None], other.mask[..., None], width)[..., 0]

    def _remove_unused_columns(self) -> None:
        unused = int((self.mask.sum(0) == 0).long().cumprod(0).sum())
        width = self.mask.shape[1] - unused
        self.mask = self.mask[:, unused:]
        for layer in self.cache.layers:
            if not layer.is_initialized:
                continue
            layer.keys = layer.keys[..., -width:, :]
            layer.values = layer.values[..., -width:, :]
            if layer.is_sliding:
                layer.cumulative_length = width

    def _logits(self, **inputs: Tensor) -> Tensor:
        cache = {self.cache_argument: self.cache}
        output = self.llm(**inputs, attention_mask=self.mask, **cache, use_cache=True)
        return output.logits[:, -1].float()


def _stacked(first: Tensor, second: Tensor, columns: int) -> Tensor:
    """Concatenate rows of columns (N, ..., T, D), padded on the left to a number of columns."""
    padded = []
    for rows in (first, second):
        padded.append(nn.functional.pad(rows, (0, 0, columns - rows.shape[-2], 0)))
    return torch.cat(padded)


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
