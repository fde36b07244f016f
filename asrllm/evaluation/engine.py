"""Decoding engines: audio and prompts in, answers out.

Evaluation and transcription depend only on the Engine protocol.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from asrllm.defaults import RATE, WHISPER_WINDOW
from asrllm.errors import UserError
from asrllm.models.asr_llm.decoding_options import decoding_config
from asrllm.models.asr_llm.generation import Answer, device_of, generate, uses_own_search
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.asr_llm.parallel_batches import parallel_batches
from asrllm.models.asr_llm.running_batch import RunningBatch

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """Answers prompts about audio.

    Attributes:
        limits: minimum and maximum number of samples of a waveform at 16 kHz.
        padded_to: seconds to which shorter audio is padded.
        parallel: number of batches that it decodes at the same time, in threads.
    """

    limits: tuple[int, int]
    padded_to: float
    parallel: int

    def answer(self, waves: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Answer]:
        """Decode a batch.

        Args:
            waves: (samples,) float32 at 16 kHz each.
            prompts: one per waveform.
        """


class PendingRow(Protocol):
    """An utterance of a DecodingBatch.

    Attributes:
        is_done: whether it has been answered. Setting it removes the utterance from its batch.
    """

    is_done: bool


class DecodingBatch(Protocol):
    """A batch that utterances join and leave while it is decoded.

    Attributes:
        can_join: whether utterances can join now.
    """

    @property
    def can_join(self) -> bool: ...

    def join(self, waves: Sequence[np.ndarray], prompts: Sequence[str]) -> Sequence[PendingRow]:
        """Add utterances. The arguments are those of Engine.answer."""

    def step(self) -> Sequence[tuple[PendingRow, Answer]]:
        """Decode for a short time, and return the utterances that are finished."""


class BatchEngine(Engine, Protocol):
    """An engine with batches that utterances join and leave."""

    def open_batch(self) -> DecodingBatch:
        """Return an empty batch."""

    def close(self) -> None:
        """Release the model. Nothing can be decoded afterwards."""


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
        self.parallel = parallel_batches(
            device_of(model), samples=self.options.get("do_sample", False)
        )

    def answer(self, waves: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Answer]:
        """Decode a batch, see Engine.answer."""
        renderer = self.model.require_processor().renderer
        messages = [renderer.user_messages(prompt) for prompt in prompts]
        return generate(self.model, list(waves), messages, **self.options)

    def open_batch(self) -> "DecodingBatch":
        """Return an empty batch."""
        options = self.options.copy()
        limits = {name: options.pop(name) for name in ("max_tokens_per_second", "repetition_guard")}
        config = decoding_config(
            options.pop("generation_config"),
            options.pop("max_new_tokens", None),
            self.model.require_processor().renderer.stop_ids,
            **options,
        )
        if uses_own_search(self.model, config):
            return RunningBatch(self.model, config, **limits)
        return WholeBatch(self)

    def close(self) -> None:
        """Do nothing: the model belongs to the caller."""


class WholeBatch:
    """A batch that no utterance can join while it is decoded, for example by beam search."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.rows: list[WholeBatchRow] = []

    @property
    def can_join(self) -> bool:
        """Whether utterances can join now."""
        return not self.rows

    def join(self, waves: Sequence[np.ndarray], prompts: Sequence[str]) -> Sequence[PendingRow]:
        """Add utterances, see DecodingBatch.join."""
        self.rows = [WholeBatchRow(*row) for row in zip(waves, prompts, strict=True)]
        return self.rows

    def step(self) -> Sequence[tuple[PendingRow, Answer]]:
        """Decode all utterances."""
        rows = [row for row in self.rows if not row.is_done]
        self.rows = []
        if not rows:
            return []
        answers = self.engine.answer([row.wave for row in rows], [row.prompt for row in rows])
        return list(zip(rows, answers, strict=True))


@dataclass(eq=False)
class WholeBatchRow:
    """An utterance of a WholeBatch: (samples,) float32 at 16 kHz, and its prompt."""

    wave: np.ndarray
    prompt: str
    is_done: bool = False


class HalvingEngine:
    """Halves batches that do not fit in memory, and from then on all batches of that size."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.limits = engine.limits
        self.padded_to = engine.padded_to
        self.parallel = engine.parallel
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
