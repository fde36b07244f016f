"""Reports the startup time after the first step of a process."""

import sys

from asrllm import distributed
from asrllm.collator.loader import LoadedStep
from asrllm.training.startup import Startup
from asrllm.training.trainer import Callback, StepSums, Trainer


class FirstStep(Callback):
    """Prints how long each phase of the startup took, including the first step."""

    def __init__(self, startup: Startup) -> None:
        self.startup = startup
        self.done = False

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        """Print the durations once, on the first rank."""
        if self.done:
            return
        self.done = True
        self.startup.finish("first step")
        if distributed.rank() == 0:
            print(self.startup.summary(), file=sys.stderr, flush=True)
