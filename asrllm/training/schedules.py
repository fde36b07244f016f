"""Learning-rate schedules as pure functions of the step, so that resuming needs no state."""

import math
from collections.abc import Mapping
from typing import Literal

from asrllm.errors import UserError
from asrllm.schema import NonNegativeFloat, PositiveFloat, Ratio, component

# The keys that each schedule reads. A changed key that the chosen schedule ignores is an error.
SCHEDULE_KEYS = {
    "constant": {"warmup_steps"},
    "linear": {"warmup_steps", "min_lr_ratio"},
    "cosine": {"warmup_steps", "min_lr_ratio"},
    "wsd": {"warmup_steps", "min_lr_ratio", "schedule.decay_ratio"},
    "eden": {
        "schedule.lr_batches",
        "schedule.lr_epochs",
        "schedule.warmup_batches",
        "schedule.warmup_start",
    },
}


@component
class ScheduleConfig:
    """Choice and shape of the learning-rate schedule."""

    name: Literal["constant", "linear", "cosine", "wsd", "eden"] = "cosine"
    """constant | linear | cosine | wsd (constant, then linear decay) | eden (icefall's); all after
    a warm-up"""
    decay_ratio: Ratio = 0.1
    """wsd: ratio of all steps in which the learning rate decays"""
    lr_batches: PositiveFloat = 7500.0
    """eden: steps after which the learning rate decays"""
    lr_epochs: PositiveFloat = 3.5
    """eden: epochs after which the learning rate decays"""
    warmup_batches: NonNegativeFloat = 500.0
    """eden: steps of linear warm-up"""
    warmup_start: Ratio = 0.5
    """eden: learning rate at the first step, as a ratio of its value after warm-up"""


def check_schedule_keys(
    schedule: str, values: Mapping[str, object], defaults: Mapping[str, object]
) -> None:
    """Raise UserError for a changed key that the schedule does not use.

    Args:
        schedule: name of the schedule.
        values: values by key below `trainer`, at least for the keys in SCHEDULE_KEYS.
        defaults: their default values.
    """
    for key in sorted(set().union(*SCHEDULE_KEYS.values())):
        if key not in SCHEDULE_KEYS[schedule] and values[key] != defaults[key]:
            readers = ", ".join(name for name, keys in SCHEDULE_KEYS.items() if key in keys)
            raise UserError(
                f"trainer.{key}={values[key]} is not used with trainer.schedule.name={schedule}. "
                f"Remove it, or use a schedule that reads it. Available: {readers}."
            )


def lr_factor(
    schedule: ScheduleConfig,
    step: float,
    *,
    total: int,
    warmup: int,
    floor: float,
    batch: int,
    epoch: float,
) -> float:
    """Return the factor on the peak learning rate.

    Args:
        schedule: choice and shape of the schedule.
        step: position in a schedule of `total` steps, with fractions.
        total: number of steps of the run.
        warmup: steps of linear warm-up, except for eden.
        floor: factor at the end, for linear, cosine and wsd.
        batch: optimizer steps done.
        epoch: passes over the data done, with fractions.
    """
    if schedule.name == "eden":
        return eden(batch, epoch, schedule)
    if step < warmup:  # it rises from 1 / warmup at step 0 to 1
        return (step + 1) / warmup
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "wsd":
        decay = late_linear(step, total=total, decay_ratio=schedule.decay_ratio)
    else:
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        decay = 1 - progress if schedule.name == "linear" else half_cosine(progress)
    return floor + (1 - floor) * decay


def half_cosine(progress: float) -> float:
    """Return the value of half a cosine that falls from 1 at progress 0 to 0 at progress 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def late_linear(step: float, *, total: int, decay_ratio: float) -> float:
    """Return 1, and in the last `decay_ratio` of all steps a linear decay to 0."""
    decay = decay_ratio * total
    if not decay:
        return 1.0
    return 1 - min(1.0, max(0.0, step - (total - decay)) / decay)


def eden(batch: float, epoch: float, schedule: ScheduleConfig) -> float:
    """Return the factor of icefall's Eden schedule (Povey et al.).

    Far from the start it is the inverse square root of the batches and of the epochs.
    """
    by_batches = ((batch / schedule.lr_batches) ** 2 + 1) ** -0.25
    by_epochs = ((epoch / schedule.lr_epochs) ** 2 + 1) ** -0.25
    warmed = 1.0
    if schedule.warmup_batches:
        warmed = min(1.0, batch / schedule.warmup_batches)
    return by_batches * by_epochs * (schedule.warmup_start + (1 - schedule.warmup_start) * warmed)
