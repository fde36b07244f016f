"""Batches that do not fit in memory, and engines that pad."""

import numpy as np
import pytest
import torch

from asrllm.data.corpora import make_corpus
from asrllm.data.index import open_index
from asrllm.errors import UserError
from asrllm.evaluation.decode import CorpusOptions, decode_corpus
from asrllm.evaluation.engine import HalvingEngine
from asrllm.evaluation.journal import Journal
from asrllm.models.asr_llm.generation import Answer


class SmallEngine:
    """An engine that runs out of memory with more than `most` utterances."""

    limits = (0, 100)
    padded_to = 0.0
    parallel = 1

    def __init__(self, most, error):
        self.most = most
        self.error = error
        self.batches = []
        self.tried = 0

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
def test_batch_that_does_not_fit_in_memory_is_halved(caplog, error):
    if error is None:
        with pytest.raises(RuntimeError) as raised:
            allocate_everything()
        error = raised.value
    small = SmallEngine(2, error)
    engine = HalvingEngine(small)
    waves = [np.zeros(900, np.float32)] * 7
    prompts = list("abcdefg")
    for _ in range(2):
        assert [a.text for a in engine.answer(waves, prompts)] == [f"{p} 900" for p in "abcdefg"]
    assert small.batches == [1, 2, 2, 2] * 2
    assert "batch of 7 utterances" in caplog.text
    assert small.tried == 2 + 4 + 4, "sizes that failed are not tried again"


def test_utterance_that_does_not_fit_in_memory_is_reported():
    engine = HalvingEngine(SmallEngine(0, torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(UserError, match=r"2\.0 s of audio .*CUDA out of memory"):
        engine.answer([np.zeros(32000, np.float32)], ["a"])


def test_other_errors_are_not_handled():
    engine = HalvingEngine(SmallEngine(0, RuntimeError("shape")))
    with pytest.raises(RuntimeError, match="shape"):
        engine.answer([np.zeros(9, np.float32)] * 4, ["a"] * 4)


def test_padding_of_the_engine_counts_in_batches(world, tmp_path):
    corpus = make_corpus("test", open_index(world.root / "shards" / "test"), None)
    for padded_to, sizes in ((0.0, [9]), (30.0, [8, 1])):
        engine = SmallEngine(100, None)
        engine.padded_to = padded_to
        engine.limits = (1, 1 << 40)
        journal = Journal(tmp_path / str(padded_to), "test", settings=None)
        options = CorpusOptions(prompt="", max_batch_duration=240.0)
        decode_corpus(engine, corpus, options, str, None, journal)
        assert engine.batches == sizes
