"""The two interfaces of a projector."""

from typing import ClassVar

from torch import Tensor, nn


class Projector(nn.Module):
    """A projector that makes one audio token from `rate` frames.

    Attributes:
        can_warm_start: whether a warm start can set its weights, which needs the layers of
            `MlpProjector` or `NormedProjector`.
    """

    can_warm_start: ClassVar[bool] = False

    def __init__(self, input_size: int, output_size: int, rate: int, hidden_size: int) -> None:
        """Build the projector.

        Args:
            input_size: width of the encoder's frames.
            output_size: width of the LLM's embeddings.
            rate: number of frames that make one audio token.
            hidden_size: width of the hidden layer.

        Raises:
            UserError: the projector does not support these sizes.
        """
        super().__init__()
        self.check_sizes(rate, hidden_size)

    @staticmethod
    def check_sizes(rate: int, hidden_size: int) -> None:
        """Raise UserError if the projector does not support these arguments of its constructor."""


class StackProjector(Projector):
    """A projector of stacked frames, which computes each token from its own `rate` frames."""

    def forward(self, stacked: Tensor) -> Tensor:
        """Map (M, rate x input_size) to (M, output_size)."""
        raise NotImplementedError


class FrameProjector(Projector):
    """A projector of padded frames, whose tokens may depend on more than `rate` frames.

    The tokens of an utterance must not depend on the padding after it.
    """

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Project a batch. Its values must not decide about shapes, so that it can be planned.

        Args:
            frames: (N, T, input_size), zero after the end of each utterance.
            lengths: number of true frames (N,).

        Returns:
            (N, at least T / rate, output_size), with any values after each utterance's tokens.
        """
        raise NotImplementedError
