"""The stream of training steps: plan -> workers that read and collate -> micro-batches, with the position to resume from."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch.utils.data import DataLoader, Dataset

from asrllm.audio.reader import Reader, Sample, SampleError
from asrllm.collator.batch import Collator, PackedBatch
from asrllm.data.plan import Batch, Plan, Position
from asrllm.errors import UserError

SPARES = 8  # utterances tried in place of one that cannot be read


@dataclass(frozen=True, kw_only=True)
class LoadedStep:
    """What one rank trains on in one optimizer step; position: where the data goes on after it."""

    micro_batches: list[PackedBatch]
    position: Position
    epoch: int


class PlannedDataset(Dataset):
    """(epoch, batch of the plan) -> PackedBatch."""

    def __init__(self, reader: Reader, collator: Collator) -> None:
        self.reader, self.collator = reader, collator

    def __getitem__(self, planned: tuple[int, Batch]) -> PackedBatch | UserError:
        """A user's mistake is given back, not raised: a worker's exception would reach the user as a traceback."""
        try:
            return self._load(*planned)
        except UserError as error:
            return error

    def _load(self, epoch: int, items: Batch) -> PackedBatch:
        samples, bad = [], []
        for item in items:
            try:
                samples.append(self.reader.read(item))
            except SampleError as error:
                bad.append(str(error))
        if not samples:
            samples = [self._spare(items, bad)]
        return replace(self.collator(samples, epoch), bad=tuple(bad))

    def _spare(self, items: Batch, bad: list[str]) -> Sample:
        """A neighbour of the batch, without loss, so that this rank still has a batch."""
        first = items[0]
        rows = self.reader.corpora[first.corpus].rows
        for i in range(1, SPARES + 1):
            row = int(rows[(first.row + i) % len(rows)])
            try:
                return self.reader.read(replace(first, row=row, filler=True))
            except SampleError as error:
                bad.append(str(error))
        raise UserError(f"{len(bad)} utterances in a row cannot be read, the last: {bad[-1]}")


def steps(
    plan: Plan,
    dataset: PlannedDataset,
    start: Position,
    *,
    rank: int,
    ranks: int,
    accumulation: int,
    epochs: int | None,
    num_workers: int,
    pin_memory: bool = False,
) -> Iterator[LoadedStep]:
    """Steps from `start` until `epochs` epochs are over, or without end. What is read does not depend on `num_workers`."""

    def planned() -> Iterator[tuple[int, list[Batch], Position]]:
        counter = itertools.count(start.epoch) if epochs is None else range(start.epoch, epochs)
        for epoch in counter:
            first = start if epoch == start.epoch else Position(epoch=epoch)
            for dealt, after in plan.steps(first, ranks=ranks, accumulation=accumulation):
                yield epoch, dealt[rank], after

    loader = iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=((epoch, batch) for epoch, batches, _ in planned() for batch in batches),  # type: ignore[arg-type]
            num_workers=num_workers,
            prefetch_factor=4 if num_workers else None,
            pin_memory=pin_memory,
        )
    )
    for epoch, batches, after in planned():
        micro_batches = [next(loader) for _ in batches]
        for batch in micro_batches:
            if isinstance(batch, UserError):
                raise batch
        yield LoadedStep(micro_batches=micro_batches, position=after, epoch=epoch)
