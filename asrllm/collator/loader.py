"""The stream of training steps: the plan, workers that read and collate, and micro-batches.

Each step comes with the position from which a resumed run continues.
"""

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

Prefetch = Callable[[Sequence[RemoteFile]], None]

PREFETCH = 4  # batches that each worker reads ahead
# A slot has room for twice the largest batch, because speed perturbation lengthens waveforms and
# another window may have a larger batch.
ROOM = 2
WINDOWS_AHEAD = 2  # windows whose plan and remote shards are prepared: the current and the next


@dataclass(frozen=True, kw_only=True)
class LoadedStep:
    """What one rank trains on in one optimizer step.

    Attributes:
        micro_batches: batches in the order of their accumulation.
        next_position: where the data continues after the step.
        epochs_done: epochs that were done when the step began.
        epoch: the number of the epoch, from 0.
    """

    micro_batches: list[PackedBatch]
    next_position: Position
    epochs_done: float
    epoch: int


class PlannedDataset(Dataset):
    """Reads the batches of the plan."""

    def __init__(self, reader: Reader, collator: Collator) -> None:
        self.reader = reader
        self.collator = collator

    def load(self, items: Batch, out: np.ndarray | None = None) -> PackedBatch:
        """Read one batch.

        Args:
            items: the utterances of the batch.
            out: memory for the waveforms, see Collator.

        Raises:
            UserError: no utterance of the batch and none of its spares can be read.
        """
        bad: list[str] = []
        samples = []
        for item in items:
            sample = self._read(item, bad)
            if sample is not None:
                samples.append(sample)
        if not samples:
            raise UserError(
                f"{len(bad)} utterances of one batch and their spares cannot be read. "
                f"The last one: {bad[-1]}"
            )
        return replace(self.collator(samples, out), bad=tuple(bad))

    def _read(self, item: Item, bad: list[str]) -> Sample | None:
        """Return the utterance, or its first spare that can be read.

        Only the message of the utterance itself is added to `bad`. A spare is reported where the
        plan deals it out.
        """
        for candidate in (item, *item.spares):
            try:
                return self.reader.read(replace(candidate, is_filler=item.is_filler))
            except SampleError as error:
                if candidate is item:
                    bad.append(str(error))
        return None


class SharedSlots(Dataset):
    """Runs a PlannedDataset in workers that write the waveforms to memory shared with this process.

    A slot is mapped once, before the workers are forked, and used again and again. So waveforms are
    not sent, copied or allocated, and do not count against /dev/shm, which is small in containers.
    """

    def __init__(self, dataset: PlannedDataset, count: int, floats: int) -> None:
        """
        Args:
            dataset: reads the batches.
            count: number of slots.
            floats: float32 values in each slot.
        """
        self.dataset = dataset
        self.slots: list[np.ndarray] = []
        for _ in range(count):
            self.slots.append(np.frombuffer(mmap.mmap(-1, 4 * floats), np.float32))
        self.free = collections.deque(range(count))

    def __getitem__(self, task: tuple[int, Batch]) -> dict[str, Any] | UserError:
        """Read a batch in a worker.

        A UserError is returned, not raised: an exception of a worker would be shown as a traceback.
        """
        slot, items = task
        try:
            batch = self.dataset.load(items, self.slots[slot])
        except UserError as error:
            return error
        sent: dict[str, Any] = {}
        for name, value in vars(batch).items():
            sent[name] = value.numpy() if isinstance(value, Tensor) else value
        if np.shares_memory(sent["waves"], self.slots[slot]):
            # The samples are in the slot already, so that only their shape is sent.
            sent["waves"] = sent["waves"].shape
        return sent

    def received(self, slot: int, sent: dict[str, Any] | UserError) -> PackedBatch:
        """Return the batch in the main process. Waveforms are valid until the slot is reused."""
        if isinstance(sent, UserError):
            raise sent
        if isinstance(sent["waves"], tuple):
            shape = sent["waves"]
            samples = shape[0] * shape[1]
            sent["waves"] = self.slots[slot][:samples].reshape(shape)
        fields = {}
        for name, value in sent.items():
            fields[name] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        return PackedBatch(**fields)


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
    prefetch: Prefetch | None = None,
) -> Iterator[LoadedStep]:
    """Yield the steps of one rank from a position on.

    What is read does not depend on num_workers. The waveforms of a step are valid until the next
    step is requested.

    Args:
        plan: which utterances form which batch.
        dataset: reads the batches.
        start: where to begin.
        rank: rank of this process.
        ranks: number of processes that train.
        accumulation: micro-batches of a step.
        epochs: where to stop; None never stops.
        num_workers: reading processes; 0 reads in this process.
        prefetch: called with the remote shards of a window and the next one when it begins.
    """
    with ThreadPoolExecutor(1, "plan") as thread:
        planned = planned_steps(plan, start, ranks=ranks, accumulation=accumulation, epochs=epochs)
        planned = _prepared(planned, plan, thread, ranks, prefetch)
        if num_workers:
            # unused room takes no memory, and a batch that does not fit is sent
            count = num_workers * PREFETCH + accumulation + 1
            shared = SharedSlots(dataset, count, ROOM * plan.largest_batch(ranks))
            loaded = _read_in_processes(planned, rank, shared, num_workers, accumulation)
        else:
            loaded = _read_here(planned, rank, dataset)
        for position, step, micro_batches in loaded:
            yield LoadedStep(
                micro_batches=micro_batches,
                next_position=step.next_position,
                epochs_done=step.epochs_done,
                epoch=position.epoch,
            )


