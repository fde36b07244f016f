import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from asrllm.audio.reader import Reader
from asrllm.collator.batch import Collator, pad_left
from asrllm.collator.chat import ChatRenderer
from asrllm.collator.loader import PlannedDataset, steps
from asrllm.data.config import SamplerConfig
from asrllm.data.corpora import make_corpus, read_corpora
from asrllm.data.plan import Plan, Position
from asrllm.data.prompts import Prompt
from asrllm.errors import UserError
from asrllm.testing import tiny_tokenizer
from tests.conftest import REPOSITORY, clean_environment

AUDIO = "<|AUDIO|>"


@pytest.fixture
def corpora(world):
    return read_corpora(world.root / "train.yaml", filters=None, shards_dir=world.root)


def make(*arguments, **options):
    return list(make_stream(*arguments, **options))


START = Position()


def make_stream(
    corpora, rank=0, ranks=2, num_workers=0, start=START, epochs=1, accumulation=2, **reading
):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AUDIO], special_tokens=True)
    plan = Plan(
        corpora,
        SamplerConfig(max_tokens=60, max_utterances=8, max_duration=None, window=1000),
        audio_tokens=lambda n: n // 1600,
        seed=0,
    )
    prompts = [Prompt(text=text) for text in ("A.", "B.", "C.")]
    collator = Collator(
        ChatRenderer(tokenizer, AUDIO), prompts, num_audio_tokens=lambda n: n // 1600, seed=0
    )
    dataset = PlannedDataset(Reader(corpora, **reading), collator)
    options = {
        "rank": rank,
        "ranks": ranks,
        "accumulation": accumulation,
        "epochs": epochs,
        "num_workers": num_workers,
    }
    return steps(plan, dataset, start, **options)


def keys_of(loaded):
    return [key for step in loaded for batch in step.micro_batches for key in batch.keys]


def damaged(corpus, *rows):
    """Return the corpus with wrong offsets in some rows."""
    table = np.array(corpus.index.rows)
    table["offset"][list(rows)] += 1
    return replace(corpus, index=replace(corpus.index, rows=table))


def only(corpus, count):
    """Return the corpus with only its first rows."""
    return make_corpus(
        corpus.name,
        replace(corpus.index, rows=corpus.index.rows[:count], starts=np.array([0, count])),
        None,
    )


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert (x.next_position, x.epoch) == (y.next_position, y.epoch)
        assert x.epochs_done == y.epochs_done
        for m, n in zip(x.micro_batches, y.micro_batches, strict=True):
            assert (m.keys, m.prompts) == (n.keys, n.prompts)
            assert torch.equal(m.input_ids, n.input_ids)
            assert torch.equal(m.waves, n.waves)


@pytest.mark.parametrize(("workers", "accumulation"), [(2, 2), (1, 9), (2, 1)])
def test_batches_do_not_depend_on_the_number_of_workers(corpora, workers, accumulation):
    here = make(corpora, accumulation=accumulation)
    for given, step in zip(
        make_stream(corpora, num_workers=workers, accumulation=accumulation), here, strict=True
    ):
        assert_same([given], [step])  # before the next step overwrites the waveforms


def test_batch_larger_than_its_slot_and_errors_of_workers_are_received(corpora, monkeypatch):
    monkeypatch.setattr(Plan, "largest_batch", lambda plan, ranks: 500)
    for given, step in zip(make_stream(corpora, num_workers=1), make(corpora), strict=True):
        assert_same([given], [step])
    with pytest.raises(UserError, match=r"\d+ .*train .*/shard-000000\.tar: "):
        list(make_stream([damaged(only(corpora[0], 20), *range(20))], num_workers=1))
    assert not multiprocessing.active_children(), "a reader outlives the error"


