"""Projectors: encoder frames -> LLM embeddings at a lower rate. Adding one: a class and a line in PROJECTORS."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asrllm.errors import UserError, nearest


class MlpProjector(nn.Module):
    """Stack `rate` frames, then linear1, ReLU, linear2 (the concatenating projector of SLAM-ASR, Ma et al., 2024)."""

    def __init__(self, input_size: int, output_size: int, rate: int, hidden_size: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(input_size * rate, hidden_size)
        self.linear2 = nn.Linear(hidden_size, output_size)

    def forward(self, stacked: Tensor) -> Tensor:
        """(M, rate x input_size) -> (M, output_size)"""
        return self.linear2(F.relu(self.linear1(stacked)))


class NormedProjector(nn.Module):
    """Stack, LayerNorm, linear, GELU, linear, LayerNorm whose gain starts at the size of the LLM's embeddings: training starts near
    where the LLM expects its input, and a frozen LLM listens within a hundred steps."""

    def __init__(self, input_size: int, output_size: int, rate: int, hidden_size: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(input_size * rate)
        self.linear1 = nn.Linear(input_size * rate, hidden_size)
        self.linear2 = nn.Linear(hidden_size, output_size)
        self.norm_out = nn.LayerNorm(output_size)

    def forward(self, stacked: Tensor) -> Tensor:
        """As MlpProjector.forward."""
        return self.norm_out(self.linear2(F.gelu(self.linear1(self.norm_in(stacked)))))

    def fit_embeddings(self, embeddings: Tensor) -> None:
        """Set the output's gain to the embeddings' standard deviation. embeddings: (some rows, output_size)"""
        nn.init.constant_(self.norm_out.weight, embeddings.float().std().item())


PROJECTORS: dict[str, type[MlpProjector] | type[NormedProjector]] = {
    "mlp": MlpProjector,
    "normed": NormedProjector,
}


class AudioProjector(nn.Module):
    """A projector with what surrounds it: the ragged end padded with zeros or dropped, true lengths, learned boundary embeddings if asked
    for."""

    def __init__(
        self,
        kind: str,
        *,
        input_size: int,
        output_size: int,
        rate: int,
        hidden_size: int,
        tag_boundary: bool,
        drop_ragged: bool = False,
    ) -> None:
        super().__init__()
        if kind not in PROJECTORS:
            raise UserError(f"model.projector={kind!r} is unknown: {nearest(kind, PROJECTORS)}")
        self.rate, self.drop_ragged = rate, drop_ragged
        self.mlp = PROJECTORS[kind](input_size, output_size, rate, hidden_size)
        self.boundary = nn.Parameter(torch.randn(2, output_size) * 0.02) if tag_boundary else None

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """frames (N, T, input_size), lengths (N,) -> (sum of AsrLlmConfig.num_audio_tokens, output_size), utterance after utterance."""
        keep = torch.arange(frames.shape[1], device=frames.device) < lengths[:, None]
        frames = F.pad(frames * keep[..., None], (0, 0, 0, -frames.shape[1] % self.rate))
        counts = lengths // self.rate if self.drop_ragged else -(-lengths // self.rate)
        stacked = frames.reshape(len(frames), -1, self.rate * frames.shape[2])
        tokens = self.mlp(
            stacked[torch.arange(stacked.shape[1], device=frames.device) < counts[:, None]]
        )  # padding is not projected
        if self.boundary is None:
            return tokens
        begin, end = self.boundary.to(tokens.dtype).split(1)
        return torch.cat(
            [row for part in tokens.split(counts.tolist()) for row in (begin, part, end)]
        )
