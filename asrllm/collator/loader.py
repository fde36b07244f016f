"""The stream of training steps: plan -> workers that read and collate -> micro-batches, with the position to resume from."""

import atexit
import collections
import contextlib
import functools
import itertools
import mmap
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from asrllm.audio.reader import Reader, Sample, SampleError
from asrllm.collator.batch import Collator, PackedBatch
from asrllm.data.plan import Batch, Item, Plan, Position, Step, planned_steps
from asrllm.data.storage import RemoteFile
from asrllm.errors import UserError
from asrllm.processes import die_with_parent, release_sockets

PREFETCH = 4  # batches that each reading process is ahead
ROOM = 2  # a slot holds so many times the largest batch: speed perturbation makes longer ones, and another window may
LATER = 2  # windows whose plan and remote shards are made ready beforehand: the one that begins and the next


@dataclass(frozen=True, kw_only=True)
class LoadedStep:
    """What one rank trains on in one optimizer step.

    before: epochs that were done when it began; position: where the data goes on after it.
    """

    micro_batches: list[PackedBatch]
    position: Position
    before: float
    epoch: int


class PlannedDataset(Dataset):
    """A batch of the plan -> PackedBatch, or the mistake of the user's that was found."""

    def __init__(self, reader: Reader, collator: Collator) -> None:
        self.reader, self.collator = reader, collator

    def load(self, items: Batch, out: np.ndarray | None = None) -> PackedBatch:
        """out: see Collator."""
        bad: list[str] = []
        samples = [sample for item in items if (sample := self._read(item, bad)) is not None]
        if not samples:
            raise UserError(
                f"{len(bad)} utterances in a row and what could stand in for them cannot be read, the last: {bad[-1]}"
            )
        return replace(self.collator(samples, out), bad=tuple(bad))

    def _read(self, item: Item, bad: list[str]) -> Sample | None:
        """The utterance, or the first of its spares that can be read; what is wrong with a spare is told where it is dealt out itself."""
        for candidate in (item, *item.spares):
            try:
                return self.reader.read(replace(candidate, filler=item.filler))
            except SampleError as error:
                if candidate is item:
                    bad.append(str(error))
        return None


class SharedSlots(Dataset):
    """Runs a PlannedDataset in reading processes that lay the waveforms out in memory shared with this one.

    A slot is mapped once, before the processes are forked, and used again and again: waveforms are neither sent nor copied nor allocated,
    and none of it counts against /dev/shm, which containers keep small.
    """

    def __init__(self, dataset: PlannedDataset, count: int, floats: int) -> None:
        self.dataset = dataset
        self.slots: list[np.ndarray] = [
            np.frombuffer(mmap.mmap(-1, 4 * floats), np.float32) for _ in range(count)
        ]
        self.free = collections.deque(range(count))

    def __getitem__(self, task: tuple[int, Batch]) -> dict[str, Any] | UserError:
        """In a reading process. A mistake is given back, not raised: a worker's exception would reach the user as a traceback."""
        slot, items = task
        try:
            batch = self.dataset.load(items, self.slots[slot])
        except UserError as error:
            return error
        sent = {
            name: value.numpy() if isinstance(value, Tensor) else value
            for name, value in vars(batch).items()
        }
        if np.shares_memory(sent["waves"], self.slots[slot]):
            sent["waves"] = sent["waves"].shape
        return sent

    def received(self, slot: int, sent: dict[str, Any] | UserError) -> PackedBatch:
        """In the main process: the batch, whose waveforms are valid until the slot is given out again."""
        if isinstance(sent, UserError):
            raise sent
        if isinstance(sent["waves"], tuple):
            shape = sent["waves"]
            sent["waves"] = self.slots[slot][: shape[0] * shape[1]].reshape(shape)
        return PackedBatch(
            **{
                name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v
                for name, v in sent.items()
            }
        )


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
    prefetch: Callable[[Sequence[RemoteFile]], None] | None = None,
) -> Iterator[LoadedStep]:
    """Steps from `start` until `epochs` epochs are over, or without end. What is read does not depend on `num_workers`.

    A step's waveforms are valid until the next one is asked for. prefetch: told of the remote shards of a window and of the next when it
    begins.
    """
    with ThreadPoolExecutor(1, "plan") as thread:
        planned = planned_steps(plan, start, ranks=ranks, accumulation=accumulation, epochs=epochs)
        planned = _prepared(planned, plan, thread, ranks, prefetch)
        if num_workers:
            # none of the room that is not used is taken; a batch that does not fit is sent
            shared = SharedSlots(
                dataset, num_workers * PREFETCH + accumulation + 1, ROOM * plan.largest_batch(ranks)
            )
            loaded = _read_in_processes(planned, rank, shared, num_workers, accumulation)
        else:
            loaded = _read_here(planned, rank, dataset)
        for position, step, micro_batches in loaded:
            yield LoadedStep(
                micro_batches=micro_batches,
                position=step.after,
                before=step.before,
                epoch=position.epoch,
            )


