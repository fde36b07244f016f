"""The running average of the trained weights, kept by each rank for its own partition.

The arithmetic is icefall's (Povey et al., `use_averaged_model`): every `period` steps the average, in float64, moves to the mean over the
training so far, average * (1 - period / step) + weights * period / step.
"""

from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from asrllm import distributed
from asrllm.training.checkpoint.partitions import fill, partitions
from asrllm.training.checkpoint.zero_files import AVERAGE, ZeroFiles, average_file, load_file


class RunningAverage:
    """period: steps between two updates. At stage 0, where all ranks hold the same, the first one keeps it."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, *, period: int) -> None:
        self.engine, self.period = engine, period
        self.keeps = engine.zero_optimization_stage() > 0 or distributed.rank() == 0
        self.averages = [
            vector.detach().to("cpu", torch.float64, copy=True) for vector in self._vectors()
        ]

    def _vectors(self) -> list[Tensor]:
        return [vector for vector, _ in partitions(self.engine)] if self.keeps else []

    def update(self, step: int) -> None:
        """After step 1, 2, ..."""
        if step % self.period == 0:
            for average, vector in zip(self.averages, self._vectors(), strict=True):
                average.mul_(1 - self.period / step).add_(
                    vector.detach().to("cpu", torch.float64), alpha=self.period / step
                )

    def files(self) -> dict[str, Any]:
        """What a checkpoint holds of it, by file name."""
        return {average_file(distributed.rank()): {AVERAGE: self.averages}} if self.keeps else {}

    def load(self, checkpoint: Path, manifest: dict[str, Any]) -> None:
        """From a checkpoint of any number of ranks."""
        if (
            manifest["world_size"] == distributed.world_size()
            or self.engine.zero_optimization_stage() == 0
        ):
            saved = (
                load_file(checkpoint / average_file(distributed.rank()))[AVERAGE]
                if self.keeps
                else []
            )
            for average, tensor in zip(self.averages, saved, strict=True):
                average.copy_(tensor)
            return
        files = ZeroFiles(checkpoint, manifest)
        for average, (_, segments) in zip(self.averages, partitions(self.engine), strict=True):
            fill(average, segments, files, AVERAGE)
