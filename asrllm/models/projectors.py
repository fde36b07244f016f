"""Projectors from encoder frames to LLM embeddings at a lower rate.

To add one, write a class and add a line to PROJECTORS.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from asrllm.errors import UserError, nearest


class MlpProjector(nn.Module):
    """Stacked frames, linear, ReLU, linear: the projector of SLAM-ASR (Ma et al., 2024)."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        rate: int,
        hidden_size: int,
    ) -> None:
        super().__init__()
        self.linear1 = nn.Linear(input_size * rate, hidden_size)
        self.linear2 = nn.Linear(hidden_size, output_size)

    def forward(self, stacked: Tensor) -> Tensor:
        """Map (M, rate x input_size) to (M, output_size)."""
        return self.linear2(F.relu(self.linear1(stacked)))


class NormedProjector(nn.Module):
    """Stacked frames, LayerNorm, linear, GELU, linear, LayerNorm.

    The gain of the last LayerNorm starts at the standard deviation of the LLM's embeddings.
    Training thus starts near the input that the LLM expects, and a frozen LLM responds to the audio
    within a hundred steps.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        rate: int,
        hidden_size: int,
    ) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(input_size * rate)
        self.linear1 = nn.Linear(input_size * rate, hidden_size)
        self.linear2 = nn.Linear(hidden_size, output_size)
        self.norm_out = nn.LayerNorm(output_size)

    def forward(self, stacked: Tensor) -> Tensor:
        """Map (M, rate x input_size) to (M, output_size)."""
        hidden = F.gelu(self.linear1(self.norm_in(stacked)))
        return self.norm_out(self.linear2(hidden))

    def fit_embeddings(self, embeddings: Tensor) -> None:
        """Set the output's gain to the standard deviation of embeddings (rows, output_size)."""
        nn.init.constant_(self.norm_out.weight, embeddings.float().std().item())


PROJECTORS: dict[str, type[MlpProjector] | type[NormedProjector]] = {
    "mlp": MlpProjector,
    "normed": NormedProjector,
}


def first_frames(x: Tensor, lengths: Tensor) -> Tensor:
    """Return a mask (N, T) of the first `lengths` (N,) frames of x (N, T, C)."""
    positions = torch.arange(x.shape[1], device=x.device)
    return positions < lengths[:, None]


def count_audio_tokens(
    frames: Any, rate: int, *, drop_ragged: bool = False, tag_boundary: bool = False
) -> Any:
    """Return how many tokens of the LLM some encoder frames take.

    Args:
        frames: number of frames, as an int, an array or a tensor.
        rate: number of frames that make one token.
        drop_ragged: drop the frames after the last full stack instead of padding with zeros.
        tag_boundary: count an embedding before and after the audio.
    """
    tokens = frames // rate if drop_ragged else -(-frames // rate)
    return tokens + 2 if tag_boundary else tokens


class AudioProjector(nn.Module):
    """A projector for a padded batch.

    It can put learned embeddings before and after each audio.
    """

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
        """Build the projector.

        Args:
            kind: a name in PROJECTORS.
            input_size: width of the encoder's frames.
            output_size: width of the LLM's embeddings.
            rate: number of frames that make one audio token.
            hidden_size: width of the projector's hidden layer.
            tag_boundary: put a learned embedding before and after each audio.
            drop_ragged: drop the frames after the last full stack instead of padding with zeros.
        """
        super().__init__()
        if kind not in PROJECTORS:
            raise UserError(f"model.projector={kind!r} is unknown. {nearest(kind, PROJECTORS)}")
        self.rate = rate
        self.drop_ragged = drop_ragged
        self.mlp = PROJECTORS[kind](input_size, output_size, rate, hidden_size)
        self.boundary: nn.Parameter | None = None
        if tag_boundary:
            # 0.02 is the usual standard deviation of initial embeddings (GPT-2, Qwen2, Llama).
            self.boundary = nn.Parameter(torch.randn(2, output_size) * 0.02)

    @classmethod
    def from_config(
        cls, config: PreTrainedConfig, *, input_size: int, output_size: int
    ) -> "AudioProjector":
        """Build the projector that an AsrLlmConfig describes.

        Args:
            config: an AsrLlmConfig.
            input_size: width of the encoder's frames.
            output_size: width of the LLM's embeddings.
        """
        return cls(
            config.projector,
            input_size=input_size,
            output_size=output_size,
            rate=config.audio_encoder_projector_ds_rate,
            hidden_size=config.projector_hidden_size,
            tag_boundary=config.tag_audio_boundary,
            drop_ragged=config.drop_ragged_frames,
        )

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Return the audio tokens of a batch, one utterance after the other.

        Args:
            frames: (N, T, input_size).
            lengths: number of true frames (N,).

        Returns:
            (sum of AsrLlmConfig.num_audio_tokens, output_size).
        """
        stacked, counts = self.stack(frames, lengths)
        tokens = self.mlp(stacked)
        if self.boundary is None:
            return tokens
        begin, end = self.boundary.to(tokens.dtype).split(1)
        parts: list[Tensor] = []
        for part in tokens.split(counts.tolist()):
            parts += [begin, part, end]
        return torch.cat(parts)

    def stack(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Concatenate each `rate` frames of an utterance.

        Args:
            frames: (N, T, input_size).
            lengths: number of true frames (N,).

        Returns:
            The stacked frames of all utterances without padding (M, rate x input_size), and their
            numbers (N,).
        """
        # Padding that is stacked with an utterance must not depend on its batch.
        frames = frames * first_frames(frames, lengths)[..., None]
        missing = -frames.shape[1] % self.rate
        frames = F.pad(frames, (0, 0, 0, missing))
        counts = count_audio_tokens(lengths, self.rate, drop_ragged=self.drop_ragged)
        stacked = frames.reshape(len(frames), -1, self.rate * frames.shape[2])
        return stacked[first_frames(stacked, counts)], counts