Planned = Iterator[tuple[Position, Step]]
Loaded = Iterator[tuple[Position, Step, list[PackedBatch]]]


def _read_here(planned: Planned, rank: int, dataset: PlannedDataset) -> Loaded:
    for position, step in planned:
        yield position, step, [dataset.load(items) for items in step.of_rank(rank)]


def _read_in_processes(
    planned: Planned, rank: int, shared: SharedSlots, workers: int, accumulation: int
) -> Loaded:
    ahead: collections.deque[tuple[Position, Step, list[int]]] = (
        collections.deque()
    )  # given out and not received, with their slots

    def tasks() -> Iterator[tuple[int, Batch]]:
        for position, step in planned:
            slots: list[int] = []
            ahead.append((position, step, slots))
            for items in step.of_rank(rank):
                slots.append(shared.free.popleft())
                yield slots[-1], items

    _kill_readers_at_exit()
    readers = DataLoader(
        shared,
        batch_size=None,
        sampler=tasks(),  # type: ignore[arg-type]
        num_workers=workers,
        prefetch_factor=PREFETCH,
        collate_fn=_as_it_is,
        worker_init_fn=functools.partial(_begin_reader, parent_of_reader()),
        multiprocessing_context="fork",  # the index and the slots are mapped, not copied
    )
    loader: Any = None
    try:
        with _interrupt_later():
            loader = iter(readers)
        for first in loader:
            position, step, slots = ahead.popleft()
            sent = [first, *itertools.islice(loader, accumulation - 1)]
            yield (
                position,
                step,
                [shared.received(slot, batch) for slot, batch in zip(slots, sent, strict=True)],
            )
            shared.free.extend(slots)
    finally:
        # An error's traceback keeps the loader alive. Once the garbage collector frees it, its queues are closed already, and it
        # would wait 5 s for each reader.
        if loader is not None:
            loader._shutdown_workers()


def _as_it_is(batch: Any) -> Any:
    return batch


@contextlib.contextmanager
def _interrupt_later() -> Iterator[None]:
    """Raise KeyboardInterrupt at the end of the block instead of within it.

    A reader that is forked in between takes no Ctrl-C either: an interrupted fork leaves half a
    loader, whose finalizer prints a traceback.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    ):
        yield
        return
    noted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    if noted:
        raise KeyboardInterrupt


@functools.cache  # once a process
def _kill_readers_at_exit() -> None:
    """A process that ends in the middle of the data sends its readers SIGTERM, which they ignore, and would wait for them for ever."""
    atexit.register(_kill_readers)


def _kill_readers() -> None:
    # torch's handler would raise an error for each of them in whatever runs at exit after this
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def parent_of_reader() -> int | None:
    """Return this process's id if readers may live as long as the current thread, else None.

    The system kills a reader when the thread that forked it ends; the main thread ends last.
    """
    is_main = threading.current_thread() is threading.main_thread()
    return os.getpid() if is_main else None


def _begin_reader(parent: int | None, worker: int) -> None:
    """Prepare a reading process: it ends with its parent, and holds none of its connections.

    Signals are left to the training process, which stops its readers itself. Launchers, schedulers
    and terminals signal all processes; the training one saves, and needs its readers until then.

    Args:
        parent: the process to end with; None: torch notices within seconds that it ended.
        worker: the reader's number, as torch passes it.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if parent is not None:
        die_with_parent(parent)
    # a connection closes only once no process holds it, and the other ranks wait for that
    release_sockets()


def _prepared(
    planned: Planned,
    plan: Plan,
    thread: ThreadPoolExecutor,
    ranks: int,
    prefetch: Callable[[Sequence[RemoteFile]], None] | None,
) -> Planned:
    """The steps; when a window begins, what it and the next one need is made ready beside them."""
    window = (-1, -1)
    for position, step in planned:
        if (position.epoch, position.window) != window:
            window = (position.epoch, position.window)
            thread.submit(_prepare, plan, position, ranks, prefetch)
        yield position, step


def _prepare(
    plan: Plan,
    position: Position,
    ranks: int,
    prefetch: Callable[[Sequence[RemoteFile]], None] | None,
) -> None:
    """What the window that begins and the one after it need."""
    if prefetch is not None:
        prefetch(
            [
                file
                for window in range(LATER)
                for file in plan.files(position.epoch, position.window + window)
            ]
        )
    plan.batches(*plan.following(position.epoch, position.window), ranks)
