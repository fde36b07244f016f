"""Loss, accuracy and word error rate on the validation sets."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from asrllm import distributed
from asrllm.collator.batch import PackedBatch
from asrllm.collator.loader import LoadedStep
from asrllm.progress import ProgressBar
from asrllm.training.callbacks.decoding import (
    Decoder,
    ValidationInterrupted,
    ValidationSample,
    word_error_rate,
)
from asrllm.training.callbacks.metrics import Metrics
from asrllm.training.callbacks.sinks import Record
from asrllm.training.trainer import MODEL_INPUTS, Callback, StepSums, Trainer, count


class Validation(Callback):
    """Measures loss and accuracy of each validation set every `every` steps and at the end.

    With a decoder it also measures the word error rate of the utterances that it decodes. All ranks
    take part. If the run is interrupted, validation is skipped or stopped, because the time is
    needed to save.
    """

    def __init__(
        self,
        sets: dict[str, Callable[[], Iterator[PackedBatch]]],
        metrics: Metrics,
        *,
        every: int,
        sizes: Mapping[str, int] | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        """Create the callback.

        Args:
            sets: for each validation set, a function that yields this rank's batches.
            metrics: callback that writes the records.
            every: steps between two validations.
            sizes: for each validation set, the number of this rank's batches, maybe an estimate.
            decoder: decodes a part of each set, or None.
        """
        self.sets = sets
        self.metrics = metrics
        self.every = every
        self.sizes = sizes or {}
        self.decoder = decoder

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        """Validate if it is due."""
        if (trainer.step % self.every == 0 or trainer.last) and not trainer.preempted:
            with self.metrics.beside_training():
                self.run(trainer)

    def run(self, trainer: Trainer) -> None:
        """Validate and write the record, unless a signal interrupts it."""
        trainer.engine.eval()
        try:
            record, samples = self._measure(trainer)
        except ValidationInterrupted:
            return
        finally:
            trainer.engine.train()
        self.metrics.write(record)
        if samples:
            self.metrics.write_samples(trainer.step, samples)

    @torch.no_grad()
    def _measure(self, trainer: Trainer) -> tuple[Record, list[ValidationSample]]:
        """Return the log record and the decoded utterances of all sets."""
        record: Record = {"step": trainer.step}
        samples: list[ValidationSample] = []
        for name in self.sets:
            total = self._sums(trainer, name)
            record[f"valid/{name}/loss"] = total.loss / max(total.targets, 1)
            record[f"valid/{name}/acc"] = total.correct / max(total.targets, 1)
            if self.decoder is None:
                continue
            decoded = self.decoder.decode(trainer, name)
            record[f"valid/{name}/wer"] = word_error_rate(decoded)
            samples += decoded
        return record, samples

    def _sums(self, trainer: Trainer, name: str) -> StepSums:
        """Return the sums of a validation set over all ranks.

        Losses are read once, after the loop, because reading waits for the device.
        """
        sums = StepSums()
        counts: list[Tensor] = []
        first_rank = distributed.rank() == 0
        size = self.sizes.get(name)
        with ProgressBar(f"validation on {name}", size, enabled=first_rank, brief=True) as bar:
            for batch in self.sets[name]():
                trainer.watchdog.beat(f"validating on {name}", batch.keys)
                if trainer.sync_preemption():
                    raise ValidationInterrupted
                batch = batch.to(trainer.device)
                output = trainer.engine(**{key: getattr(batch, key) for key in MODEL_INPUTS})
                counts.append(torch.stack([output.loss.float(), output.correct.float()]))
                sums += count(batch, 0.0, 0.0)
                bar.advance()
        if counts:
            for loss, correct in torch.stack(counts).tolist():
                sums.loss += loss
                sums.correct += correct
        return sums.over_ranks(trainer.device)
