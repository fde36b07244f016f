"""When checkpoints are written."""

from typing import Any

from asrllm.collator.loader import LoadedStep
from asrllm.training import distributed
from asrllm.training.checkpoint import make_manifest, prune, save_checkpoint
from asrllm.training.hooks.metrics import Metrics
from asrllm.training.trainer import StepSums, Trainer


class Checkpoints:
    """checkpoint-{step} every `every` steps and at the run's end; epoch-{n} after the n-th epoch."""

    def __init__(self, metrics: Metrics, settings: dict[str, Any], *, every: int, keep: int) -> None:
        self.metrics, self.settings, self.every, self.keep = metrics, settings, every, keep

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        if loaded.position.epoch != loaded.epoch:
            self.save(trainer, f"epoch-{loaded.position.epoch}")
        if trainer.step % self.every == 0 or trainer.ending:
            self.save(trainer, f"checkpoint-{trainer.step}")
            if distributed.rank() == 0:
                prune(trainer.exp_dir, self.keep)

    def save(self, trainer: Trainer, tag: str) -> None:
        trainer.watchdog.beat(f"saving {tag}")
        manifest = make_manifest(trainer.engine, self.settings, step=trainer.step, position=trainer.position)
        with self.metrics.beside_training():
            save_checkpoint(trainer.engine, trainer.exp_dir, tag, manifest)

    def at_end(self, trainer: Trainer) -> None:
        """The last step has saved."""
