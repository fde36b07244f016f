"""Randomness of a step, the end of a run, and the warning about a long warm-up."""

import dataclasses
import json
import logging

import pytest
import torch

from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.schema import build
from asrllm.training.prepare import warn_of_long_warmup, warn_of_projector_width
from asrllm.training.run_config import TrainerConfig
from asrllm.training.trainer import seed_step
from tests.composing import compose_config
from tests.processes import assert_done, run_script


def drawn(*, seed=1, step=2, rank=0):
    seed_step(seed, step, rank)
    return torch.rand(4)


def test_repeated_step_draws_the_same_numbers():
    assert torch.equal(drawn(), drawn())


@pytest.mark.parametrize("changed", [{"seed": 2}, {"step": 3}, {"rank": 1}])
def test_other_seed_step_or_rank_draws_other_numbers(changed):
    assert not torch.equal(drawn(), drawn(**changed))


def trainer(*overrides):
    return build(TrainerConfig, compose_config("train", list(overrides))["trainer"])


@pytest.mark.parametrize(
    ("overrides", "epochs"),
    [
        ([], 1),
        (["trainer.num_steps=100"], None),
        (["trainer.num_epochs=3"], 3),
        (["trainer.num_epochs=3", "trainer.num_steps=100"], 3),
        (["trainer.num_epochs=null", "trainer.num_steps=100"], None),
    ],
)
def test_epochs_are_unlimited_only_with_num_steps(overrides, epochs):
    assert trainer(*overrides).last_epoch == epochs


@pytest.mark.slow
def test_run_with_more_steps_than_an_epoch_does_all_steps(world, tmp_path):
    settings = {
        "trainer__num_epochs": None,
        "trainer__num_steps": 6,
        "trainer__warmup_steps": 7,
        "trainer__precision": "fp32",
        "data__sampler__max_tokens": 1000,
        "data__valid_data_config": "null",
    }
    done = assert_done(run_script("train", *world.overrides(tmp_path / "exp", **settings)))
    lines = (tmp_path / "exp" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert records[-1]["step"] == 6
    assert records[-1]["epoch"] > 1, "the epoch is longer than the run: nothing is shown"
    assert done.stderr.count("trainer.warmup_steps=7 ") == 1


@pytest.mark.parametrize(
    ("projector", "hidden", "is_named"),
    [("voxtral", 2048, True), ("voxtral", 64, False), ("mlp", 2048, False)],
)
def test_warning_for_a_model_that_cannot_be_exported_as_voxtral(
    caplog, projector, hidden, is_named
):
    description = AsrLlmConfig(
        llm={"hidden_size": 64},
        projector=projector,
        projector_hidden_size=hidden,
        pad_to_30s="keep_silence",
    )
    with caplog.at_level(logging.WARNING):
        warn_of_projector_width(description)
    assert ("projector_hidden_size=64" in caplog.text) == is_named


@pytest.mark.parametrize(
    ("settings", "total", "warning"),
    [
        ({"warmup_steps": 500}, 220, "trainer.warmup_steps=500"),
        ({"warmup_steps": 220}, 220, None),
        ({"warmup_steps": 0}, 1, None),
        ({"name": "eden"}, 499, "trainer.schedule.warmup_batches=500"),
        ({"name": "eden"}, 500, None),
    ],
)
def test_warning_for_a_warmup_longer_than_the_run(caplog, settings, total, warning):
    config = trainer()
    schedule = dataclasses.replace(config.schedule, name=settings.get("name", "cosine"))
    warmup = settings.get("warmup_steps", 500)
    config = dataclasses.replace(config, schedule=schedule, warmup_steps=warmup)
    with caplog.at_level(logging.WARNING):
        warn_of_long_warmup(config, total)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (warning is not None)
    for message in messages:
        assert warning in message
        assert f"{total} steps" in message
