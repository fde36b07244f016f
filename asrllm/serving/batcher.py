"""Decode the segments of concurrent requests in common batches."""

import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch

from asrllm.evaluation.engine import Engine, HalvingEngine
from asrllm.models.asr_llm.generation import Answer
from asrllm.serving.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class _Task:
    wave: np.ndarray
    prompt: str
    answer: "Future[Answer]" = field(default_factory=Future)
    submitted: float = field(default_factory=time.monotonic)


class Batcher:
    """Decodes segments in a thread of its own, as many together as are waiting.

    Segments are taken in the order in which they were submitted. A segment whose future is
    cancelled before its batch begins is not decoded.
    """

    def __init__(self, engine: Engine, *, batch_size: int, metrics: Metrics) -> None:
        """Start the thread.

        Args:
            engine: decodes the batches.
            batch_size: maximum number of segments of a batch.
            metrics: counts batches and waiting times.
        """
        self.engine = HalvingEngine(engine)
        self.batch_size = batch_size
        self.metrics = metrics
        self.threads = torch.get_num_threads()
        self.tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self.thread.start()

    def submit(self, wave: np.ndarray, prompt: str) -> "Future[Answer]":
        """Queue a segment, (samples,) float32 at 16 kHz, and return its future answer."""
        task = _Task(wave=wave, prompt=prompt)
        self.tasks.put(task)
        return task.answer

    def close(self) -> None:
        """End the thread after the segments that were submitted so far."""
        self.tasks.put(None)
        self.thread.join()

    def _run(self) -> None:
        is_open = True
        while is_open:
            waiting = [self.tasks.get()]
            while len(waiting) < self.batch_size and not self.tasks.empty():
                waiting.append(self.tasks.get())
            is_open = None not in waiting
            tasks = [task for task in waiting if task is not None]
            batch = [task for task in tasks if task.answer.set_running_or_notify_cancel()]
            if batch:
                self._decode(batch)

    def _decode(self, batch: list[_Task]) -> None:
        began = time.monotonic()
        for task in batch:
            self.metrics.queue_seconds.observe(began - task.submitted)
        self.metrics.batch_size.observe(len(batch))
        # Voice activity detection in another thread may have set the number to one.
        torch.set_num_threads(self.threads)
        try:
            answers = self.engine.answer(
                [task.wave for task in batch], [task.prompt for task in batch]
            )
            for task, answer in zip(batch, answers, strict=True):
                task.answer.set_result(answer)
        except Exception as error:  # each request raises it; the thread serves the others
            for task in batch:
                if not task.answer.done():
                    task.answer.set_exception(error)
        finally:
            self.metrics.decoding_seconds.inc(time.monotonic() - began)
