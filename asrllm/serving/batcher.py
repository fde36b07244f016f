"""Decode the segments of concurrent requests in one running batch."""

import logging
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch

from asrllm.evaluation.engine import BatchEngine, HalvingEngine, PendingRow, is_out_of_memory
from asrllm.models.asr_llm.generation import Answer
from asrllm.processes import release_freed_memory
from asrllm.serving.metrics import ServerMetrics

logger = logging.getLogger(__name__)
TRIM_SECONDS = 10.0  # between releases of memory, which take milliseconds


@dataclass(frozen=True, kw_only=True, eq=False)
class _Task:
    wave: np.ndarray
    prompt: str
    answer: "Future[Answer]" = field(default_factory=Future)
    submitted: float = field(default_factory=time.monotonic)

    def deliver(self, answer: Answer | Exception) -> None:
        """Give the answer to whoever waits for it, if anybody does."""
        if not self.answer.set_running_or_notify_cancel():
            return
        if isinstance(answer, Exception):
            self.answer.set_exception(answer)
        else:
            self.answer.set_result(answer)


class Batcher:
    """Decodes segments in its own thread, as many together as fit in the batch.

    Segments join the batch between two steps, in the order in which they were submitted, and leave
    it when they are done or their future is cancelled.
    """

    def __init__(self, engine: BatchEngine, *, batch_size: int, metrics: ServerMetrics) -> None:
        """Start the thread.

        Args:
            engine: decodes the batch.
            batch_size: maximum number of segments in it.
            metrics: counts segments and waiting times.
        """
        self.engine = engine
        self.batch_size = batch_size
        self.metrics = metrics
        self.threads = torch.get_num_threads()
        self.tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self.is_open = True
        self.batch = engine.open_batch()
        self.running: dict[PendingRow, _Task] = {}
        self.trimmed = time.monotonic()
        self.thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self.thread.start()

    def submit(self, wave: np.ndarray, prompt: str) -> "Future[Answer]":
        """Queue a segment, (samples,) float32 at 16 kHz, and return its future answer."""
        task = _Task(wave=wave, prompt=prompt)
        self.tasks.put(task)
        return task.answer

    def close(self) -> None:
        """End the thread after the segments that were submitted so far, and close the engine."""
        self.tasks.put(None)
        self.thread.join()
        self.engine.close()

    def _run(self) -> None:
        while self.is_open or self.running:
            newcomers = self._newcomers()
            if newcomers or self.running:
                self._advance(newcomers)

    def _advance(self, newcomers: Sequence[_Task]) -> None:
        began = time.monotonic()
        for task in newcomers:
            self.metrics.queue_seconds.observe(began - task.submitted)
        # Voice activity detection in another thread may have set the number to one.
        torch.set_num_threads(self.threads)
        try:
            self._step(newcomers)
        except Exception as error:  # the thread serves the others
            self._decode_alone(newcomers, error)
        finally:
            self.metrics.decoding_seconds.inc(time.monotonic() - began)

    def _newcomers(self) -> list[_Task]:
        """Return the segments that can join now. If nothing is running, wait for one."""
        found: list[_Task] = []
        while self.is_open and self.batch.can_join:
            is_busy = bool(self.running or found)
            is_full = len(self.running) + len(found) >= self.batch_size
            if is_full or (is_busy and self.tasks.empty()):
                break
            task = self._next_task()
            if task is None:
                self.is_open = False
            elif not task.answer.cancelled():
                found.append(task)
        return found

    def _next_task(self) -> _Task | None:
        """Wait for a task. If there is none for a while, return freed memory to the system."""
        remaining = self.trimmed + TRIM_SECONDS - time.monotonic()
        try:
            return self.tasks.get(timeout=max(remaining, 0.0))
        except queue.Empty:
            release_freed_memory()
            self.trimmed = time.monotonic()
            return self.tasks.get()

    def _step(self, newcomers: Sequence[_Task]) -> None:
        if newcomers:
            rows = self.batch.join(
                [task.wave for task in newcomers], [task.prompt for task in newcomers]
            )
            self.running.update(zip(rows, newcomers, strict=True))
        for row, task in list(self.running.items()):
            if task.answer.cancelled():
                row.is_done = True
                del self.running[row]
        if self.running:
            self.metrics.batch_size.observe(len(self.running))
        for row, answer in self.batch.step():
            self.running.pop(row).deliver(answer)

    def _decode_alone(self, newcomers: Sequence[_Task], error: Exception) -> None:
        """Decode every segment by itself, so that only the guilty one fails."""
        tasks = list(dict.fromkeys([*self.running.values(), *newcomers]))
        self.batch = self.engine.open_batch()
        self.running = {}
        if len(tasks) == 1 and not is_out_of_memory(error):
            tasks[0].deliver(error)
            return
        if is_out_of_memory(error) and len(tasks) > 1:
            self.batch_size = len(tasks) // 2
            logger.warning(
                "%d segments do not fit in memory. From now on the batch has at most %d.",
                len(tasks),
                self.batch_size,
            )
        engine = HalvingEngine(self.engine)  # it explains what does not fit in memory
        for task in tasks:
            if task.answer.cancelled():
                continue
            try:
                (answer,) = engine.answer([task.wave], [task.prompt])
                task.deliver(answer)
            except Exception as reason:  # its request raises it
                task.deliver(reason)
