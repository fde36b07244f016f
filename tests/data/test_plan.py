import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asrllm.data.config import SamplerConfig
from asrllm.data.corpora import Corpus
from asrllm.data.index import ROW, Index
from asrllm.data.plan import Plan, Position
from asrllm.errors import UserError


def make_corpus(lengths, name="c", weight=1.0):
    rows = np.zeros(len(lengths), ROW)
    rows["samples"], rows["text_bytes"] = lengths, 30
    return Corpus(name=name, index=Index(rows=rows, shards=[]), rows=np.arange(len(lengths)), weight=weight)


def make_plan(corpora, *, max_tokens=400, window=1000, seed=1, max_utterances=100, max_duration=None):
    config = SamplerConfig(max_tokens=max_tokens, max_utterances=max_utterances, max_duration=max_duration, window=window)
    return Plan(corpora, config, audio_tokens=lambda samples: samples // 1600, seed=seed)


def items_of(dealt):
    return [(i.corpus, i.row) for rank in dealt for batch in rank for i in batch if not i.filler]


lengths = st.lists(st.integers(1600, 480000), min_size=1, max_size=200)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 9), st.integers(1, 3), st.integers(5, 300), st.integers(0, 3))
def test_an_epoch_deals_out_every_utterance_once_and_every_rank_the_same_number_of_batches(lengths, ranks, accumulation, window, epoch):
    plan = make_plan([make_corpus(lengths)], window=window)
    seen, steps = [], 0
    for dealt, _ in plan.steps(Position(epoch=epoch), ranks=ranks, accumulation=accumulation):
        assert [len(batches) for batches in dealt] == [accumulation] * ranks
        assert all(batch for batches in dealt for batch in batches)
        seen += items_of(dealt)
        steps += 1
    assert sorted(seen) == [(0, i) for i in range(len(lengths))]
    assert steps == plan.count_steps(epoch, ranks=ranks, accumulation=accumulation)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 6), st.integers(1, 6), st.integers(5, 300), st.data())
def test_another_world_size_goes_on_without_loss_or_repetition(lengths, before, after, window, data):
    plan = make_plan([make_corpus(lengths)], window=window)
    steps = list(plan.steps(Position(), ranks=before))
    stop = data.draw(st.integers(0, len(steps)))
    seen = [item for dealt, _ in steps[:stop] for item in items_of(dealt)]
    position = steps[stop - 1][1] if stop else Position()
    if position.epoch == 0:
        seen += [item for dealt, _ in plan.steps(position, ranks=after) for item in items_of(dealt)]
    assert sorted(seen) == [(0, i) for i in range(len(lengths))]


@settings(max_examples=30, deadline=None)
@given(lengths, st.integers(1, 4), st.data())
def test_going_on_from_any_step_gives_the_same_rest(lengths, ranks, data):
    plan, again = (make_plan([make_corpus(lengths)], window=50) for _ in range(2))
    steps = list(plan.steps(Position(), ranks=ranks))
    stop = data.draw(st.integers(1, len(steps)))
    position = steps[stop - 1][1]
    rest = list(again.steps(position, ranks=ranks)) if position.epoch == 0 else []
    assert rest == steps[stop:]


def test_batches_keep_to_every_budget():
    lengths = np.random.default_rng(0).integers(1600, 160000, 500)
    plan = make_plan([make_corpus(lengths)], max_tokens=300, max_utterances=7, max_duration=20.0)
    batches = plan.batches(0, 0)
    assert max(plan.tokens[b].sum() for b in batches) <= 300
    assert max(len(b) for b in batches) <= 7
    assert max(plan.seconds[b].sum() for b in batches) <= 20.0
    assert len({len(b) for b in batches}) > 1


def test_an_utterance_above_the_budget_is_a_batch_of_its_own():
    plan = make_plan([make_corpus([160000, 16000, 16000])], max_tokens=50)
    assert sorted(len(b) for b in plan.batches(0, 0)) == [1, 2]


def test_epochs_differ_and_the_seed_decides():
    corpus = make_corpus(np.random.default_rng(0).integers(1600, 160000, 300))
    orders = [[b.tolist() for b in make_plan([corpus], seed=seed).batches(epoch, 0)] for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0))]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != orders[3]


def test_weights_repeat_a_corpus():
    plan = make_plan([make_corpus([16000] * 10), make_corpus([16000] * 20, weight=2.3)])
    counts = np.bincount(np.concatenate(plan.batches(0, 0)), minlength=30)
    assert (counts[:10] == 1).all()
    assert counts[10:].sum() == 46
    assert set(counts[10:]) == {2, 3}


def test_batches_have_little_padding():
    lengths = np.random.default_rng(0).gamma(4, 3, 20000).clip(1, 30) * 16000
    plan = make_plan([make_corpus(lengths.astype(int))], max_tokens=4000, window=20000)
    batches = plan.batches(0, 0)
    read = sum(len(b) * plan.seconds[b].max() for b in batches)
    assert 1 - plan.seconds.sum() / read < 0.05


def test_a_budget_below_one_is_refused():
    with pytest.raises(UserError, match=r"data\.sampler\.max_tokens=0"):
        SamplerConfig(max_tokens=0, max_utterances=1, max_duration=None, window=1)
