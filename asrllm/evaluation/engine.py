"""What decodes: audio and prompts in, answers out. Evaluation and transcription know no more of it than this."""

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from asrllm.data.index import RATE
from asrllm.errors import UserError
from asrllm.models.generation import Answer, generate
from asrllm.models.model import AsrLlmModel

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """limits: the fewest and the most samples at 16 kHz that one answer can be about."""

    limits: tuple[int, int]

    def answer(self, waves: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Answer]:
        """waves: (samples,) float32 each, at 16 kHz; prompts: what is asked about each."""


class TorchEngine:
    """This process's model. options: of generation.generate, such as max_new_tokens and num_beams."""

    def __init__(self, model: AsrLlmModel, options: dict[str, Any]) -> None:
        self.model, self.options = model, {"generation_config": None, "max_tokens_per_second": None, "repetition_guard": None} | options
        self.limits = model.config.sample_limits()

    def answer(self, waves: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Answer]:
        renderer = self.model.require_processor().renderer
        return generate(self.model, list(waves), [renderer.user_messages(prompt) for prompt in prompts], **self.options)


def answer_within_memory(engine: Engine, waves: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Answer]:
    """The engine's answers; where the GPU's memory ends, of one half and then of the other. Raises UserError where one is too much."""
    try:
        return engine.answer(waves, prompts)
    except torch.OutOfMemoryError as error:
        if len(waves) == 1:
            raise UserError(f"the memory ends while {len(waves[0]) / RATE:.1f} s of audio are decoded: free some ({error})") from error
    logger.warning("the memory ended with a batch of %d utterances: it is decoded in halves; smaller batches are faster", len(waves))
    half = len(waves) // 2
    return answer_within_memory(engine, waves[:half], prompts[:half]) + answer_within_memory(engine, waves[half:], prompts[half:])
