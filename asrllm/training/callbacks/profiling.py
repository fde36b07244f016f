"""A profile of some steps."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from asrllm import distributed
from asrllm.collator.loader import LoadedStep
from asrllm.training.trainer import Callback, StepSums, Trainer

ROWS = 40  # of the summary


class Profiler(Callback):
    """exp_dir/profile/rank{r}.json, a trace for chrome://tracing or Perfetto, and rank{r}.txt, what took longest, of the steps first to
    last with what is between them."""

    def __init__(self, exp_dir: Path, first: int, last: int) -> None:
        self.folder, self.first, self.last = exp_dir / "profile", first, last
        self.running: profile | None = None

    def before_step(self, trainer: Trainer, loaded: LoadedStep) -> None:
        if self.running is None and self.first <= trainer.step + 1 <= self.last:
            on_device = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.running = profile(activities=[ProfilerActivity.CPU, *on_device])
            self.running.start()

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        if self.running is not None and (trainer.step >= self.last or trainer.ending):
            self.running.stop()
            self._write(self.running)
            self.running = None

    def _write(self, done: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"rank{distributed.rank()}"
        done.export_chrome_trace(str(self.folder / f"{name}.json"))
        by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        (self.folder / f"{name}.txt").write_text(
            done.key_averages().table(sort_by=by, row_limit=ROWS), encoding="utf-8"
        )
