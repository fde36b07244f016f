"""A projector whose learned queries attend to windows of frames."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asrllm.models.projectors.attention import HeadAttention, check_heads
from asrllm.models.projectors.base import FrameProjector
from asrllm.models.projectors.lengths import first_frames

QUERIES = 3  # audio tokens of a window, as in Granite Speech
QFORMER_LAYERS = 2
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
        self.layers = nn.ModuleList(
            QformerLayer(hidden_size, input_size) for _ in range(QFORMER_LAYERS)
        )
        self.linear = nn.Linear(hidden_size, output_size)

    @staticmethod
    def check_sizes(rate: int, hidden_size: int) -> None:
        """See Projector."""
        check_heads("qformer", hidden_size)

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
        self.self_attention = HeadAttention(width, width)
        self.self_norm = nn.LayerNorm(width, NORM_EPSILON)
        self.cross_attention = HeadAttention(width, frame_width)
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
