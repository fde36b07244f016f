import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from asrllm.audio.reader import Reader
from asrllm.collator.batch import Collator, pad_left
from asrllm.collator.chat import ChatRenderer
from asrllm.collator.loader import PlannedDataset, steps
from asrllm.data.config import SamplerConfig
from asrllm.data.corpora import read_corpora
from asrllm.data.plan import Plan, Position
from asrllm.errors import UserError
from asrllm.testing import tiny_tokenizer

AUDIO = "<|AUDIO|>"


@pytest.fixture
def corpora(world):
    return read_corpora(world.root / "train.yaml", filters=None, cache=world.root)


def make(corpora, rank=0, ranks=2, num_workers=0, start=Position(), epochs=1):  # noqa: B008 (frozen)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AUDIO], special_tokens=True)
    plan = Plan(
        corpora,
        SamplerConfig(max_tokens=60, max_utterances=8, max_duration=None, window=1000),
        audio_tokens=lambda n: n // 1600,
        seed=0,
    )
    collator = Collator(ChatRenderer(tokenizer, AUDIO), ["A.", "B.", "C."], num_audio_tokens=lambda n: n // 1600, seed=0)
    dataset = PlannedDataset(Reader(corpora), collator)
    return list(steps(plan, dataset, start, rank=rank, ranks=ranks, accumulation=2, epochs=epochs, num_workers=num_workers))


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert (x.position, x.epoch) == (y.position, y.epoch)
        for m, n in zip(x.micro_batches, y.micro_batches, strict=True):
            assert m.keys == n.keys
            assert torch.equal(m.input_ids, n.input_ids)
            assert torch.equal(m.waves, n.waves)


def test_what_is_read_does_not_depend_on_the_workers(corpora):
    assert_same(make(corpora, num_workers=0), make(corpora, num_workers=2))


def test_going_on_gives_the_rest(corpora):
    whole = make(corpora, epochs=2)
    for stop in (1, len(whole) // 2, len(whole) - 1):
        assert_same(make(corpora, start=whole[stop - 1].position, epochs=2), whole[stop:])


def test_ranks_together_read_everything_once(corpora):
    keys = [key for rank in range(3) for step in make(corpora, rank=rank, ranks=3) for b in step.micro_batches for key in b.keys]
    assert sorted(keys) == [f"utt{i:04d}" for i in range(60)]


def test_a_batch_is_one_row_of_true_tokens(corpora):
    for batch in (b for step in make(corpora) for b in step.micro_batches):
        bounds = batch.cu_seqlens.tolist()
        assert bounds[0] == 0
        assert bounds[-1] == batch.input_ids.shape[1] == batch.position_ids.shape[1]
        for start, end in itertools.pairwise(bounds):
            assert batch.position_ids[0, start:end].tolist() == list(range(end - start))
        assert torch.equal(batch.input_ids[0, batch.target_positions + 1], batch.targets)


def test_a_filler_has_no_targets_and_no_key(corpora):
    small = [replace(corpora[0], rows=corpora[0].rows[:1])]
    (first,), (second,) = (make(small, rank=rank) for rank in range(2))
    batches = first.micro_batches + second.micro_batches
    assert [len(b.keys) for b in batches] == [1, 0, 0, 0]
    assert [len(b.targets) > 0 for b in batches] == [True, False, False, False]


def test_an_unreadable_utterance_is_named_and_the_batch_goes_on(corpora):
    rows = np.array(corpora[0].index.rows)
    rows["offset"][7] += 300
    broken = [replace(corpora[0], index=replace(corpora[0].index, rows=rows))]
    batches = [b for rank in range(2) for step in make(broken, rank=rank) for b in step.micro_batches]
    assert sum(len(b.keys) for b in batches) == 59
    (message,) = [m for b in batches for m in b.bad]
    assert "utterance 7 of train" in message


def test_a_batch_of_unreadable_utterances_gets_a_spare(corpora):
    rows = np.array(corpora[0].index.rows)
    rows["offset"][0] += 300
    broken = replace(corpora[0], index=replace(corpora[0].index, rows=rows), rows=np.arange(3))
    only = replace(broken, rows=np.array([0, 1, 2]))
    batches = [b for rank in range(2) for step in make([only], rank=rank, ranks=2) for b in step.micro_batches]
    assert sorted(key for b in batches for key in b.keys) == ["utt0001", "utt0002"]
    assert all(len(b.waves) for b in batches)
    with pytest.raises(UserError, match="in a row cannot be read"):
        make([replace(broken, rows=np.array([0]))])


def test_padding_for_decoding_stands_left():
    ids, mask = pad_left([[1, 2, 3], [4]])
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
