"""The longest audio that a model takes in vLLM, which reserves memory for it."""

from asrllm.defaults import RATE
from asrllm.models.asr_llm.configuration import AsrLlmConfig

LONGEST = 30.0  # seconds, unless training had longer utterances


def longest_samples(config: AsrLlmConfig) -> int:
    """Return the maximum number of samples at 16 kHz of one audio."""
    seconds = max(LONGEST, config.trained_seconds or 0.0)
    return min(round(seconds * RATE), config.sample_limits()[1])
