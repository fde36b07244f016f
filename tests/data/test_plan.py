import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asrllm.data.config import FilterConfig, SamplerConfig
from asrllm.data.corpora import make_corpus
from asrllm.data.index import ROW, Index
from asrllm.data.plan import SPARES, Plan, Position, planned_steps
from asrllm.defaults import RATE
from asrllm.errors import UserError
from asrllm.schema import build

FILTERS = FilterConfig(min_duration=1.0, max_duration=30.0, max_chars_per_second=30.0)


def corpus(lengths, name="c", *, per_shard=7, text=30, filters=None, **more):
    """Make a corpus that has an index but no shards. Lengths are in samples."""
    rows = np.zeros(len(lengths), ROW)
    rows["samples"] = lengths
    rows["text_bytes"] = text
    rows["text_chars"] = text
    rows["shard"] = np.arange(len(rows)) // per_shard
    starts = np.append(np.arange(0, len(rows), per_shard), len(rows))
    shards = [f"{name}-{i}.tar" for i in range(len(starts) - 1)]
    index = Index(rows=rows, shards=shards, starts=starts)
    return make_corpus(name, index, filters, **more)


def speech(count, seed=0):
    """Return lengths and numbers of characters as in LibriSpeech.

    Most utterances have 12 to 16 s, with a tail of short ones, and about 14 characters per second.
    """
    rng = np.random.default_rng(seed)
    is_long = rng.random(count) < 0.65
    long = rng.normal(14.2, 1.3, count)
    short = rng.uniform(1.5, 16, count)
    seconds = np.where(is_long, long, short).clip(1.3, 34)
    rate = rng.normal(14.5, 2.5, count).clip(6, 25)
    return (seconds * RATE).astype(int), (seconds * rate).astype(int)


def make_plan(
    corpora,
    *,
    max_tokens=400,
    window=1000,
    seed=1,
    max_utterances=100,
    max_duration=None,
    **more,
):
    config = SamplerConfig(
        max_tokens=max_tokens,
        max_utterances=max_utterances,
        max_duration=max_duration,
        window=window,
    )
    return Plan(corpora, config, audio_tokens=lambda samples: samples // 1280, seed=seed, **more)


def items(step):
    """Return (corpus, row) of everything that a step trains on."""
    found = []
    for rank in range(step.ranks):
        for batch in step.micro_batches(rank):
            found += [(item.corpus, item.row) for item in batch if not item.is_filler]
    return found


def all_items(steps):
    """Return (corpus, row) of everything that several steps train on, sorted."""
    return sorted(itertools.chain.from_iterable(map(items, steps)))


def entries(plan, epoch=0, ranks=1):
    """Return the entries of all batches of an epoch."""
    batches = []
    for window in range(plan.windows):
        batches += plan.batches(epoch, window, ranks)
    return np.concatenate(batches)


lengths = st.lists(st.integers(1600, 480000), min_size=1, max_size=200)


@settings(max_examples=60, deadline=None)
@given(
    lengths,
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(5, 300),
    st.integers(0, 3),
    st.integers(1, 50),
)
def test_an_epoch_has_every_utterance_once_and_equal_batch_counts_per_rank(
    lengths, ranks, accumulation, window, epoch, per_shard
):
    plan = make_plan([corpus(lengths, per_shard=per_shard)], window=window)
    seen = []
    for step in plan.steps(Position(epoch=epoch), ranks=ranks, accumulation=accumulation):
        for rank in range(ranks):
            batches = step.micro_batches(rank)
            assert len(batches) == accumulation
            assert all(batches)
        seen += items(step)
    assert sorted(seen) == [(0, i) for i in range(len(lengths))]
    assert step.next_position == Position(epoch=epoch + 1)


@settings(max_examples=60, deadline=None)
@given(
    lengths,
    st.lists(st.integers(1, 6), min_size=2, max_size=4),
    st.integers(1, 3),
    st.integers(5, 300),
    st.data(),
)
def test_resume_on_other_world_sizes_neither_loses_nor_repeats_utterances(
    lengths, worlds, accumulation, window, data
):
    plan = make_plan([corpus(lengths)], window=window)
    position = Position()
    done = []
    for ranks in worlds:
        if position.epoch > 0:
            break
        rest = list(plan.steps(position, ranks=ranks, accumulation=accumulation))
        stop = len(rest)
        if ranks != worlds[-1]:
            stop = data.draw(st.integers(0, len(rest)))
        done += rest[:stop]
        if stop:
            position = rest[stop - 1].next_position
    if position.epoch == 0:
        done += plan.steps(position, ranks=2)
    assert all_items(done) == [(0, i) for i in range(len(lengths))]


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(lengths, st.integers(1, 4), st.integers(1, 2), st.booleans(), st.data())
def test_resume_from_any_step_gives_the_same_remaining_steps(
    lengths, ranks, accumulation, endless, data
):
    def first_steps(position, count):
        corpora = [corpus(lengths), corpus(lengths[:1])]
        planned = planned_steps(
            make_plan(corpora, window=50, endless=endless),
            position,
            ranks=ranks,
            accumulation=accumulation,
            epochs=2,
        )
        return [step for _, step in itertools.islice(planned, count)]

    def content(steps):
        return [(step.epochs_done, step.next_position, step.micro_batches(0)) for step in steps]

    steps = first_steps(Position(), 60)
    stop = data.draw(st.integers(1, len(steps)))
    rest = first_steps(steps[stop - 1].next_position, len(steps) - stop)
    assert content(rest) == content(steps[stop:])


@settings(max_examples=40, deadline=None)
@given(
    lengths,
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(20, 2000),
    st.sampled_from([None, 9.5, 60.0]),
    st.integers(1, 9),
)
def test_every_batch_stays_within_all_budgets(
    lengths, ranks, accumulation, max_tokens, max_duration, max_utterances
):
    plan = make_plan(
        [corpus(lengths)],
        max_tokens=max_tokens,
        max_duration=max_duration,
        max_utterances=max_utterances,
    )
    for step in plan.steps(Position(), ranks=ranks, accumulation=accumulation):
        for batch in step.batches:
            assert len(batch) <= max_utterances
            if len(batch) < 2:
                continue
            assert batch["tokens"].sum() <= max_tokens
            if max_duration is not None:
                assert batch["samples"].sum() <= max_duration * RATE


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_full_batches_stay_within_the_budget_on_every_rank(ranks):
    """The difference between the batches of a group must fit into the budget too."""
    for seed in range(10):
        lengths = np.random.default_rng(seed).integers(16000, 320000, 300)
        plan = make_plan([corpus(lengths, text=3)], max_tokens=300)
        batches = [batch for batch in plan.batches(0, 0, ranks) if len(batch) > 1]
        assert batches
        for batch in batches:
            assert batch["tokens"].sum(dtype=np.int64) <= 300


def test_an_utterance_above_the_budget_is_a_batch_by_itself():
    plan = make_plan([corpus([160000, 16000, 16000])], max_tokens=50)
    assert sorted(len(b) for b in plan.batches(0, 0, 1)) == [1, 2]


def test_order_depends_on_epoch_and_seed():
    one = corpus(np.random.default_rng(0).integers(1600, 160000, 300))
    orders = [
        entries(make_plan([one], seed=seed), epoch)["row"].tolist()
        for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0))
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != orders[3]


