"""Batches that are too large for the memory, and engines that pad."""

import numpy as np
import pytest
import torch

from asrllm.data.corpora import make_corpus
from asrllm.data.index import open_index
from asrllm.errors import UserError
from asrllm.evaluation.decode import DecodingOptions, decode_corpus
from asrllm.evaluation.engine import WithinMemory
from asrllm.evaluation.journal import Journal
from asrllm.models.asr_llm.generation import Answer


class Small:
    """An engine whose memory ends with more than `most` utterances."""

    limits, padded_to = (0, 100), 0.0

    def __init__(self, most, error):
        self.most, self.error, self.batches, self.tried = most, error, [], 0

    def answer(self, waves, prompts):
        self.tried += 1
        if len(waves) > self.most:
            raise self.error
        self.batches.append(len(waves))
        return [
            Answer(text=f"{prompt} {len(wave)}")
            for wave, prompt in zip(waves, prompts, strict=True)
        ]


def allocate_everything():
    torch.empty(1 << 50)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), None]
)
def test_a_batch_that_the_memory_cannot_hold_is_decoded_in_halves(caplog, error):
    if error is None:
        with pytest.raises(RuntimeError) as raised:
            allocate_everything()
        error = raised.value
    small = Small(2, error)
    engine, waves, prompts = WithinMemory(small), [np.zeros(900, np.float32)] * 7, list("abcdefg")
    for _ in range(2):
        assert [a.text for a in engine.answer(waves, prompts)] == [f"{p} 900" for p in "abcdefg"]
    assert small.batches == [1, 2, 2, 2] * 2
    assert "batch of 7 utterances" in caplog.text
    assert small.tried == 2 + 4 + 4, "sizes that failed are not tried again"


def test_one_utterance_that_the_memory_cannot_hold_is_one_sentence():
    engine = WithinMemory(Small(0, torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(
        UserError,
        match=r"memory ends while 2\.0 s of audio are decoded: free some \(CUDA out of memory",
    ):
        engine.answer([np.zeros(32000, np.float32)], ["a"])


def test_other_errors_are_not_of_memory():
    with pytest.raises(RuntimeError, match="shape"):
        WithinMemory(Small(0, RuntimeError("shape"))).answer(
            [np.zeros(9, np.float32)] * 4, ["a"] * 4
        )


def test_what_an_engine_pads_counts_in_its_batches(world, tmp_path):
    corpus = make_corpus("test", open_index(world.root / "shards" / "test"), None)
    for padded_to, sizes in ((0.0, [9]), (30.0, [8, 1])):
        engine = Small(100, None)
        engine.padded_to, engine.limits = padded_to, (1, 1 << 40)
        journal = Journal(tmp_path / str(padded_to), "test", of=None)
        decode_corpus(
            engine, corpus, DecodingOptions(prompt="", max_batch_duration=240.0), str, None, journal
        )
        assert engine.batches == sizes
