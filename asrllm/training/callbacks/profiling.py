"""Profiles a range of steps."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from asrllm import distributed
from asrllm.collator.loader import LoadedStep
from asrllm.training.trainer import Callback, StepSums, Trainer

ROWS = 40  # length of the summary


class Profiler(Callback):
    """Profiles the steps from `first` to `last` and everything between them.

    Each rank writes two files below exp_dir/profile: rank{r}.json, a trace for chrome://tracing or
    Perfetto, and rank{r}.txt, a table of the most expensive operations.
    """

    def __init__(self, exp_dir: Path, first: int, last: int) -> None:
        self.folder = exp_dir / "profile"
        self.first = first
        self.last = last
        self.running: profile | None = None

    def before_step(self, trainer: Trainer, loaded: LoadedStep) -> None:
        """Start the profiler before the first step of the range."""
        if self.running is None and self.first <= trainer.step + 1 <= self.last:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self.running = profile(activities=activities)
            self.running.start()

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        """Stop the profiler and write its files after the last step of the range."""
        if self.running is not None and (trainer.step >= self.last or trainer.stopping):
            self.running.stop()
            self._write(self.running)
            self.running = None

    def _write(self, done: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"rank{distributed.rank()}"
        done.export_chrome_trace(str(self.folder / f"{name}.json"))
        device = "device" if torch.cuda.is_available() else "cpu"
        table = done.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=ROWS)
        (self.folder / f"{name}.txt").write_text(table, encoding="utf-8")
