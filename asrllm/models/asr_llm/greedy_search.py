"""Greedy search for a batch, whose rows join and leave while the others continue."""

import inspect
from collections.abc import Callable, Container, Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from asrllm.models.asr_llm.answers import LoopDetector
from asrllm.models.attention import PACKED

# Finished rows are removed once they are this fraction of the batch, because each removal copies
# the keys and values of the rows that remain.
REMOVE_AT = 1 / 4


class AnswerRow:
    """The answer of a row while it is decoded.

    Attributes:
        tokens: its new tokens, with the token that ended it.
        logprobs: natural logarithm of the probability of each token.
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
        self.logprobs: list[float] = []
        self.is_done = False

    def add(self, token: int, logprob: float, stop_ids: Container[int]) -> None:
        """Append the next token, unless the row is done."""
        if self.is_done:
            return
        self.tokens.append(token)
        self.logprobs.append(logprob)
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
        self.rows: list[AnswerRow] = []
        self.logits = torch.empty(0)

    def join(
        self,
        embeddings: Tensor,
        mask: Tensor,
        rows: Sequence[AnswerRow],
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
        logits = self.logits.float()
        logprobs = logits.gather(-1, chosen[:, None])[:, 0] - logits.logsumexp(-1)
        chosen_ones = zip(self.rows, chosen.tolist(), logprobs.tolist(), strict=True)
        for row, token, logprob in chosen_ones:
            row.add(token, logprob, self.stop_ids)
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
    rows: Sequence[AnswerRow],
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
        config = causal_lm.config.get_text_config(decoder=True)
        self.cache = DynamicCache(config=config)
        self.keeps_logits = "logits_to_keep" in inspect.signature(causal_lm.forward).parameters
        # other attention takes no packed rows
        self.can_pack = self.can_append and config._attn_implementation == PACKED

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
        if self.can_pack and not bool(mask.all()):
            return self._packed_prompt(embeddings, mask.bool())
        last = mask.new_full((1,), -1)
        inputs = {"inputs_embeds": embeddings, "position_ids": positions(mask)}
        return self._logits(last, attention_mask=mask, cache=self.cache, **inputs)[:, -1]

    def _packed_prompt(self, embeddings: Tensor, is_token: Tensor) -> Tensor:
        """Read prompts in one row without padding, as a training step does."""
        lengths = is_token.sum(1)
        ends = lengths.cumsum(0)
        cu_seqlens = nn.functional.pad(ends, (1, 0)).int()
        longest = int(lengths.max())
        row = DynamicCache()
        logits = self._logits(
            ends - 1,
            cache=row,
            inputs_embeds=embeddings[is_token][None],
            position_ids=positions(is_token)[is_token][None],
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=longest,
            max_length_k=longest,
        )
        for layer, packed in zip(self.cache.layers, row.layers, strict=True):
            layer.update(_pad_left(packed.keys, is_token), _pad_left(packed.values, is_token))
        return logits[0]

    def step(self, tokens: Tensor) -> Tensor:
        """Read the next token of each row (N,), and return logits as `prompt` does."""
        ones = self.mask.new_ones(len(tokens), 1)
        self.mask = torch.cat([self.mask, ones], 1)
        # The padding on the left has no positions.
        position_ids = self.mask.sum(1, keepdim=True) - 1
        last = tokens.new_full((1,), -1)
        inputs = {"input_ids": tokens[:, None], "position_ids": position_ids}
        return self._logits(last, attention_mask=self.mask, cache=self.cache, **inputs)[:, -1]

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

    def _logits(self, kept: Tensor, cache: DynamicCache, **inputs: Tensor | int) -> Tensor:
        """Run the LLM, and return its logits at some columns (N, columns, vocabulary) in float32.

        The columns are chosen before the head if the LLM can do so. They are given by indices,
        because the head is slow for a view of the rows.
        """
        inputs[self.cache_argument] = cache
        if self.keeps_logits:
            return self.llm(**inputs, logits_to_keep=kept, use_cache=True).logits.float()
        return self.llm(**inputs, use_cache=True).logits[:, kept].float()


def _stacked(first: Tensor, second: Tensor, columns: int) -> Tensor:
    """Concatenate rows of columns (N, ..., T, D), padded on the left to a number of columns."""
    padded = []
    for rows in (first, second):
        padded.append(nn.functional.pad(rows, (0, 0, columns - rows.shape[-2], 0)))
    return torch.cat(padded)


def _pad_left(packed: Tensor, is_token: Tensor) -> Tensor:
    """Return the columns of packed rows (1, heads, S, D) as (N, heads, T, D).

    Args:
        packed: keys or values of all tokens.
        is_token: where they are in rows that are padded on the left (N, T).
    """
    _, heads, _, width = packed.shape
    rows = packed.new_zeros(*is_token.shape, heads, width)
    rows[is_token] = packed[0].transpose(0, 1)
    return rows.transpose(1, 2)


def cache_argument(causal_lm: PreTrainedModel) -> str:
    """Return the name of the forward argument for the cache, which transformers 5.24 renamed."""
    if "cache" in inspect.signature(causal_lm.forward).parameters:
        return "cache"
    return "past_key_values"


def positions(mask: Tensor) -> Tensor:
    """Return the positions of tokens (N, T) in rows that are padded on the left."""
    return (mask.cumsum(1) - 1).clamp(min=0)
