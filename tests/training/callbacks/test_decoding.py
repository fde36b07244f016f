"""Which utterances are decoded, in which batches, and what it does to training: nothing."""

import json
from types import SimpleNamespace

import pytest
import torch

from asrllm.audio.reader import Reader
from asrllm.data.corpora import read_corpora
from asrllm.data.text import word_errors
from asrllm.training.callbacks.decoding import (
    AskedToEnd,
    Decoder,
    ValidationSample,
    word_error_rate,
)
from asrllm.training.callbacks.validation import Validation
from asrllm.training.subset import SILENCE, TOGETHER, Subset
from asrllm.training.watchdog import Watchdog
from tests.conftest import assert_done, run_script
from tests.test_end_to_end import losses, metrics


class Prompts:
    """In a collator's place."""

    prompts = (type("Prompt", (), {"text": "first"}),)

    def prompt(self, sample):
        return f"prompt of {sample.key}"


@pytest.fixture
def corpus(world):
    (corpus,) = read_corpora(str(world.root / "train.yaml"), filters=None, made=world.root / "made")
    return corpus


def test_every_rank_has_as_many_batches_and_every_utterance_is_decoded_once(corpus):
    for ranks in (1, 2, 3, 7):
        subset = Subset(corpus, Reader([corpus]), Prompts(), count=32)
        of_ranks = [list(subset.batches(rank, ranks)) for rank in range(ranks)]
        sizes = [[len(batch) for batch in batches] for batches in of_ranks]
        assert all(each == sizes[0] for each in sizes)
        assert max(sizes[0]) <= TOGETHER
        pairs = [pair for batches in of_ranks for batch in batches for pair in batch]
        keys = [sample.key for sample, _ in pairs if sample.key != SILENCE]
        assert len(keys) == len(set(keys)) == 32
        assert all(prompt == (f"prompt of {s.key}" if s.key else "first") for s, prompt in pairs)
        lengths = [len(sample.wave) for sample, _ in pairs[: len(keys) // ranks]]
        assert lengths == sorted(lengths, reverse=True)


def test_a_set_of_fewer_is_decoded_whole_and_silence_stands_in_for_what_cannot_be_read(
    corpus, capsys
):
    subset = Subset(
        corpus, Reader([corpus], limits=(int(0.5 * 16000), 1 << 40)), Prompts(), count=1000
    )
    samples = [sample for batch in subset.batches(0, 1) for sample, _ in batch]
    read = [sample for sample in samples if sample.key != SILENCE]
    unreadable = capsys.readouterr().err.count("unreadable: utt")
    assert len(samples) == 60
    assert 0 < unreadable == 60 - len(read) < 60
    assert all(not sample.wave.any() for sample in samples if sample.key == SILENCE)


def test_errors_are_counted_over_all_words():
    assert word_errors("a b c", "a x c d") == 2
    texts = [("a b c", "a x c d"), ("a", "a"), ("", "b")]
    decoded = [
        ValidationSample(key="k", corpus="c", reference=r, hypothesis=h, errors=word_errors(r, h))
        for r, h in texts
    ]
    assert word_error_rate(decoded) == pytest.approx(100 * 3 / 4)
    assert word_error_rate([]) is None


def test_a_run_that_is_asked_to_end_breaks_decoding_off_and_records_nothing(corpus):
    modes, written = [], []
    engine = SimpleNamespace(
        module=None, eval=lambda: modes.append("eval"), train=lambda: modes.append("train")
    )
    trainer = SimpleNamespace(
        step=3,
        engine=engine,
        watchdog=Watchdog(),
        device=torch.device("cpu"),
        agree_to_end=lambda: True,
    )
    decoder = Decoder({"set": Subset(corpus, Reader([corpus]), Prompts(), count=2)}, str)
    metrics = SimpleNamespace(
        write=written.append, write_samples=lambda *_: written.append("samples")
    )
    with pytest.raises(AskedToEnd):
        decoder.decode(trainer, "set")
    Validation(
        {"set": lambda: iter([SimpleNamespace(keys=[])])}, metrics, every=1, decoder=decoder
    ).run(trainer)
    assert (modes, written) == (["eval", "train"], [])


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("launcher", "stage"), [("python", 0), ("ranks", 3)])
def test_decoding_leaves_the_losses_as_they_are(world, tmp_path, launcher, stage):
    """Bit for bit; 7 utterances on two ranks: one of them has fewer."""
    runs = {}
    for count in (0, 32):
        settings = {
            "trainer__deepspeed_config": f"ds_configs/zero{stage}.json",
            "trainer__valid_every": 3,
            "trainer__valid_decode": count,
        }
        settings |= {
            "model__llm__lora__lora_dropout": 0.1,
            "trainer__wandb__mode": "offline",
            "trainer__tensorboard": "true",
        }
        runs[count] = tmp_path / str(count)
        assert_done(
            run_script("train", *world.overrides(runs[count], **settings), launcher=launcher)
        )
    assert losses(runs[32]) == losses(runs[0])
    assert len(losses(runs[0])) == 8
    rates = [
        record["valid/valid/wer"] for record in metrics(runs[32]) if "valid/valid/wer" in record
    ]
    samples = [json.loads(line) for line in (runs[32] / "samples.jsonl").read_text().splitlines()]
    assert [sum(s["step"] == step for s in samples) for step in (3, 6, 8)] == [7, 7, 7]
    last = [s for s in samples if s["step"] == 8]
    assert sorted(s["key"] for s in last) == [f"utt{i:04d}" for i in range(7)]
    assert rates[-1] == pytest.approx(
        100 * sum(s["errors"] for s in last) / sum(len(s["reference"].split()) for s in last)
    )
    assert not (runs[0] / "samples.jsonl").exists()
    assert not any("valid/valid/wer" in record for record in metrics(runs[0]))