@pytest.mark.slow
def test_resuming_yields_the_remaining_steps(corpora):
    whole = make(corpora, epochs=2)
    for stop in (1, len(whole) // 2, len(whole) - 1):
        assert_same(make(corpora, start=whole[stop - 1].next_position, epochs=2), whole[stop:])


def test_ctrl_c_during_the_fork_of_workers_is_raised_after_it(corpora):
    forks = []

    def interrupt():
        if not forks:
            forks.append(os.getpid())
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    os.register_at_fork(before=interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            next(make_stream(corpora, num_workers=2))
    finally:
        signal.signal(signal.SIGINT, before)
    assert forks == [os.getpid()]
    assert not multiprocessing.active_children()


def test_all_ranks_together_read_each_utterance_once(corpora):
    keys = [key for rank in range(3) for key in keys_of(make(corpora, rank=rank, ranks=3))]
    assert sorted(keys) == [f"utt{i:04d}" for i in range(60)]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_on_another_world_size_reads_the_rest_of_the_epoch_once(corpora, workers):
    """Three ranks stop after two steps, and two ranks resume."""
    first = [make(corpora, rank=rank, ranks=3, num_workers=workers)[:2] for rank in range(3)]
    position = first[0][-1].next_position
    rest = [
        make(corpora, rank=rank, ranks=2, num_workers=workers, start=position) for rank in range(2)
    ]
    assert sorted(key for rank in first + rest for key in keys_of(rank)) == [
        f"utt{i:04d}" for i in range(60)
    ]
    assert all(rank[-1].next_position == Position(epoch=1) for rank in rest)


def test_batch_is_one_row_without_padding(corpora):
    for batch in (b for step in make(corpora) for b in step.micro_batches):
        bounds = batch.cu_seqlens.tolist()
        assert bounds[0] == 0
        assert bounds[-1] == batch.input_ids.shape[1] == batch.position_ids.shape[1]
        for start, end in itertools.pairwise(bounds):
            assert batch.position_ids[0, start:end].tolist() == list(range(end - start))
        assert torch.equal(batch.input_ids[0, batch.target_positions + 1], batch.targets)


def test_filler_has_no_targets_and_no_key(corpora):
    (first,), (second,) = (make([only(corpora[0], 1)], rank=rank) for rank in range(2))
    batches = first.micro_batches + second.micro_batches
    assert [len(b.keys) for b in batches] == [1, 0, 0, 0]
    assert [len(b.targets) > 0 for b in batches] == [True, False, False, False]


@pytest.mark.parametrize(("ranks", "accumulation"), [(2, 2), (1, 1)])
def test_unreadable_utterance_is_reported_and_replaced_by_a_spare(corpora, ranks, accumulation):
    options = {"ranks": ranks, "accumulation": accumulation}
    whole, broken = (
        [
            b
            for rank in range(ranks)
            for step in make([corpus], rank=rank, **options)
            for b in step.micro_batches
        ]
        for corpus in (corpora[0], damaged(corpora[0], 7))
    )
    assert [len(b.keys) for b in broken] == [len(b.keys) for b in whole]  # no batch is smaller
    keys = [key for b in broken for key in b.keys]
    assert "utt0007" not in keys
    assert len(set(keys)) == 59
    (message,) = [m for b in broken for m in b.bad]
    assert "utterance 7 of train" in message


def test_run_stops_at_a_batch_without_a_readable_utterance(
    corpora,
):
    few = only(corpora[0], 20)
    options = {"ranks": 1, "accumulation": 1}
    keys = keys_of(make([damaged(few, *range(12))], **options))
    assert set(keys) <= {f"utt{i:04d}" for i in range(12, 20)}
    assert len(keys) < 20
    with pytest.raises(UserError, match=r"\d+ .*train .*/shard-000000\.tar: "):
        make([damaged(few, *range(20))], **options)


def test_prompt_is_the_samples_else_its_corpus_else_drawn(corpora):
    drawn = [prompt for step in make(corpora) for b in step.micro_batches for prompt in b.prompts]
    assert set(drawn) == {"A.", "B.", "C."}
    own = [replace(corpora[0], prompts=(Prompt(text="Of the corpus."),))]
    assert {prompt for step in make(own) for b in step.micro_batches for prompt in b.prompts} == {
        "Of the corpus."
    }


def test_transcript_is_normalized(corpora):
    first, other = (
        make(corpora, normalize=normalize)[0].micro_batches[0] for normalize in (str, str.upper)
    )
    assert first.keys == other.keys
    assert not torch.equal(first.input_ids, other.input_ids)


def test_padding_for_decoding_is_on_the_left():
    ids, mask = pad_left([[1, 2, 3], [4]])
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.slow
def test_process_that_exits_in_the_middle_of_the_data_does_not_wait_for_its_workers(world):
    """Workers ignore SIGTERM, and the stream is alive when the interpreter exits."""
    code = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from tests.collator.test_loader import make_stream
from asrllm.data.corpora import read_corpora
from pathlib import Path
root = Path({str(world.root)!r})
corpora = read_corpora(root / "train.yaml", filters=None, shards_dir=root)
stream = make_stream(corpora, num_workers=2)
next(stream)
print("read")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=clean_environment(),
        cwd=REPOSITORY,
    )
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr[-2000:]
