"""Loss, accuracy and word error rate on the validation sets."""

from collections.abc import Callable, Iterator

import torch

from asrllm.collator.batch import PackedBatch
from asrllm.collator.loader import LoadedStep
from asrllm.training.callbacks.decoding import (
    AskedToEnd,
    Decoder,
    ValidationSample,
    word_error_rate,
)
from asrllm.training.callbacks.metrics import Metrics
from asrllm.training.callbacks.sinks import Record
from asrllm.training.trainer import MODEL_INPUTS, Callback, StepSums, Trainer, count


class Validation(Callback):
    """Loss and token accuracy of each validation set, every `every` steps and at the end; all ranks take part. With a decoder also the
    word error rate of what it decodes.

    A run that is asked to end leaves it out or breaks it off: its time is for saving.
    """

    def __init__(
        self,
        sets: dict[str, Callable[[], Iterator[PackedBatch]]],
        metrics: Metrics,
        *,
        every: int,
        decoder: Decoder | None = None,
    ) -> None:
        self.sets, self.metrics, self.every, self.decoder = sets, metrics, every, decoder

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        if (trainer.step % self.every == 0 or trainer.last) and not trainer.preempted:
            with self.metrics.beside_training():
                self.run(trainer)

    def run(self, trainer: Trainer) -> None:
        trainer.engine.eval()
        try:
            record, samples = self._measure(trainer)
        except AskedToEnd:
            return
        finally:
            trainer.engine.train()
        self.metrics.write(record)
        if samples:
            self.metrics.write_samples(trainer.step, samples)

    @torch.no_grad()
    def _measure(self, trainer: Trainer) -> tuple[Record, list[ValidationSample]]:
        record: Record = {"step": trainer.step}
        samples: list[ValidationSample] = []
        for name in self.sets:
            total = self._sums(trainer, name)
            record |= {
                f"valid/{name}/loss": total.loss / max(total.targets, 1),
                f"valid/{name}/acc": total.correct / max(total.targets, 1),
            }
            if self.decoder is None:
                continue
            decoded = self.decoder.decode(trainer, name)
            record[f"valid/{name}/wer"] = word_error_rate(decoded)
            samples += decoded
        return record, samples

    def _sums(self, trainer: Trainer, name: str) -> StepSums:
        sums = StepSums()
        for batch in self.sets[name]():
            trainer.watchdog.beat(f"validating on {name}", batch.keys)
            if trainer.agree_to_end():
                raise AskedToEnd
            batch = batch.to(trainer.device)
            output = trainer.engine(**{key: getattr(batch, key) for key in MODEL_INPUTS})
            sums += count(batch, output.loss, output.correct)
        return sums.over_ranks(trainer.device)
