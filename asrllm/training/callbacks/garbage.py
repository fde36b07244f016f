"""Runs Python's garbage collection at the same steps on all ranks.

If each rank collected at its own time, all ranks would wait for each collection. torchtitan does
the same: https://github.com/pytorch/torchtitan/blob/main/torchtitan/tools/utils.py
"""

import gc

from asrllm.collator.loader import LoadedStep
from asrllm.training.trainer import Callback, StepSums, Trainer


class GarbageCollection(Callback):
    """Collects every `every` steps. Python's own collection is switched off until the end."""

    def __init__(self, *, every: int) -> None:
        self.every = every
        self.was_enabled = gc.isenabled()
        gc.disable()

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        """Collect if it is due."""
        if trainer.step % self.every == 0:
            gc.collect()

    def at_end(self, trainer: Trainer) -> None:
        """Switch Python's own collection on again if it was on."""
        if self.was_enabled:
            gc.enable()
