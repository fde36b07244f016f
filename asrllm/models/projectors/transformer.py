"""A projector whose tokens attend to each other."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asrllm.models.projectors.attention import HeadAttention, check_heads
from asrllm.models.projectors.base import FrameProjector
from asrllm.models.projectors.lengths import first_frames

TRANSFORMER_LAYERS = 2
LONGEST_PERIOD = 10000.0  # of the sines, in tokens


class TransformerProjector(FrameProjector):
    """Stacked frames, linear, Transformer layers with a norm before each part, norm, linear.

    A token attends to the whole utterance. Positions are sines and cosines (Vaswani et al., 2017).
    """

    def __init__(self, input_size: int, output_size: int, rate: int, hidden_size: int) -> None:
        super().__init__(input_size, output_size, rate, hidden_size)
        self.rate = rate
        self.linear1 = nn.Linear(input_size * rate, hidden_size)
        self.layers = nn.ModuleList(
            TransformerLayer(hidden_size) for _ in range(TRANSFORMER_LAYERS)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.linear2 = nn.Linear(hidden_size, output_size)

    @staticmethod
    def check_sizes(rate: int, hidden_size: int) -> None:
        """See Projector."""
        check_heads("transformer", hidden_size)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """See FrameProjector."""
        frames = F.pad(frames, (0, 0, 0, -frames.shape[1] % self.rate))
        x = self.linear1(frames.unflatten(1, (-1, self.rate)).flatten(2))
        x = x + sines(x.shape[1], x.shape[2], x.device).to(x.dtype)
        mask = first_frames(x, -(-lengths // self.rate))[:, None, None]
        for layer in self.layers:
            x = layer(x, mask)
        return self.linear2(self.norm(x))


class TransformerLayer(nn.Module):
    """Self-attention and feed-forward, each with a LayerNorm before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = HeadAttention(width, width)
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: (N, K, width).
            mask: which tokens are attended to (N, 1, 1, K).
        """
        normalized = self.attention_norm(x)
        x = x + self.attention(normalized, normalized, mask)
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


def sines(count: int, width: int, device: torch.device) -> Tensor:
    """Return sines and cosines of the positions (count, width). `width` must be even."""
    steps = torch.arange(width // 2, device=device) / (width // 2)
    rates = torch.exp(-math.log(LONGEST_PERIOD) * steps)
    angles = torch.arange(count, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)