Planned = Iterator[tuple[Position, Step]]
Loaded = Iterator[tuple[Position, Step, list[PackedBatch]]]


def _read_here(planned: Planned, rank: int, dataset: PlannedDataset) -> Loaded:
    for position, step in planned:
        yield position, step, [dataset.load(items) for items in step.micro_batches(rank)]


def _read_in_processes(
    planned: Planned, rank: int, shared: SharedSlots, workers: int, accumulation: int
) -> Loaded:
    """Yield the steps with the micro-batches of a rank, which workers read ahead."""
    # steps that were given to the workers and not received yet, with their slots
    pending: collections.deque[tuple[Position, Step, list[int]]] = collections.deque()

    def tasks() -> Iterator[tuple[int, Batch]]:
        for position, step in planned:
            slots: list[int] = []
            pending.append((position, step, slots))
            for items in step.micro_batches(rank):
                slots.append(shared.free.popleft())
                yield slots[-1], items

    loader: Any = None
    try:
        with _interrupt_later():
            loader = _start_workers(shared, tasks(), workers)
        for first in loader:
            position, step, slots = pending.popleft()
            sent = [first, *itertools.islice(loader, accumulation - 1)]
            batches = []
            for slot, batch in zip(slots, sent, strict=True):
                batches.append(shared.received(slot, batch))
            yield position, step, batches
            shared.free.extend(slots)
    finally:
        # The traceback of an error keeps the loader alive. When the garbage collector frees it, its
        # queues are closed already, and it would wait 5 s for each worker.
        if loader is not None:
            loader._shutdown_workers()


def _start_workers(
    shared: SharedSlots, tasks: Iterator[tuple[int, Batch]], workers: int
) -> Iterator[Any]:
    """Fork the workers, and return the iterator over what they read, in the order of the tasks."""
    _kill_workers_at_exit()
    readers = DataLoader(
        shared,
        batch_size=None,
        sampler=tasks,  # type: ignore[arg-type]
        num_workers=workers,
        prefetch_factor=PREFETCH,
        collate_fn=_unchanged,
        worker_init_fn=functools.partial(_begin_worker, parent_of_worker()),
        multiprocessing_context="fork",  # the index and the slots are mapped, not copied
    )
    return iter(readers)


def _unchanged(batch: Any) -> Any:
    return batch


@contextlib.contextmanager
def _interrupt_later() -> Iterator[None]:
    """Raise KeyboardInterrupt at the end of the block instead of within it.

    A worker that is forked in the block ignores Ctrl-C too: an interrupted fork leaves half a
    loader, whose finalizer prints a traceback.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        yield
        return
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    if received:
        raise KeyboardInterrupt


@functools.cache  # once per process
def _kill_workers_at_exit() -> None:
    """Kill the workers when this process exits.

    A process that exits in the middle of the data sends its workers SIGTERM, which they ignore, and
    would wait for them forever.
    """
    atexit.register(_kill_workers)


def _kill_workers() -> None:
    # torch's handler would raise an error for each worker in whatever runs at exit after this
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def parent_of_worker() -> int | None:
    """Return this process's id if workers may live as long as the current thread, else None.

    The system kills a worker when the thread that forked it ends; the main thread ends last.
    """
    is_main = threading.current_thread() is threading.main_thread()
    return os.getpid() if is_main else None


def _begin_worker(parent: int | None, worker: int) -> None:
    """Prepare a worker: it ends with its parent, and holds none of its connections.

    Signals are left to the training process, which stops its workers itself. Launchers, schedulers
    and terminals signal all processes. The training process saves, and needs its workers until
    then.

    Args:
        parent: the process to end with; None: torch notices within seconds that it ended.
        worker: the worker's number, as torch passes it.
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
    prefetch: Prefetch | None,
) -> Planned:
    """Yield the steps; when a window begins, prepare it and the next one in a thread."""
    window = (-1, -1)
    for position, step in planned:
        if (position.epoch, position.window) != window:
            window = (position.epoch, position.window)
            thread.submit(_prepare, plan, position, ranks, prefetch)
        yield position, step


def _prepare(plan: Plan, position: Position, ranks: int, prefetch: Prefetch | None) -> None:
    """Prefetch the shards of this window and the next, and plan the next."""
    if prefetch is not None:
        files: list[RemoteFile] = []
        for window in range(WINDOWS_AHEAD):
            files += plan.remote_shards(position.epoch, position.window + window)
        prefetch(files)
    plan.batches(*plan.next_window(position.epoch, position.window), ranks)
