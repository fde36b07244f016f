"""The learning rate as a pure function of the step: a resumed run needs no state for it."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from asrllm.errors import UserError

# What a schedule reads; a key that it does not read and that was changed is a mistake.
READ = {
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
DEFAULTS = {
    "warmup_steps": 500,
    "min_lr_ratio": 0.0,
    "schedule.decay_ratio": 0.1,
    "schedule.lr_batches": 7500.0,
    "schedule.lr_epochs": 3.5,
    "schedule.warmup_batches": 500.0,
    "schedule.warmup_start": 0.5,
}


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    name: Literal["constant", "linear", "cosine", "wsd", "eden"]
    decay_ratio: float
    lr_batches: float
    lr_epochs: float
    warmup_batches: float
    warmup_start: float

    def __post_init__(self) -> None:
        for key in ("lr_batches", "lr_epochs"):
            if not 0 < getattr(self, key) < math.inf:
                raise UserError(
                    f"trainer.schedule.{key}={getattr(self, key)} must be a number above 0"
                )
        if not 0 <= self.warmup_batches < math.inf:
            raise UserError(
                f"trainer.schedule.warmup_batches={self.warmup_batches} must not be below 0"
            )
        for key in ("decay_ratio", "warmup_start"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"trainer.schedule.{key}={getattr(self, key)} must be 0 to 1")


def check_read(schedule: ScheduleConfig, values: dict[str, Any]) -> None:
    """values: of the keys below `trainer` that some schedule reads."""
    for key, default in DEFAULTS.items():
        if key not in READ[schedule.name] and values[key] != default:
            readers = ", ".join(name for name, keys in READ.items() if key in keys)
            raise UserError(
                f"trainer.{key}={values[key]} is not read with trainer.schedule.name={schedule.name}: leave it out, or choose {readers}"
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
    """Factor on the peak learning rate.

    step: where the run stands in a schedule of `total`. batch, epoch: optimizer steps and passes over the data that are done, in fractions.
    """
    if schedule.name == "eden":
        return eden(batch, epoch, schedule)
    if schedule.name == "wsd":
        return warmup_stable_decay(
            step, total=total, warmup=warmup, floor=floor, decay_ratio=schedule.decay_ratio
        )
    if schedule.name == "constant":
        return warmup_linear(step, total=total, warmup=warmup, floor=1.0)
    return {"linear": warmup_linear, "cosine": warmup_cosine}[schedule.name](
        step, total=total, warmup=warmup, floor=floor
    )


def warmup_cosine(step: float, *, total: int, warmup: int, floor: float = 0.0) -> float:
    """Factor on the peak learning rate for step 0, 1, ...: linear from 1/warmup to 1, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_linear(step: float, *, total: int, warmup: int, floor: float = 0.0) -> float:
    """Up as warmup_cosine, then straight down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * (1 - progress)


def warmup_stable_decay(
    step: float, *, total: int, warmup: int, floor: float = 0.0, decay_ratio: float
) -> float:
    """Up as warmup_cosine, constant, and straight down to `floor` in the last `decay_ratio` of all steps."""
    if step < warmup:
        return (step + 1) / warmup
    decay = decay_ratio * total
    progress = min(1.0, max(0.0, step - (total - decay)) / decay) if decay else 0.0
    return floor + (1 - floor) * (1 - progress)


def eden(batch: float, epoch: float, schedule: ScheduleConfig) -> float:
    """icefall's (Povey et al.): the inverse square root of batches and of epochs, far from the beginning."""
    by_batches = ((batch / schedule.lr_batches) ** 2 + 1) ** -0.25
    by_epochs = ((epoch / schedule.lr_epochs) ** 2 + 1) ** -0.25
    warmed = min(1.0, batch / schedule.warmup_batches) if schedule.warmup_batches else 1.0
    return by_batches * by_epochs * (schedule.warmup_start + (1 - schedule.warmup_start) * warmed)
