import dataclasses
import math

import pytest

from asrllm.errors import UserError
from asrllm.schema import build
from asrllm.training.run_config import TrainerConfig
from asrllm.training.schedules import SCHEDULE_KEYS, eden, lr_factor

CONFIG = TrainerConfig()


def factors(name, steps, *, total=110, warmup=10, floor=0.1, **keys):
    schedule = dataclasses.replace(CONFIG.schedule, name=name, **keys)
    return [
        lr_factor(
            schedule, step, total=total, warmup=warmup, floor=floor, batch=step, epoch=step / 50
        )
        for step in steps
    ]


def test_every_key_that_a_schedule_reads_exists():
    keys = {*vars(CONFIG), *(f"schedule.{key}" for key in vars(CONFIG.schedule))}
    assert set().union(*SCHEDULE_KEYS.values()) <= keys


def test_cosine_falls_from_the_peak_to_the_floor_in_half_a_period():
    steps = [10, 10.5, 35, 60, 85, 109, 110, 200]
    angles = [min(1.0, (step - 10) / 100) * math.pi for step in steps]
    expected = [0.1 + 0.9 * (1 + math.cos(angle)) / 2 for angle in angles]
    assert factors("cosine", steps) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
def test_all_schedules_but_eden_have_the_same_warmup(name):
    assert factors(name, range(11)) == pytest.approx([*((i + 1) / 10 for i in range(10)), 1.0])
    assert factors(name, [0], warmup=0) == [1.0]


def test_schedules_decay_to_the_floor():
    assert factors("constant", [50, 110, 500]) == [1.0] * 3
    assert factors("linear", [60, 110, 500]) == pytest.approx([0.55, 0.1, 0.1])
    assert factors("wsd", [98, 99, 104.5, 110, 500], decay_ratio=0.1) == pytest.approx(
        [1.0, 1.0, 0.55, 0.1, 0.1]
    )
    assert factors("wsd", [110, 500], decay_ratio=0.0) == [1.0, 1.0]


def test_eden_matches_the_formula_of_icefall():
    """((batch^2 + lr_batches^2) / lr_batches^2)^-0.25, the same for epochs, and the warm-up."""
    for batch, epoch in [(0, 0.0), (250, 0.1), (500, 0.2), (20000, 8.5)]:
        by_batches = ((batch**2 + 7500**2) / 7500**2) ** -0.25
        by_epochs = ((epoch**2 + 3.5**2) / 3.5**2) ** -0.25
        warmed = 1.0 if batch >= 500 else 0.5 + 0.5 * batch / 500
        assert eden(batch, epoch, CONFIG.schedule) == pytest.approx(
            by_batches * by_epochs * warmed, rel=1e-12
        )
    assert math.isclose(eden(0, 0.0, dataclasses.replace(CONFIG.schedule, warmup_batches=0.0)), 1.0)


@pytest.mark.parametrize(
    ("name", "top", "below", "message"),
    [
        ("eden", {"warmup_steps": 7}, {}, r"trainer\.warmup_steps=7 .*schedule\.name=eden"),
        ("constant", {"min_lr_ratio": 0.1}, {}, r"min_lr_ratio=0\.1 .*linear, cosine, wsd"),
        ("cosine", {}, {"decay_ratio": 0.2}, r"trainer\.schedule\.decay_ratio=0\.2 .*=cosine"),
        ("wsd", {}, {"decay_ratio": 1.5}, r"trainer\.schedule\.decay_ratio=1\.5 "),
        ("eden", {}, {"lr_epochs": 0.0}, r"trainer\.schedule\.lr_epochs=0\.0 "),
        ("eden", {}, {"warmup_batches": -1.0}, r"trainer\.schedule\.warmup_batches=-1\.0 "),
    ],
)
def test_unused_and_invalid_keys_are_rejected(name, top, below, message):
    with pytest.raises(UserError, match=message):
        build(TrainerConfig, {**top, "schedule": {"name": name, **below}}, group="trainer.")
