"""When checkpoints are written."""

from typing import Any

from asrllm.collator.loader import LoadedStep
from asrllm.training.checkpoint.saver import CheckpointSaver, make_manifest
from asrllm.training.running_average import RunningAverage
from asrllm.training.trainer import Callback, StepSums, Trainer


class Checkpoints(Callback):
    """checkpoint-{step} every `every` steps and at the run's end; epoch-{n} after the n-th epoch. They hold the running average too."""

    def __init__(
        self,
        settings: dict[str, Any],
        saver: CheckpointSaver,
        *,
        every: int,
        average: RunningAverage | None,
    ) -> None:
        self.settings, self.saver, self.every, self.average = settings, saver, every, average

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        if self.average:
            self.average.update(trainer.step)
        self.saver.look(trainer.device)
        tags = [f"epoch-{loaded.position.epoch}"] if loaded.position.epoch != loaded.epoch else []
        if trainer.step % self.every == 0 or trainer.ending:
            tags.append(f"checkpoint-{trainer.step}")
        if tags:
            self.save(trainer, tags)

    def save(self, trainer: Trainer, tags: list[str]) -> None:
        trainer.watchdog.beat(f"saving {tags[-1]}")
        averaged = self.average is not None
        manifest = make_manifest(
            trainer.engine,
            self.settings,
            step=trainer.step,
            position=trainer.position,
            averaged=averaged,
        )
        self.saver.begin(
            trainer.engine, tags, manifest, self.average.files() if self.average else None
        )

    def at_end(self, trainer: Trainer) -> None:
        trainer.watchdog.beat(f"waiting for checkpoint-{trainer.step}")
        self.saver.finish()
