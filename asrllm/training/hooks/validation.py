"""Loss and accuracy on the validation sets."""

from collections.abc import Callable, Iterator

import torch

from asrllm.collator.batch import PackedBatch
from asrllm.collator.loader import LoadedStep
from asrllm.training.hooks.metrics import Metrics
from asrllm.training.hooks.sinks import Record
from asrllm.training.trainer import MODEL_INPUTS, StepSums, Trainer, count


class Validation:
    """Loss and token accuracy of each validation set, every `every` steps and at the end; all ranks take part.

    A run that is asked to end leaves it out or breaks it off: its time is for saving.
    """

    def __init__(self, sets: dict[str, Callable[[], Iterator[PackedBatch]]], metrics: Metrics, *, every: int) -> None:
        self.sets, self.metrics, self.every = sets, metrics, every

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        if (trainer.step % self.every == 0 or trainer.last) and not trainer.preempted:
            with self.metrics.beside_training():
                record = self.run(trainer)
            if record is not None:
                self.metrics.write(record)

    def at_end(self, trainer: Trainer) -> None:
        """The last step has validated."""

    def run(self, trainer: Trainer) -> Record | None:
        """None: the run was asked to end."""
        trainer.engine.eval()
        try:
            return self._measure(trainer)
        finally:
            trainer.engine.train()

    @torch.no_grad()
    def _measure(self, trainer: Trainer) -> Record | None:
        record: Record = {"step": trainer.step}
        for name, batches in self.sets.items():
            sums = StepSums()
            for batch in batches():
                trainer.watchdog.beat(f"validating on {name}", batch.keys)
                if trainer.agree_to_end():
                    return None
                batch = batch.to(trainer.device)
                output = trainer.engine(**{key: getattr(batch, key) for key in MODEL_INPUTS})
                sums += count(batch, output.loss, output.correct)
            total = sums.over_ranks(trainer.device)
            record |= {f"valid/{name}/loss": total.loss / max(total.targets, 1), f"valid/{name}/acc": total.correct / max(total.targets, 1)}
        return record
