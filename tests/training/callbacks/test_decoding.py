"""Decoding during training: the utterances, their batches, and no effect on the losses."""

import json
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from asrllm import distributed
from asrllm.audio.reader import Reader
from asrllm.data.corpora import read_corpora
from asrllm.data.text import word_errors
from asrllm.training.callbacks import validation
from asrllm.training.callbacks.decoding import (
    Decoder,
    ValidationInterrupted,
    ValidationSample,
    word_error_rate,
)
from asrllm.training.callbacks.validation import Validation
from asrllm.training.subset import BATCH_SIZE, PADDING_KEY, DecodingSubset
from asrllm.training.trainer import StepSums
from asrllm.watchdog import Watchdog
from tests.conftest import assert_done, run_script
from tests.test_end_to_end import losses, metrics


class Prompts:
    """Stands in for a collator."""

    prompts = (type("Prompt", (), {"text": "first"}),)

    def prompt(self, sample):
        return f"prompt of {sample.key}"


@pytest.fixture
def corpus(world):
    (corpus,) = read_corpora(
        str(world.root / "train.yaml"), filters=None, shards_dir=world.root / "made"
    )
    return corpus


def test_all_ranks_have_equal_batches_and_every_utterance_is_decoded_once(corpus):
    for ranks in (1, 2, 3, 7):
        subset = DecodingSubset(corpus, Reader([corpus]), Prompts(), count=32)
        by_rank = [list(subset.batches(rank, ranks)) for rank in range(ranks)]
        sizes = [list(map(len, batches)) for batches in by_rank]
        assert all(rank_sizes == sizes[0] for rank_sizes in sizes)
        assert max(sizes[0]) <= BATCH_SIZE
        pairs = []
        for batches in by_rank:
            for batch in batches:
                pairs += batch
        keys = [sample.key for sample, _ in pairs if sample.key != PADDING_KEY]
        assert len(keys) == len(set(keys)) == 32
        for sample, prompt in pairs:
            assert prompt == (f"prompt of {sample.key}" if sample.key else "first")
        lengths = [len(sample.wave) for sample, _ in pairs[: len(keys) // ranks]]
        assert lengths == sorted(lengths, reverse=True)


def test_small_set_is_decoded_whole_and_silence_replaces_unreadable_utterances(corpus, capsys):
    reader = Reader([corpus], limits=(int(0.5 * 16000), 1 << 40))
    subset = DecodingSubset(corpus, reader, Prompts(), count=1000)
    samples = []
    for batch in subset.batches(0, 1):
        samples += [sample for sample, _ in batch]
    read = [sample for sample in samples if sample.key != PADDING_KEY]
    unreadable = capsys.readouterr().err.count("unreadable: utt")
    assert len(samples) == 60
    assert 0 < unreadable == 60 - len(read) < 60
    assert not any(sample.wave.any() for sample in samples if sample.key == PADDING_KEY)


def test_word_error_rate_is_over_the_words_of_all_references():
    assert word_errors("a b c", "a x c d") == 2
    texts = [("a b c", "a x c d"), ("a", "a"), ("", "b")]
    decoded = []
    for reference, hypothesis in texts:
        errors = word_errors(reference, hypothesis)
        decoded.append(
            ValidationSample(
                key="k", corpus="c", reference=reference, hypothesis=hypothesis, errors=errors
            )
        )
    assert word_error_rate(decoded) == pytest.approx(100 * 3 / 4)
    assert word_error_rate([]) is None


def test_interrupted_validation_stops_and_records_nothing(corpus):
    modes = []
    written = []
    engine = SimpleNamespace(
        module=None, eval=lambda: modes.append("eval"), train=lambda: modes.append("train")
    )
    trainer = SimpleNamespace(
        step=3,
        engine=engine,
        watchdog=Watchdog(),
        device=torch.device("cpu"),
        sync_preemption=lambda: True,
    )
    subset = DecodingSubset(corpus, Reader([corpus]), Prompts(), count=2)
    decoder = Decoder({"set": subset}, str)
    metrics = SimpleNamespace(
        write=written.append, write_samples=lambda *_: written.append("samples")
    )
    with pytest.raises(ValidationInterrupted):
        decoder.decode(trainer, "set")
    sets = {"set": lambda: iter([SimpleNamespace(keys=[])])}
    Validation(sets, metrics, every=1, decoder=decoder).run(trainer)
    assert modes == ["eval", "train"]
    assert written == []


@pytest.mark.parametrize("rank", [0, 1])
def test_validation_and_decoding_report_progress_on_the_first_rank(
    corpus, monkeypatch, capsys, rank
):
    monkeypatch.setattr("asrllm.progress.FIRST_LINE", 0.0)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda values: values)
    monkeypatch.setattr(validation, "MODEL_INPUTS", ())
    monkeypatch.setattr(validation, "count", lambda *_: StepSums(targets=1))
    monkeypatch.setattr(Decoder, "_transcribe", lambda _, __, batch: ["text"] * len(batch))
    output = SimpleNamespace(loss=torch.tensor(1.0), correct=torch.tensor(1.0))
    engine = Mock(return_value=output)
    trainer = Mock(engine=engine, step=3, device=torch.device("cpu"))
    trainer.sync_preemption.return_value = False
    subset = DecodingSubset(corpus, Reader([corpus]), Prompts(), count=20)
    callback = Validation(
        {"dev": lambda: iter([Mock(), Mock()])},
        Mock(),
        every=1,
        sizes={"dev": 2},
        decoder=Decoder({"dev": subset}, str),
    )
    callback.run(trainer)
    reported = [line.partition(" [")[0] for line in capsys.readouterr().err.splitlines()]
    if rank == 0:
        assert {line.rpartition(" ")[2] for line in reported} >= {"1/2", "2/2", "3/3"}
    else:
        assert reported == []


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.longest(40, reason="trains twice, with ZeRO-3 on two ranks")
@pytest.mark.parametrize(("launcher", "stage"), [("python", 0), ("ranks", 3)])
def test_decoding_does_not_change_the_losses(world, tmp_path, launcher, stage):
    """The losses are equal bit for bit. On two ranks one has fewer of the 7 utterances."""
    runs = {}
    for count in (0, 32):
        settings = {
            "trainer__deepspeed_config": f"ds_configs/zero{stage}.json",
            "trainer__num_steps": 4,
            "trainer__valid_every": 2,
            "trainer__valid_decode": count,
            "model__llm__lora__lora_dropout": 0.1,
            "trainer__sinks": "[wandb,tensorboard]",
        }
        if launcher == "python" and count:  # the service takes several seconds to start
            settings["trainer__wandb__mode"] = "offline"
        runs[count] = tmp_path / str(count)
        overrides = world.overrides(runs[count], **settings)
        assert_done(run_script("train", *overrides, launcher=launcher))
    assert losses(runs[32]) == losses(runs[0])
    assert len(losses(runs[0])) == 4
    rates = [
        record["valid/valid/wer"] for record in metrics(runs[32]) if "valid/valid/wer" in record
    ]
    samples = [json.loads(line) for line in (runs[32] / "samples.jsonl").read_text().splitlines()]
    assert [sum(s["step"] == step for s in samples) for step in (2, 4)] == [7, 7]
    last = [s for s in samples if s["step"] == 4]
    assert sorted(s["key"] for s in last) == [f"utt{i:04d}" for i in range(7)]
    errors = sum(s["errors"] for s in last)
    words = sum(len(s["reference"].split()) for s in last)
    assert rates[-1] == pytest.approx(100 * errors / words)
    assert not (runs[0] / "samples.jsonl").exists()
    assert not any("valid/valid/wer" in record for record in metrics(runs[0]))
