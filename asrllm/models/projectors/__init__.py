"""Projectors from encoder frames to embeddings of the LLM, and the table of their names."""

from asrllm.models.projectors.lengths import count_audio_tokens, first_frames
from asrllm.models.projectors.registry import PROJECTORS, AudioProjector, check_projector

__all__ = [
    "PROJECTORS",
    "AudioProjector",
    "check_projector",
    "count_audio_tokens",
    "first_frames",
]
