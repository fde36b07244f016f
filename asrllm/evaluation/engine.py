"""What decodes: audio and prompts in, answers out. Evaluation and transcription know no more of it than this."""

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from asrllm.data.index import RATE
from asrllm.errors import UserError
from asrllm.models.asr_llm.generation import Answer, generate
from asrllm.models.asr_llm.modeling import AsrLlmModel

logger = logging.getLogger(__name__)


WINDOW = 30.0  # seconds to which Whisper's own encoder pads


class Engine(Protocol):
    """limits: the fewest and the most samples at 16 kHz that one answer can be about. padded_to: seconds that the shortest takes."""

    limits: tuple[int, int]
    padded_to: float

    def answer(self, waves: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Answer]:
        """waves: (samples,) float32 each, at 16 kHz; prompts: what is asked about each."""


class TorchEngine:
    """This process's model. options: of generation.generate, such as max_new_tokens and num_beams."""

    def __init__(self, model: AsrLlmModel, options: dict[str, Any]) -> None:
        self.model, self.options = (
            model,
            {"generation_config": None, "max_tokens_per_second": None, "repetition_guard": None}
            | options,
        )
        self.limits, self.padded_to = (
            model.config.sample_limits(),
            WINDOW if model.config.pad_to_30s else 0.0,
        )

    def answer(self, waves: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Answer]:
        renderer = self.model.require_processor().renderer
        return generate(
            self.model,
            list(waves),
            [renderer.user_messages(prompt) for prompt in prompts],
            **self.options,
        )


class WithinMemory:
    """An engine whose batches are halved where the memory ends with them, and those of that size from then on."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.limits, self.padded_to = engine, engine.limits, engine.padded_to
        self.too_much = float("inf")  # samples, padding included

    def answer(self, waves: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Answer]:
        """Raises UserError where the memory ends with one utterance."""
        size = len(waves) * max(map(len, waves))
        if size < self.too_much or len(waves) == 1:
            try:
                return self.engine.answer(waves, prompts)
            except (RuntimeError, MemoryError) as error:
                if not is_of_memory(error):
                    raise
                if len(waves) == 1:
                    raise UserError(
                        f"the memory ends while {size / RATE:.1f} s of audio are decoded: free some ({error})"
                    ) from error
            self.too_much = size
            logger.warning(
                "the memory ended with a batch of %d utterances: batches of that size are halved from here on",
                len(waves),
            )
        half = len(waves) // 2
        return self.answer(waves[:half], prompts[:half]) + self.answer(waves[half:], prompts[half:])


def is_of_memory(error: Exception) -> bool:
    """A GPU's memory, or the host's as torch's allocator or NumPy says it."""
    return isinstance(
        error, (torch.OutOfMemoryError, MemoryError)
    ) or "can't allocate memory" in str(error)
