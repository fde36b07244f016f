"""Batches that are too large for the memory."""

import numpy as np
import pytest
import torch

from asrllm.errors import UserError
from asrllm.evaluation.engine import answer_within_memory
from asrllm.models.generation import Answer


class Small:
    """An engine whose memory ends with more than `most` utterances."""

    limits = (0, 100)

    def __init__(self, most):
        self.most, self.batches = most, []

    def answer(self, waves, prompts):
        if len(waves) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.batches.append(len(waves))
        return [Answer(text=f"{prompt} {len(wave)}") for wave, prompt in zip(waves, prompts, strict=True)]


def test_a_batch_that_the_memory_cannot_hold_is_decoded_in_halves(caplog):
    engine = Small(2)
    waves, prompts = [np.zeros(n, np.float32) for n in range(7)], list("abcdefg")
    assert [a.text for a in answer_within_memory(engine, waves, prompts)] == [f"{p} {n}" for n, p in enumerate("abcdefg")]
    assert engine.batches == [1, 2, 2, 2]
    assert "batch of 7 utterances" in caplog.text


def test_one_utterance_that_the_memory_cannot_hold_is_one_sentence():
    with pytest.raises(UserError, match=r"memory ends while 2\.0 s of audio are decoded: free some \(CUDA out of memory"):
        answer_within_memory(Small(0), [np.zeros(32000, np.float32)], ["a"])
