"""What a log record says beside the sums of the steps: every rank's part is given to all in one collective, when a record is due."""

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

Values = dict[str, Any]
EXCESS = 1.2  # times the median
NOTICED = 0.02  # of the interval's time: less is noise
IN_A_ROW = 3  # intervals


class Meter(Callback):
    """Collects on this rank; take() gives what was collected and begins anew; record() makes values of what all ranks gave.

    seconds: the interval's, on this rank.
    """

    def take(self) -> Any:
        """This rank's part."""

    def record(self, everywhere: Sequence[Any], seconds: float) -> Values:
        raise NotImplementedError


class Rate(Meter):
    """TFLOP/s of a device, and their share of its peak where that is known."""

    def __init__(self, flops: Flops, peak_tflops: float | None) -> None:
        self.flops, self.peak, self.done = flops, peak_tflops, 0.0

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        self.done += sum(
            self.flops.of_batch(b.wave_lengths, b.cu_seqlens, len(b.targets))
            for b in loaded.micro_batches
        )

    def take(self) -> float:
        done, self.done = self.done, 0.0
        return done

    def record(self, everywhere: Sequence[float], seconds: float) -> Values:
        tflops = sum(everywhere) / len(everywhere) / seconds / 1e12
        return {"tflops": float(f"{tflops:.4g}")} | (
            {"mfu": float(f"{tflops / self.peak:.4g}")} if self.peak else {}
        )


class CorpusLosses(Meter):
    """The mean loss of each corpus, of what the loss was made of."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.sums = torch.zeros(len(names), 2, dtype=torch.float64)  # nats, supervised tokens

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        for batch, losses in zip(loaded.micro_batches, trainer.losses, strict=True):
            values = losses.double().cpu()
            if not values.sum().isfinite():  # it is not in the loss either
                continue
            utterances = torch.bucketize(
                batch.target_positions, batch.cu_seqlens[1:].long(), right=True
            )
            corpora = torch.tensor(batch.corpora)[utterances]
            self.sums.index_add_(0, corpora, torch.stack([values, torch.ones_like(values)], 1))

    def take(self) -> list[list[float]]:
        sums, self.sums = self.sums.tolist(), torch.zeros_like(self.sums)
        return sums

    def record(self, everywhere: Sequence[list[list[float]]], seconds: float) -> Values:
        loss, targets = torch.tensor(everywhere, dtype=torch.float64).sum(0).unbind(1)
        return {
            f"loss/{name}": float(x / n)
            for name, x, n in zip(self.names, loss, targets, strict=True)
            if n
        }


class PeakMemory(Meter):
    def take(self) -> float:
        accelerator = get_accelerator()
        if accelerator.device_name() == "cpu":
            return (
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                * (1 if sys.platform == "darwin" else 1024)
                / 1e9
            )
        return accelerator.max_memory_allocated() / 1e9

    def record(self, everywhere: Sequence[float], seconds: float) -> Values:
        return {"memory_gb": round(max(everywhere), 3)}


class Stragglers(Meter):
    """Who waits longest for data; and who takes longer than the others over and over, in waiting or in the steps, told once each time."""

    def __init__(self) -> None:
        self.wait = self.steps = self.began = 0.0
        self.late: Counter[tuple[str, int]] = Counter()  # intervals in a row, by what and rank

    def before_step(self, trainer: Trainer, loaded: LoadedStep) -> None:
        self.began = time.monotonic()

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        self.wait, self.steps = (
            self.wait + sums.data_wait,
            self.steps + time.monotonic() - self.began,
        )

    def take(self) -> tuple[str, float, float]:
        mine = (socket.gethostname(), self.wait, self.steps)
        self.wait = self.steps = 0.0
        return mine

    def record(self, everywhere: Sequence[tuple[str, float, float]], seconds: float) -> Values:
        hosts, waits, steps = zip(*everywhere, strict=True)
        for what, values in (("waits for data", waits), ("is in its steps", steps)):
            self._look(what, values, hosts, seconds)
        slowest = max(range(len(waits)), key=waits.__getitem__)
        return {"data_wait_max": round(waits[slowest] / seconds, 4), "slowest_rank": slowest}

    def _look(
        self, what: str, values: Sequence[float], hosts: Sequence[str], seconds: float
    ) -> None:
        median = statistics.median(values)
        for rank, value in enumerate(values):
            late = value > EXCESS * median and value - median > NOTICED * seconds
            self.late[what, rank] = self.late[what, rank] + 1 if late else 0
            if self.late[what, rank] == IN_A_ROW and distributed.rank() == 0:
                print(
                    f"rank {rank} on {hosts[rank]} {what} longer than the others, {IN_A_ROW} log intervals in a row: {value:.3g} s in the "
                    f"last, the median is {median:.3g} s",
                    file=sys.stderr,
                    flush=True,
                )
