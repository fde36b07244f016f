"""Greedy decoding of a batch that finished rows leave."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

LEAVE = 4  # rows leave when one in so many is finished: each leaving copies the cache of those that stay


def greedy(
    llm: Any, causal_lm: Any, embeddings: Tensor, mask: Tensor, stops: Sequence[int], ends: Any, check: Callable[[Tensor], None]
) -> list[list[int]]:
    """The most probable token again and again, of each row until it stops: what transformers' greedy search gives, row by row.

    llm, causal_lm: the model as it is called, and transformers' own below adapters. embeddings (N, T, width) and mask (N, T) of prompts
    padded on the left. ends: generation.RowEnds. check: is given the first logits (N, vocabulary). Gives each row's new tokens.
    """
    cache = DynamicCache(config=causal_lm.config.get_text_config(decoder=True))
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(causal_lm.forward).parameters else {}
    stop_ids = torch.tensor(stops, device=mask.device)
    rows = torch.arange(len(mask), device=mask.device)  # the answers that are still in the batch
    finished = torch.zeros_like(rows, dtype=torch.bool)
    tokens = mask.new_zeros(len(mask), int(ends.limits.max()))
    lengths = torch.zeros_like(rows)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs: dict[str, Any] = {"inputs_embeds": embeddings, "position_ids": positions, **last}
    for step in range(tokens.shape[1]):
        logits = llm(**inputs, attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1].float()
        if step == 0:
            check(logits)
        chosen = logits.argmax(-1)
        tokens[rows, step] = chosen
        lengths[rows] += ~finished
        finished |= torch.isin(chosen, stop_ids) | ends(tokens[rows, : step + 1], None)
        done = int(finished.sum())
        if done == len(rows):
            break
        if done * LEAVE >= len(rows):
            keep = (~finished).nonzero()[:, 0]
            cache.reorder_cache(keep)
            rows, mask, chosen, finished = rows[keep], mask[keep], chosen[keep], finished[keep]
            ends.keep(keep)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        inputs = {"input_ids": chosen[:, None], "position_ids": mask.sum(1, keepdim=True) - 1}
    return [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
