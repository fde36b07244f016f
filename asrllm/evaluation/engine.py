"""Decoding engines: audio and prompts in, answers out.

Evaluation and transcription depend only on the Engine protocol.
"""

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from asrllm.defaults import RATE, WHISPER_WINDOW
from asrllm.errors import UserError
from asrllm.models.asr_llm.generation import Answer, generate
from asrllm.models.asr_llm.modeling import AsrLlmModel

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """Answers prompts about audio.

    Attributes:
        limits: minimum and maximum number of samples of a waveform at 16 kHz.
        padded_to: seconds to which shorter audio is padded.
    """

    limits: tuple[int, int]
    padded_to: float

    def answer(self, waves: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Answer]:
        """Decode a batch.

        Args:
            waves: (samples,) float32 at 16 kHz each.
            prompts: one per waveform.
        """


class TorchEngine:
    """Runs the model in this process."""

    def __init__(self, model: AsrLlmModel, options: dict[str, Any]) -> None:
        """
        Args:
            model: model on its device.
            options: options of generation.generate, for example max_new_tokens and num_beams.
        """
        self.model = model
        self.options: dict[str, Any] = {
            "generation_config": None,
            "max_tokens_per_second": None,
            "repetition_guard": None,
        }
        self.options |= options
        self.limits = model.config.sample_limits()
        self.padded_to = WHISPER_WINDOW if model.config.pad_to_30s else 0.0

    def answer(self, waves: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Answer]:
        """Decode a batch, see Engine.answer."""
        renderer = self.model.require_processor().renderer
        messages = [renderer.user_messages(prompt) for prompt in prompts]
        return generate(self.model, list(waves), messages, **self.options)


class HalvingEngine:
    """Halves batches that do not fit in memory, and from then on all batches of that size."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.limits = engine.limits
        self.padded_to = engine.padded_to
        self.too_large = float("inf")  # samples of a batch, padding included

    def answer(self, waves: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Answer]:
        """Decode a batch, see Engine.answer.

        Raises:
            UserError: a single utterance does not fit in memory.
        """
        size = len(waves) * max(map(len, waves))
        if size < self.too_large or len(waves) == 1:
            try:
                return self.engine.answer(waves, prompts)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(waves) == 1:
                    raise _too_long_error(size, error) from error
            self.too_large = size
            logger.warning(
                "A batch of %d utterances does not fit in memory. Batches of this size are halved.",
                len(waves),
            )
        half = len(waves) // 2
        first = self.answer(waves[:half], prompts[:half])
        return first + self.answer(waves[half:], prompts[half:])


def _too_long_error(samples: int, error: Exception) -> UserError:
    return UserError(
        f"{samples / RATE:.1f} s of audio do not fit in memory ({error}). "
        "Free memory, or use shorter audio."
    )


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out on the GPU, or on the host in torch's allocator or NumPy."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "can't allocate memory" in str(error)
