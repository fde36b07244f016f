"""A projector of strided convolutions over time."""

import torch.nn.functional as F
from torch import Tensor, nn

from asrllm.errors import UserError
from asrllm.models.projectors.base import FrameProjector
from asrllm.models.projectors.lengths import first_frames


class ConvProjector(FrameProjector):
    """Linear, LayerNorm, convolutions that halve the frames, linear.

    The layers before the last one are the adapter of wav2vec 2.0 for speech translation (Li et al.,
    2021): each convolution has kernel 3, stride 2 and a gated linear unit.
    """

    def __init__(self, input_size: int, output_size: int, rate: int, hidden_size: int) -> None:
        super().__init__(input_size, output_size, rate, hidden_size)
        self.linear1 = nn.Linear(input_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(hidden_size, 2 * hidden_size, 3, stride=2, padding=1)
            for _ in range(rate.bit_length() - 1)
        )
        self.linear2 = nn.Linear(hidden_size, output_size)

    @staticmethod
    def check_sizes(rate: int, hidden_size: int) -> None:
        """See Projector."""
        if rate < 2 or rate & (rate - 1):
            raise UserError(
                f"model.audio_encoder_projector_ds_rate={rate} is not a power of 2, but each "
                "layer of model.projector=conv halves the frames. Use 2, 4, 8 or 16."
            )

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """See FrameProjector."""
        x = self.norm(self.linear1(frames))
        for convolution in self.convolutions:
            # A convolution sees zeros after the end, as it does for an utterance alone.
            x = x * first_frames(x, lengths)[..., None]
            x = F.glu(convolution(x.transpose(1, 2)), dim=1).transpose(1, 2)
            lengths = (lengths + 1) // 2
        return self.linear2(x)
