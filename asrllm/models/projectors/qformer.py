"""A projector whose learned queries attend to windows of frames."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asrllm.errors import UserError
from asrllm.models.projectors.base import FrameProjector
from asrllm.models.projectors.lengths import first_frames

QUERIES = 3  # audio tokens of a window, as in Granite Speech
LAYERS = 2
HEAD_WIDTH = 64
NORM_EPSILON = 1e-12  # as in BERT


class QformerProjector(FrameProjector):
    """A windowed Q-Former (Tang et al., 2024), with the sizes of Granite Speech (IBM, 2025).

    Three learned queries attend to a window of `3 x rate` frames, and become its three tokens. The
    last window of an utterance may be shorter. Only its true frames are attended to.
    """

    def __init__(self, input_size: int, output_size: int, rate: int, hidden_size: int) -> None:
        super().__init__(input_size, output_size, rate, hidden_size)
        self.window = QUERIES * rate
        self.query = nn.Parameter(torch.randn(QUERIES, hidden_size))
        self.norm = nn.LayerNorm(hidden_size, NORM_EPSILON)
        self.layers = nn.ModuleList(QformerLayer(hidden_size, input_size) for _ in range(LAYERS))
        self.linear = nn.Linear(hidden_size, output_size)

    @staticmethod
    def check_sizes(rate: int, hidden_size: int) -> None:
        """See Projector."""
        if hidden_size % head_count(hidden_size):
            raise UserError(
                f"model.projector_hidden_size={hidden_size} is not a multiple of {HEAD_WIDTH}, the "
                "width of a head of model.projector=qformer. Use such a multiple, for example 1024."
            )

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """See FrameProjector."""
        frames = F.pad(frames, (0, 0, 0, -frames.shape[1] % self.window))
        windows = frames.unflatten(1, (-1, self.window)).flatten(0, 1)
        valid = first_frames(frames, lengths).view(-1, self.window)
        # A window of padding attends to one of its frames, because a softmax needs a term.
        valid = valid | (torch.arange(self.window, device=frames.device) == 0)
        x = self.norm(self.query).expand(len(windows), -1, -1)
        for layer in self.layers:
            x = layer(x, windows, valid)
        return self.linear(x.reshape(len(frames), -1, x.shape[2]))


class QformerLayer(nn.Module):
    """Attention among queries, attention to frames and feed-forward, each with a norm after it."""

    def __init__(self, width: int, frame_width: int) -> None:
        super().__init__()
        self.self_attention = QueryAttention(width, width)
        self.self_norm = nn.LayerNorm(width, NORM_EPSILON)
        self.cross_attention = QueryAttention(width, frame_width)
        self.cross_norm = nn.LayerNorm(width, NORM_EPSILON)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width, NORM_EPSILON)

    def forward(self, x: Tensor, windows: Tensor, valid: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: queries (windows, Q, width).
            windows: frames (windows, W, frame_width).
            valid: which frames are attended to (windows, W).
        """
        x = self.self_norm(x + self.self_attention(x, x, None))
        x = self.cross_norm(x + self.cross_attention(x, windows, valid[:, None, None]))
        return self.norm(x + self.fc2(F.gelu(self.fc1(x))))


class QueryAttention(nn.Module):
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
            x: queries (windows, Q, width).
            source: vectors to attend to (windows, W, source_width).
            mask: which of them are attended to (windows, 1, 1, W); None for all.
        """
        query = self._split_heads(self.query(x))
        key = self._split_heads(self.key(source))
        value = self._split_heads(self.value(source))
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(output.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        """Map (windows, W, width) to (windows, heads, W, width / heads)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def head_count(width: int) -> int:
    """Return the number of heads: one for each 64 channels, at least one."""
    return max(width // HEAD_WIDTH, 1)
