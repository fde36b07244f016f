"""Attention over a packed row: each utterance attends to itself alone, and no mask of (tokens x tokens) is built."""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "asrllm_packed"


def register_packed_attention() -> str:
    """Make the attention known to transformers; its name is what `attn_implementation` takes."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, _mask_of_padded)
    return PACKED


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (1, heads, T, d), key and value (1, kv heads, T, d), cu_seq_lens_q (N + 1,) -> (1, T, heads, d).

    One causal call for each utterance. Without cu_seq_lens_q (decoding) it is transformers' own sdpa attention.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    outputs = [sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in parts]
    return torch.cat(outputs, 1), None


def _mask_of_padded(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """No mask for a packed row; the usual one where a padding mask is given."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
