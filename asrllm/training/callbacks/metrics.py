"""Turns sums over steps and ranks into log records."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from asrllm import distributed
from asrllm.atomic import write_whole
from asrllm.collator.loader import LoadedStep
from asrllm.errors import UserError
from asrllm.escape import escape
from asrllm.training.callbacks.decoding import ValidationSample
from asrllm.training.callbacks.meters import Meter
from asrllm.training.callbacks.sinks import Record, Sink
from asrllm.training.trainer import Callback, StepSums, Trainer

# The ratio of unreadable utterances is computed over at least this many utterances.
MIN_UTTERANCES = 1000


class Metrics(Callback):
    """Writes a log record every `every` steps: the sums over all ranks and the meters' values."""

    def __init__(
        self,
        sinks: Sequence[Sink],
        meters: Sequence[Meter] = (),
        *,
        every: int,
        max_bad_share: float,
    ) -> None:
        """Create the callback.

        Args:
            sinks: destinations of the records on this rank.
            meters: further measurements.
            every: steps between two records.
            max_bad_share: largest ratio of unreadable utterances, data.max_bad_share.
        """
        self.sinks = sinks
        self.meters = meters
        self.every = every
        self.max_bad_share = max_bad_share
        self.seen = 0.0
        self.unreadable = 0.0
        self.messages: list[str] = []  # about unreadable utterances of this rank
        self._start_interval()

    def _start_interval(self) -> None:
        self.sums = StepSums()
        self.interval_start = time.monotonic()
        self.steps = 0

    def before_step(self, trainer: Trainer, loaded: LoadedStep) -> None:
        """Call the meters."""
        for meter in self.meters:
            meter.before_step(trainer, loaded)

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        """Add the sums of a step, and write a record if one is due.

        Raises:
            UserError: too many utterances could not be read.
        """
        self.sums = self.sums + sums
        self.steps += 1
        for meter in self.meters:
            meter.after_step(trainer, loaded, sums)
        for batch in loaded.micro_batches:
            for message in batch.bad:
                print(escape(f"unreadable: {message}"), file=sys.stderr, flush=True)
                self.messages.append(message)
        if trainer.step % self.every and not trainer.stopping:
            return
        total = self.sums.over_ranks(trainer.device)
        seconds = time.monotonic() - self.interval_start
        record = train_record(trainer, loaded.epoch, total, seconds, self.steps)
        self.write(record | self._meter_values(seconds))
        self._start_interval()
        self._check_unreadable(total, trainer.exp_dir)

    def _meter_values(self, seconds: float) -> Record:
        """Return the meters' values from all ranks. All ranks must call this."""
        by_rank = distributed.gather_objects([meter.take() for meter in self.meters])
        record: Record = {}
        for meter, values in zip(self.meters, zip(*by_rank, strict=True), strict=True):
            record.update(meter.record(values, seconds))
        return record

    def write(self, record: Record) -> None:
        """Write a record to all sinks."""
        for sink in self.sinks:
            sink.write(record)

    def write_samples(self, step: int, samples: Sequence[ValidationSample]) -> None:
        """Write decoded utterances to all sinks."""
        for sink in self.sinks:
            sink.write_samples(step, samples)

    @contextlib.contextmanager
    def beside_training(self) -> Iterator[None]:
        """Exclude the time spent in the block from the training time."""
        start = time.monotonic()
        yield
        self.interval_start += time.monotonic() - start

    def _check_unreadable(self, total: StepSums, exp_dir: Path) -> None:
        """Raise UserError and list the utterances if too many could not be read."""
        self.seen += total.utterances
        self.unreadable += total.unreadable
        if self.unreadable <= self.max_bad_share * max(self.seen, MIN_UTTERANCES):
            return
        lines: list[str] = []
        for messages in distributed.gather_objects(self.messages):
            lines += messages
        path = exp_dir / "unreadable.txt"
        if distributed.rank() == 0:
            write_whole(path, "".join(f"{line}\n" for line in lines))
        raise UserError(
            f"{self.unreadable:.0f} of {self.seen:.0f} utterances could not be read, more than "
            f"data.max_bad_share={self.max_bad_share} allows. {path} lists them. "
            f"The first one: {lines[0]}"
        )

    def at_end(self, trainer: Trainer) -> None:
        """Close the sinks."""
        for sink in self.sinks:
            sink.close()


def train_record(
    trainer: Trainer, epoch: int, total: StepSums, seconds: float, steps: int
) -> Record:
    """Return the log record of an interval. metric_names.py describes the values.

    Args:
        trainer: trainer after the last step of the interval.
        epoch: epoch of that step.
        total: sums over the interval and all ranks.
        seconds: duration of the interval without validation.
        steps: steps in the interval.
    """
    ranks = distributed.world_size()
    loss = None
    accuracy = None
    if total.targets:  # else no loss was finite
        loss = total.loss / total.targets
        accuracy = total.correct / total.targets
    return {
        "step": trainer.step,
        "epoch": epoch,
        "loss": loss,
        "acc": accuracy,
        "lr": trainer.lr,
        "grad_norm": trainer.grad_norm,
        "utterances": int(total.utterances),
        "audio_seconds": round(total.audio_seconds, 3),
        "text_tokens": int(total.targets),
        "padding": round(1 - total.audio_seconds / max(total.padded_audio_seconds, 1e-9), 4),
        "bad": int(total.unreadable),
        "skipped": round(total.skipped / ranks),
        "tokens_per_second": round(total.tokens / seconds, 1),
        "audio_hours_per_hour": round(total.audio_seconds / seconds, 2),
        "data_wait": round(total.data_wait / ranks / seconds, 4),
        "seconds_per_step": round(seconds / steps, 4),
    }
