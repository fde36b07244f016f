"""Batches that do not fit in memory, and engines that pad."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from asrllm.data.corpora import make_corpus
from asrllm.data.index import open_index
from asrllm.errors import UserError
from asrllm.evaluation.decode import CorpusOptions, decode_corpus
from asrllm.evaluation.engine import HalvingEngine
from asrllm.evaluation.journal import Journal
from asrllm.evaluation.references import check_unreadable
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
        options = CorpusOptions(prompt="", max_batch_duration=240.0, max_bad_share=0)
        decode_corpus(engine, corpus, options, str, None, journal)
        assert engine.batches == sizes


def test_utterances_that_cannot_be_read_are_counted_up_to_a_limit(world, tmp_path, capsys):
    corpus = make_corpus("test", open_index(world.root / "shards" / "test"), None)
    lengths = sorted(corpus.index.rows["samples"].tolist())
    assert lengths[-3] < lengths[-2]

    def decode(longest, share, batch_seconds=240.0):
        engine = SmallEngine(100, None)
        engine.limits = (1, longest)
        options = CorpusOptions(prompt="", max_batch_duration=batch_seconds, max_bad_share=share)
        name = f"{longest} {share} {batch_seconds}"
        return decode_corpus(
            engine, corpus, options, str, None, Journal(tmp_path / name, "test", 0)
        )

    for batch_seconds in (240.0, 0.1):  # in one batch, and each alone
        decoded = decode(lengths[-2], 0.01, batch_seconds)
        assert (len(decoded.transcripts), decoded.unreadable) == (8, 1)
        assert capsys.readouterr().err.count("unreadable: ") == 1
    assert decode(lengths[-3], 0.25).unreadable == 2
    for longest, share in ((lengths[-2], 0), (lengths[-3], 0.01), (1, 1)):
        with pytest.raises(UserError, match="of 9 "):
            decode(longest, share)


def test_test_set_of_which_nothing_can_be_read_is_rejected_for_that_reason():
    corpus = SimpleNamespace(name="test", index=range(2))
    with pytest.raises(UserError) as error:
        check_unreadable(corpus, ["x cannot be read. Copy it.", "y"], max_share=1)
    assert "max_bad_share" not in str(error.value)
    assert ".." not in str(error.value)
