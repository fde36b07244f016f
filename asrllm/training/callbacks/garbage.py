"""Python's garbage collection at the same steps on all ranks: on its own each stops at another time, and all wait for each."""

import gc

from asrllm.collator.loader import LoadedStep
from asrllm.training.trainer import Callback, StepSums, Trainer


class GarbageCollection(Callback):
    """Every `every` steps; Python's own is off until the end."""

    def __init__(self, *, every: int) -> None:
        self.every, self.was_enabled = every, gc.isenabled()
        gc.disable()

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        if trainer.step % self.every == 0:
            gc.collect()

    def at_end(self, trainer: Trainer) -> None:
        if self.was_enabled:
            gc.enable()
