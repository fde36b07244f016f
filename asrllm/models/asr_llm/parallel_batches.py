"""Decode batches at the same time on the CPU.

An operation on several cores waits for the slowest of its threads. Beside another process it
therefore takes twice as long, although only one core is busy. Batches on cores of their own do not
wait for each other.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

PARALLEL = 2  # each batch reads all weights for every token, so that more would wait for memory
Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel_batches(device: torch.device, *, samples: bool) -> int:
    """Return how many batches a model decodes at the same time.

    Args:
        device: its device.
        samples: whether tokens are drawn at random. Then it is one batch, because threads take
            numbers from the random generator in any order.
    """
    has_cores = device.type == "cpu" and torch.get_num_threads() >= PARALLEL
    # torch.autocast holds for one thread
    return PARALLEL if has_cores and not samples and not torch.is_autocast_enabled("cpu") else 1


def map_batches(
    function: Callable[[Item], Result], items: Iterable[Item], parallel: int
) -> Iterator[Result]:
    """Yield the results of a function in the order of the items.

    Args:
        function: decodes a batch. If `parallel` is above 1, it runs in another thread, in which
            gradients are enabled (torch.no_grad holds for one thread).
        items: the batches. One more than `parallel` is taken ahead.
        parallel: number of batches that are decoded at the same time, which share the cores.
    """
    if parallel <= 1:
        yield from map(function, items)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // parallel))
    pending: collections.deque[Future[Result]] = collections.deque()
    try:
        with ThreadPoolExecutor(parallel, "decoder") as pool:
            try:
                for item in items:
                    pending.append(pool.submit(function, item))
                    if len(pending) > parallel:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()
    finally:
        torch.set_num_threads(threads)
