"""Attention in projectors, with heads of 64 channels."""

import torch.nn.functional as F
from torch import Tensor, nn

from asrllm.errors import UserError

HEAD_WIDTH = 64


class HeadAttention(nn.Module):
    """Attention from queries to other vectors."""

    def __init__(self, width: int, source_width: int) -> None:
        super().__init__()
        self.heads = head_count(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        """Compute the attention.

        Args:
            x: queries (N, Q, width).
            source: vectors to attend to (N, W, source_width).
            mask: which of them are attended to (N, 1, 1, W); None for all.
        """
        query = self._split_heads(self.query(x))
        key = self._split_heads(self.key(source))
        value = self._split_heads(self.value(source))
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(output.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        """Map (N, W, width) to (N, heads, W, width / heads)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def head_count(width: int) -> int:
    """Return the number of heads: one for each 64 channels, at least one."""
    return max(width // HEAD_WIDTH, 1)


def check_heads(kind: str, width: int) -> None:
    """Raise UserError if heads do not divide the hidden layer of a projector.

    Args:
        kind: a name in PROJECTORS.
        width: width of its hidden layer.
    """
    if width % head_count(width) or width % 2:
        raise UserError(
            f"model.projector_hidden_size={width} is not a multiple of {HEAD_WIDTH}, the width of "
            f"a head of model.projector={kind}. Use such a multiple, for example 1024."
        )
