"""What decodes: audio and prompts in, answers out. Evaluation and transcription know no more of it than this."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from asrllm.models.generation import Answer, generate
from asrllm.models.model import AsrLlmModel


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
