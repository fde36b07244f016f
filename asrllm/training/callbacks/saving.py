"""Saves checkpoints during training."""

from asrllm.collator.loader import LoadedStep
from asrllm.progress import waiting
from asrllm.training.checkpoint.manifest import Settings
from asrllm.training.checkpoint.saver import CheckpointSaver, make_manifest
from asrllm.training.running_average import RunningAverage
from asrllm.training.trainer import Callback, StepSums, Trainer


class Checkpoints(Callback):
    """Saves checkpoint-{step} and epoch-{n}, with the running average if there is one.

    checkpoint-{step} is saved every `every` steps and at the end of the run, epoch-{n} after the
    n-th epoch.
    """

    def __init__(
        self,
        settings: Settings,
        saver: CheckpointSaver,
        *,
        every: int,
        average: RunningAverage | None,
    ) -> None:
        """Create the callback.

        Args:
            settings: settings that a resumed run must have in common with the checkpoint.
            saver: writes the checkpoints.
            every: steps between two checkpoints.
            average: running average of the weights, or None.
        """
        self.settings = settings
        self.saver = saver
        self.every = every
        self.average = average

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        """Update the running average, and save a checkpoint if one is due."""
        if self.average:
            self.average.update(trainer.step)
        self.saver.publish_if_written(trainer.device)
        tags = []
        if loaded.next_position.epoch != loaded.epoch:
            tags.append(f"epoch-{loaded.next_position.epoch}")
        if trainer.step % self.every == 0 or trainer.stopping:
            tags.append(f"checkpoint-{trainer.step}")
        if tags:
            self.save(trainer, tags)

    def save(self, trainer: Trainer, tags: list[str]) -> None:
        """Save one checkpoint under one or several names."""
        trainer.watchdog.beat(f"saving {tags[-1]}")
        manifest = make_manifest(
            trainer.engine,
            self.settings,
            step=trainer.step,
            position=trainer.position,
            averaged=self.average is not None,
        )
        extra_files = self.average.files() if self.average else None
        self.saver.begin(trainer.engine, tags, manifest, extra_files)

    def at_end(self, trainer: Trainer) -> None:
        """Wait until the last checkpoint is written."""
        trainer.watchdog.beat(f"waiting for checkpoint-{trainer.step}")
        with waiting(f"writing checkpoint-{trainer.step}"):
            self.saver.finish()
