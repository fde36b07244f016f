"""Numbers of frames and of audio tokens."""

from typing import Any

import torch
from torch import Tensor


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
