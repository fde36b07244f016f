"""Projectors that compute each audio token from its own stack of frames."""

import torch.nn.functional as F
from torch import Tensor, nn

from asrllm.models.projectors.base import StackProjector


class MlpProjector(StackProjector):
    """Stacked frames, linear, ReLU, linear: the projector of SLAM-ASR (Ma et al., 2024)."""

    can_warm_start = True

    def __init__(self, input_size: int, output_size: int, rate: int, hidden_size: int) -> None:
        super().__init__(input_size, output_size, rate, hidden_size)
        self.linear1 = nn.Linear(input_size * rate, hidden_size)
        self.linear2 = nn.Linear(hidden_size, output_size)

    def forward(self, stacked: Tensor) -> Tensor:
        """See StackProjector."""
        return self.linear2(F.relu(self.linear1(stacked)))


class NormedProjector(StackProjector):
    """Stacked frames, LayerNorm, linear, GELU, linear, LayerNorm.

    The gain of the last LayerNorm starts at the standard deviation of the LLM's embeddings.
    Training thus starts near the input that the LLM expects, and a frozen LLM responds to the audio
    within a hundred steps.
    """

    can_warm_start = True

    def __init__(self, input_size: int, output_size: int, rate: int, hidden_size: int) -> None:
        super().__init__(input_size, output_size, rate, hidden_size)
        self.norm_in = nn.LayerNorm(input_size * rate)
        self.linear1 = nn.Linear(input_size * rate, hidden_size)
        self.linear2 = nn.Linear(hidden_size, output_size)
        self.norm_out = nn.LayerNorm(output_size)

    def forward(self, stacked: Tensor) -> Tensor:
        """See StackProjector."""
        hidden = F.gelu(self.linear1(self.norm_in(stacked)))
        return self.norm_out(self.linear2(hidden))

    def match_embeddings(self, embeddings: Tensor) -> None:
        """Set the output's gain to the standard deviation of embeddings (rows, output_size)."""
        nn.init.constant_(self.norm_out.weight, embeddings.float().std().item())


class VoxtralProjector(StackProjector):
    """Stacked frames, linear, GELU, linear, without biases: Voxtral's (Liu et al., 2025).

    Voxtral stacks 4 frames, and its hidden layer has the LLM's width.
    """

    def __init__(self, input_size: int, output_size: int, rate: int, hidden_size: int) -> None:
        super().__init__(input_size, output_size, rate, hidden_size)
        self.linear1 = nn.Linear(input_size * rate, hidden_size, bias=False)
        self.linear2 = nn.Linear(hidden_size, output_size, bias=False)

    def forward(self, stacked: Tensor) -> Tensor:
        """See StackProjector."""
        return self.linear2(F.gelu(self.linear1(stacked)))


class SwigluProjector(StackProjector):
    """Stacked frames, RMSNorm, SwiGLU, RMSNorm: the projector of Ultravox (Fixie, 2024).

    The gain of the last RMSNorm starts at the standard deviation of the LLM's embeddings.
    """

    EPSILON = 1e-6

    def __init__(self, input_size: int, output_size: int, rate: int, hidden_size: int) -> None:
        super().__init__(input_size, output_size, rate, hidden_size)
        self.norm_in = nn.RMSNorm(input_size * rate, self.EPSILON)
        self.up = nn.Linear(input_size * rate, hidden_size, bias=False)
        self.gate = nn.Linear(input_size * rate, hidden_size, bias=False)
        self.down = nn.Linear(hidden_size, output_size, bias=False)
        self.norm_out = nn.RMSNorm(output_size, self.EPSILON)

    def forward(self, stacked: Tensor) -> Tensor:
        """See StackProjector."""
        normalized = self.norm_in(stacked)
        hidden = F.silu(self.gate(normalized)) * self.up(normalized)
        return self.norm_out(self.down(hidden))

    def match_embeddings(self, embeddings: Tensor) -> None:
        """Set the output's gain to the standard deviation of embeddings (rows, output_size)."""
        nn.init.constant_(self.norm_out.weight, embeddings.float().std().item())
