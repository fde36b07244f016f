"""The projectors by name, and the projector of a model.

To add one, write a class like those in stacked.py or conv.py, add a line to PROJECTORS, and write a
test like those in tests/models/test_projectors.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from asrllm.errors import UserError, nearest
from asrllm.models.projectors.base import FrameProjector, StackProjector
from asrllm.models.projectors.conv import ConvProjector
from asrllm.models.projectors.lengths import count_audio_tokens, first_frames
from asrllm.models.projectors.qformer import QformerProjector
from asrllm.models.projectors.stacked import (
    MlpProjector,
    NormedProjector,
    SwigluProjector,
    VoxtralProjector,
)
from asrllm.models.projectors.transformer import TransformerProjector

PROJECTORS: dict[str, type[StackProjector] | type[FrameProjector]] = {
    "mlp": MlpProjector,
    "normed": NormedProjector,
    "voxtral": VoxtralProjector,
    "swiglu": SwigluProjector,
    "conv": ConvProjector,
    "qformer": QformerProjector,
    "transformer": TransformerProjector,
}


def check_projector(kind: str, *, rate: int, hidden_size: int, warm_start: bool) -> None:
    """Check the configuration of a projector.

    Args:
        kind: a name in PROJECTORS.
        rate: number of frames that make one audio token.
        hidden_size: width of the projector's hidden layer.
        warm_start: whether training begins with a warm start of it.

    Raises:
        UserError: the projector does not support the values.
    """
    PROJECTORS[kind].check_sizes(rate, hidden_size)
    if warm_start and not PROJECTORS[kind].can_warm_start:
        able = [name for name, other in PROJECTORS.items() if other.can_warm_start]
        raise UserError(
            f"model.projector_init=aligned cannot fit model.projector={kind}, because no setting "
            f"of its weights computes a given affine map. Use {' or '.join(able)}, or "
            "model.projector_init=random."
        )


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
        if isinstance(self.mlp, StackProjector):
            stacked, counts = self.stack(frames, lengths)
            tokens = self.mlp(stacked)
        else:
            frames = frames * first_frames(frames, lengths)[..., None]
            counts = self._count(lengths)
            padded = self.mlp(frames, lengths)
            tokens = padded[first_frames(padded, counts)]
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
        counts = self._count(lengths)
        stacked = frames.reshape(len(frames), -1, self.rate * frames.shape[2])
        return stacked[first_frames(stacked, counts)], counts

    def _count(self, lengths: Tensor) -> Tensor:
        """Return the number of tokens for numbers of frames (N,), without the boundaries."""
        return count_audio_tokens(lengths, self.rate, drop_ragged=self.drop_ragged)