def test_every_epoch_orders_short_and_long_batches_differently():
    """The batches differ more in length than LENGTH_JITTER can change."""
    groups = [round(4800 * 1.2**k) for k in range(20) for _ in range(5)]
    plan = make_plan([corpus(groups)], max_tokens=10**6, max_utterances=5)
    orders = {
        tuple(int(batch["samples"].max()) for batch in plan.batches(epoch, 0, 1))
        for epoch in range(3)
    }
    assert len(orders) == 3


def test_every_pass_reads_the_shards_in_a_different_order():
    plan = make_plan([corpus([16000] * 280, per_shard=7)], window=70)
    read = {frozenset((plan.utterances(epoch, 0)["row"] // 7).tolist()) for epoch in range(3)}
    assert len(read) == 3


def test_without_shuffling_windows_follow_the_row_order():
    plan = make_plan([corpus([16000] * 25)], window=10, shuffle=False)
    found = []
    for window in range(plan.windows):
        batches = plan.batches(0, window, 1)
        found += sorted(np.concatenate(batches)["row"].tolist())
    assert found == list(range(25))


def test_weights_repeat_all_utterances_of_a_corpus_equally_often():
    plan = make_plan([corpus([16000] * 10), corpus([16000] * 20, weight=2.3)], window=13)
    counts = np.zeros(20, int)
    for epoch in range(10):
        found = entries(plan, epoch)
        first = found[found["corpus"] == 0]
        assert np.bincount(first["row"], minlength=10).tolist() == [1] * 10
        second = found[found["corpus"] == 1]
        assert len(second) == 46
        counts += np.bincount(second["row"], minlength=20)
        # a repetition has another pass index, and therefore another prompt
        assert len({(e["row"], e["pass_index"]) for e in second}) == 46
    assert counts.tolist() == [23] * 20


def test_every_window_mixes_corpora_in_proportion_to_their_size():
    plan = make_plan(
        [corpus([16000] * 1000, per_shard=100), corpus([16000] * 30, per_shard=30)], window=103
    )
    for window in range(plan.windows):
        found = plan.utterances(0, window)
        assert np.bincount(found["corpus"]).tolist() == [100, 3]


def test_a_window_reads_few_partial_shards():
    """Only the shards at its ends are partial, which bounds what a cache has to hold."""
    plan = make_plan([corpus([16000] * 3000, per_shard=50)], window=600)
    for window in range(5):
        assert len(np.unique(plan.utterances(0, window)["row"] // 50)) <= 13


@pytest.mark.slow
@pytest.mark.parametrize("stated", [False, True])
def test_endless_mixing_divides_audio_time_by_hours_and_weight(stated):
    """The index has 1:2 hours with weights 1:3; the stated hours are 30:10."""
    hours = {"hours": 30.0} if stated else {}
    other = {"hours": 10.0} if stated else {}
    plan = make_plan(
        [corpus([16000] * 3600, **hours), corpus([80000] * 1440, weight=3.0, **other)],
        window=500,
        endless=True,
    )
    found = np.concatenate([plan.utterances(0, window) for window in range(200)])
    seconds = np.bincount(found["corpus"], weights=found["samples"])
    assert seconds[0] / seconds.sum() == pytest.approx(1 / 2 if stated else 1 / 7, rel=0.01)
    rows = found[found["corpus"] == 1]
    assert np.ptp(np.bincount(rows["row"])) <= 1
    assert plan.windows is None


def test_filters_drop_utterances_and_count_reasons():
    one = corpus([8000, 16000, 31 * 16000, 16000], text=31, filters=FILTERS)
    assert one.dropped == {"too_short": 1, "too_long": 1, "too_fast": 2}  # the first is fast too
    assert one.usable == 0
    two = corpus([8000, 16000, 31 * 16000, 16000], text=30, filters=FILTERS)
    assert (two.usable, two.dropped) == (2, {"too_short": 1, "too_long": 1})
    assert sorted(entries(make_plan([two]))["row"].tolist()) == [1, 3]
    empty = corpus([8000, 16000], text=0, filters=FILTERS)
    assert (empty.usable, empty.dropped) == (0, {"too_short": 1, "empty_text": 1})


def test_a_window_without_kept_utterances_is_skipped():
    lengths = [100] * 10 + [32000] * 10 + [100] * 10
    plan = make_plan([corpus(lengths, filters=FILTERS)], window=5, shuffle=False)
    steps = list(plan.steps(Position(), ranks=1))
    assert all_items(steps) == [(0, row) for row in range(10, 20)]
    assert steps[-1].next_position == Position(epoch=1, window=2)


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_ranks_have_nearly_equal_cost_and_little_padding(ranks):
    """With lengths as in LibriSpeech, imbalance and padding are both below 5 %."""
    samples, text = speech(60_000)
    plan = make_plan([corpus(samples, text=text, per_shard=1000)], max_tokens=4000, window=60_000)
    batches = []
    for step in plan.steps(Position(), ranks=ranks):
        costs = [int(batch["tokens"].sum()) for batch in step.batches]
        assert min(costs) >= 0.95 * max(costs)
        batches += step.batches
    assert padding_ratio(batches) < 0.05


@pytest.mark.parametrize("at", range(17))
def test_a_window_with_fewer_utterances_than_ranks_resumes_on_fewer_ranks(at):
    plan = make_plan([corpus([16000 * (i + 1) for i in range(5)])])
    rest = list(plan.steps(Position(batch=at, ranks=16), ranks=2))
    remaining = plan.batches(0, 0, 16)[at:]
    rows = [int(entry["row"]) for entry in itertools.chain.from_iterable(remaining)]
    assert all_items(rest) == [(0, row) for row in sorted(rows)]
    assert not rest or rest[-1].next_position == Position(epoch=1)


def test_spares_are_other_utterances():
    for ranks, accumulation in ((1, 1), (2, 1), (1, 2)):
        plan = make_plan([corpus([16000] * 40)])
        for step in plan.steps(Position(), ranks=ranks, accumulation=accumulation):
            for batch in step.micro_batches(0):
                for item in batch:
                    assert len(item.spares) == SPARES
                    assert all(spare.row != item.row for spare in item.spares)


def test_a_budget_below_one_is_rejected():
    with pytest.raises(UserError, match=r"data\.sampler\.max_tokens=0"):
        build(SamplerConfig, {"max_tokens": 0}, group="data.sampler.")


# --- copies of one utterance ---


def most_copies(batch):
    """Return how often the most frequent utterance of a batch occurs in it."""
    _, counts = np.unique(batch[["corpus", "row"]], return_counts=True)
    return int(counts.max(initial=0))


def padding_ratio(batches):
    """Return the ratio of padding in batches that are padded to their longest utterance."""
    padded = 0
    for batch in batches:
        if len(batch):
            padded += len(batch) * int(batch["samples"].max())
    speech = sum(int(batch["samples"].sum()) for batch in batches)
    return 1 - speech / padded


def speech_corpus(count, seed, **more):
    samples, text = speech(count, seed)
    return corpus(samples, text=text, per_shard=1000, **more)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(
    lengths,
    st.integers(1, 5),
    st.integers(1, 12),
    st.integers(5, 300),
    st.sampled_from([2, 100]),
    st.booleans(),
    st.booleans(),
)
def test_copies_share_a_batch_only_if_they_outnumber_the_batches(
    lengths, ranks, weight, window, max_utterances, shuffle, endless
):
    corpora = [corpus(lengths, weight=weight), corpus([80_000] * 30)]
    plan = make_plan(
        corpora, window=window, max_utterances=max_utterances, shuffle=shuffle, endless=endless
    )
    for number in range(min(plan.windows or 3, 3)):
        utterances = plan.utterances(0, number)
        batches = plan.batches(0, number, ranks)
        groups = len(
            list(plan._groups(utterances[np.argsort(-utterances["samples"].astype(int))], ranks))
        )
        # the groups above were made without jitter, so their number is approximate
        if most_copies(utterances) <= 0.9 * groups * ranks:
            assert max(map(most_copies, batches)) <= 1
        assert np.array_equal(
            np.sort(np.concatenate(batches), order=["corpus", "pass_index", "row"]),
            np.sort(utterances, order=["corpus", "pass_index", "row"]),
        )
        assert all(len(batch) <= max_utterances for batch in batches)
        assert all(
            batch["tokens"].sum(dtype=np.int64) <= 400 for batch in batches if len(batch) > 1
        )


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_copies_of_a_small_corpus_in_an_endless_mix_never_share_a_batch(ranks):
    """Before copies were spread, one of 385 utterances occurred four times in a batch of 8.

    Copies are in different steps. With many ranks, few are in the same step.
    """
    plan = make_plan(
        [speech_corpus(385, 1, weight=50.0), speech_corpus(20_000, 2)],
        max_tokens=1500,
        window=20_000,
        endless=True,
    )
    for window in range(2):
        assert most_copies(plan.utterances(0, window)) > 25
        batches = plan.batches(0, window, ranks)
        assert max(map(most_copies, batches)) == 1
        in_step = max(
            most_copies(np.concatenate(batches[i : i + ranks]))
            for i in range(0, len(batches), ranks)
        )
        assert in_step <= (1 if ranks < 8 else 2)
        assert padding_ratio(batches) < 0.05


@pytest.mark.slow
def test_copies_of_an_utterance_share_batches_with_different_utterances():
    """Copies at exactly even distances would always share a batch with the same utterances."""
    plan = make_plan([speech_corpus(385, 1)], max_tokens=1500, window=100_000, endless=True)
    met = [{*batch["row"].tolist()} for batch in plan.batches(0, 0, 1)]
    of_one = [rows - {7} for rows in met if 7 in rows]
    assert len(of_one) > 200
    # they come from the utterances of similar length; a batch has 5 others
    assert len(set().union(*of_one)) > 20


def test_more_copies_than_batches_are_spread_evenly():
    # 80 utterances of 135 tokens: 8 batches of 10
    plan = make_plan([corpus([160_000] * 2, weight=40)], max_tokens=1350)
    batches = plan.batches(0, 0, 1)
    assert len(batches) == 8
    assert all(3 <= int((batch["row"] == 0).sum()) <= 7 for batch in batches)


@pytest.mark.parametrize(("ranks", "expected"), [(1, "783d2d212c23dd6b"), (3, "7b29c36fed8987d9")])
def test_without_copies_the_order_matches_recorded_digests(ranks, expected):
    """The digests were recorded before the plan spread copies."""
    samples, text = speech(3000)
    corpora = [
        corpus(samples, text=text, hours=3.0),
        corpus(samples[:1000], text=text[:1000], hours=1.0),
    ]
    plan = make_plan(corpora, window=400, endless=True)
    digest = hashlib.sha256()
    for epoch, window in itertools.product(range(3), range(4)):
        assert most_copies(plan.utterances(epoch, window)) == 1
        for batch in plan.batches(epoch, window, ranks):
            digest.update(batch.tobytes() + b"/")
    assert digest.hexdigest()[:16] == expected
