"""Sums over ranks made into log records."""

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

BAD_SHARE_OVER = 1000  # utterances that the share of unreadable ones is at least counted over


class Metrics(Callback):
    """Sums over ranks every `every` steps, made into one record for the sinks, with what the meters say."""

    def __init__(
        self,
        sinks: Sequence[Sink],
        meters: Sequence[Meter] = (),
        *,
        every: int,
        max_bad_share: float,
    ) -> None:
        self.meters = meters
        self.sinks, self.every, self.max_bad_share = sinks, every, max_bad_share
        self.sums, self.since, self.steps = StepSums(), time.monotonic(), 0
        self.seen = self.bad = 0.0
        self.unreadable: list[str] = []  # by this rank

    def before_step(self, trainer: Trainer, loaded: LoadedStep) -> None:
        for meter in self.meters:
            meter.before_step(trainer, loaded)

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        self.sums, self.steps = self.sums + sums, self.steps + 1
        for meter in self.meters:
            meter.after_step(trainer, loaded, sums)
        for batch in loaded.micro_batches:
            for message in batch.bad:
                print(escape(f"unreadable: {message}"), file=sys.stderr, flush=True)
                self.unreadable.append(message)
        if trainer.step % self.every and not trainer.ending:
            return
        total, seconds = self.sums.over_ranks(trainer.device), time.monotonic() - self.since
        self.write(
            train_record(trainer, loaded.epoch, total, seconds, self.steps) | self._meter(seconds)
        )
        self.sums, self.since, self.steps = StepSums(), time.monotonic(), 0
        self._check_bad(total, trainer.exp_dir)

    def _meter(self, seconds: float) -> Record:
        everywhere = distributed.gather_objects([meter.take() for meter in self.meters])
        record: Record = {}
        for meter, of_ranks in zip(self.meters, zip(*everywhere, strict=True), strict=True):
            record |= meter.record(of_ranks, seconds)
        return record

    def write(self, record: Record) -> None:
        for sink in self.sinks:
            sink.write(record)

    def write_samples(self, step: int, samples: Sequence[ValidationSample]) -> None:
        for sink in self.sinks:
            sink.write_samples(step, samples)

    @contextlib.contextmanager
    def beside_training(self) -> Iterator[None]:
        """The time spent inside the block is not training's."""
        began = time.monotonic()
        yield
        self.since += time.monotonic() - began

    def _check_bad(self, total: StepSums, exp_dir: Path) -> None:
        self.seen, self.bad = self.seen + total.utterances, self.bad + total.bad
        if self.bad <= self.max_bad_share * max(self.seen, BAD_SHARE_OVER):
            return
        everywhere = distributed.gather_objects(self.unreadable)
        lines = [line for rank in everywhere for line in rank]
        if distributed.rank() == 0:
            write_whole(exp_dir / "unreadable.txt", "".join(f"{line}\n" for line in lines))
        raise UserError(
            f"{self.bad:.0f} of {self.seen:.0f} utterances could not be read, more than data.max_bad_share={self.max_bad_share} allows: "
            f"{exp_dir / 'unreadable.txt'} lists them; the first: {lines[0]}"
        )

    def at_end(self, trainer: Trainer) -> None:
        for sink in self.sinks:
            sink.close()


def train_record(
    trainer: Trainer, epoch: int, total: StepSums, seconds: float, steps: int
) -> Record:
    targets, ranks = total.targets, distributed.world_size()
    return {
        "step": trainer.step,
        "epoch": epoch,
        "loss": total.loss / targets if targets else None,  # no loss was finite
        "acc": total.correct / targets if targets else None,
        "lr": trainer.lr,
        "grad_norm": trainer.grad_norm,
        "utterances": int(total.utterances),
        "audio_seconds": round(total.audio_seconds, 3),
        "text_tokens": int(total.targets),
        "padding": round(1 - total.audio_seconds / max(total.read_seconds, 1e-9), 4),
        "bad": int(total.bad),
        "skipped": round(total.skipped / ranks),
        "tokens_per_second": round(total.tokens / seconds, 1),
        "audio_hours_per_hour": round(total.audio_seconds / seconds, 2),
        "data_wait": round(total.data_wait / ranks / seconds, 4),
        "seconds_per_step": round(seconds / steps, 4),
    }
