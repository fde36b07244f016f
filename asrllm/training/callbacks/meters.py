"""Measurements that a log record adds to the sums of the steps.

Each rank collects its own values. When a record is due, one collective gives them to all ranks.
"""

import resource
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from asrllm import distributed
from asrllm.collator.loader import LoadedStep
from asrllm.models.flops import Flops
from asrllm.training.trainer import Callback, StepSums, Trainer

Values = dict[str, float | int]  # metrics by name
STRAGGLER_FACTOR = 1.2  # times the median
NOISE = 0.02  # ratio of the interval's duration; smaller differences do not count
INTERVALS_IN_A_ROW = 3


class Meter(Callback):
    """Collects values on this rank between two log records."""

    def take(self) -> Any:
        """Return what this rank collected, and start the next interval."""

    def record(self, everywhere: Sequence[Any], seconds: float) -> Values:
        """Return the metrics of an interval.

        Args:
            everywhere: what `take` returned, by rank.
            seconds: duration of the interval on this rank.
        """
        raise NotImplementedError


class Rate(Meter):
    """TFLOP/s of a device, and their ratio to its peak if that is known."""

    def __init__(self, flops: Flops, peak_tflops: float | None) -> None:
        """Create the meter.

        Args:
            flops: operations of the model.
            peak_tflops: peak dense bf16 TFLOP/s of a device, or None if unknown.
        """
        self.flops = flops
        self.peak = peak_tflops
        self.done = 0.0

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        """Count the operations of a step."""
        self.done += sum(
            self.flops.of_batch(batch.wave_lengths, batch.cu_seqlens, len(batch.targets))
            for batch in loaded.micro_batches
        )

    def take(self) -> float:
        """Return this rank's operations."""
        done = self.done
        self.done = 0.0
        return done

    def record(self, everywhere: Sequence[float], seconds: float) -> Values:
        """Return `tflops`, and `mfu` if the peak is known."""
        tflops = sum(everywhere) / len(everywhere) / seconds / 1e12
        values: Values = {"tflops": float(f"{tflops:.4g}")}
        if self.peak:
            values["mfu"] = float(f"{tflops / self.peak:.4g}")
        return values


class CorpusLosses(Meter):
    """Mean loss of each corpus over the tokens that the loss is made of."""

    def __init__(self, names: Sequence[str]) -> None:
        """Take the names of the corpora in order."""
        self.names = names
        self.sums = torch.zeros(len(names), 2, dtype=torch.float64)  # nats, supervised tokens

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        """Add the losses of a step to the corpora of their utterances."""
        for batch, losses in zip(loaded.micro_batches, trainer.losses, strict=True):
            values = losses.double().cpu()
            if not values.sum().isfinite():  # the loss excludes it as well
                continue
            ends = batch.cu_seqlens[1:].long()
            utterances = torch.bucketize(batch.target_positions, ends, right=True)
            corpora = torch.tensor(batch.corpora)[utterances]
            ones = torch.ones_like(values)
            self.sums.index_add_(0, corpora, torch.stack([values, ones], 1))

    def take(self) -> list[list[float]]:
        """Return [nats, supervised tokens] of each corpus on this rank."""
        sums = self.sums.tolist()
        self.sums = torch.zeros_like(self.sums)
        return sums

    def record(self, everywhere: Sequence[list[list[float]]], seconds: float) -> Values:
        """Return `loss/{corpus}` of the corpora that were trained on."""
        losses, targets = torch.tensor(everywhere, dtype=torch.float64).sum(0).unbind(1)
        values: Values = {}
        for name, loss, count in zip(self.names, losses, targets, strict=True):
            if count:
                values[f"loss/{name}"] = float(loss / count)
        return values


class PeakMemory(Meter):
    """Peak memory of the device, or of the process on a CPU."""

    def take(self) -> float:
        """Return this rank's peak so far in GB."""
        accelerator = get_accelerator()
        if accelerator.device_name() != "cpu":
            return accelerator.max_memory_allocated() / 1e9
        unit = 1 if sys.platform == "darwin" else 1024  # bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

    def record(self, everywhere: Sequence[float], seconds: float) -> Values:
        """Return `memory_gb` of the rank with the most."""
        return {"memory_gb": round(max(everywhere), 3)}


class Stragglers(Meter):
    """Finds ranks that wait longer for data, or take longer for their steps, than the others.

    A rank is reported once if it is slow in INTERVALS_IN_A_ROW intervals.
    """

    def __init__(self) -> None:
        self.wait = 0.0
        self.steps = 0.0
        self.step_start = 0.0
        self.late: Counter[tuple[str, int]] = Counter()  # intervals in a row by activity and rank

    def before_step(self, trainer: Trainer, loaded: LoadedStep) -> None:
        """Start to time a step."""
        self.step_start = time.monotonic()

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        """Add the times of a step."""
        self.wait = self.wait + sums.data_wait
        self.steps = self.steps + time.monotonic() - self.step_start

    def take(self) -> tuple[str, float, float]:
        """Return (host, seconds waited for data, seconds in steps)."""
        own = (socket.gethostname(), self.wait, self.steps)
        self.wait = 0.0
        self.steps = 0.0
        return own

    def record(self, everywhere: Sequence[tuple[str, float, float]], seconds: float) -> Values:
        """Return `data_wait_max` and `slowest_rank`, and report stragglers."""
        hosts, waits, steps = zip(*everywhere, strict=True)
        self._report("waits for data", waits, hosts, seconds)
        self._report("is in its steps", steps, hosts, seconds)
        slowest = max(range(len(waits)), key=waits.__getitem__)
        return {"data_wait_max": round(waits[slowest] / seconds, 4), "slowest_rank": slowest}

    def _report(
        self, activity: str, values: Sequence[float], hosts: Sequence[str], seconds: float
    ) -> None:
        """Print the ranks that become stragglers in this interval.

        Args:
            activity: what the times were spent on, for the message.
            values: seconds by rank.
            hosts: host names by rank.
            seconds: duration of the interval.
        """
        median = statistics.median(values)
        for rank, value in enumerate(values):
            if value > STRAGGLER_FACTOR * median and value - median > NOISE * seconds:
                self.late[activity, rank] += 1
            else:
                self.late[activity, rank] = 0
            if self.late[activity, rank] == INTERVALS_IN_A_ROW and distributed.rank() == 0:
                print(
                    f"rank {rank} on {hosts[rank]} {activity} longer than the others in "
                    f"{INTERVALS_IN_A_ROW} consecutive log intervals: {value:.3g} s in the last "
                    f"one, where the median is {median:.3g} s. Check that host.",
                    file=sys.stderr,
                    flush=True,
                )
