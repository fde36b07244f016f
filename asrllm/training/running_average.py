"""Running average of the trained weights. Each rank averages its own partition.

The arithmetic is icefall's (Povey et al., `use_averaged_model`): every `period` steps the average,
in float64, moves to the mean over the training so far:
average * (1 - period / step) + weights * period / step.
"""

from pathlib import Path

import deepspeed
import torch
from torch import Tensor

from asrllm import distributed
from asrllm.training.checkpoint.manifest import Manifest
from asrllm.training.checkpoint.partitions import fill, partitions
from asrllm.training.checkpoint.zero_files import AVERAGE, ZeroFiles, average_file, load_file


class RunningAverage:
    """Running average of this rank's master weights, in float64 in host memory.

    At stage 0 all ranks hold the same weights, so only the first one averages them.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, *, period: int) -> None:
        """Start from the engine's current weights.

        Args:
            engine: DeepSpeed engine with the optimizer.
            period: steps between two updates.
        """
        self.engine = engine
        self.period = period
        self.active = engine.zero_optimization_stage() > 0 or distributed.rank() == 0
        self.averages: list[Tensor] = []
        for vector in self._vectors():
            self.averages.append(vector.detach().to("cpu", torch.float64, copy=True))

    def _vectors(self) -> list[Tensor]:
        """Return this rank's float32 master vectors, or none if it does not average."""
        if not self.active:
            return []
        return [vector for vector, _ in partitions(self.engine)]

    def update(self, step: int) -> None:
        """Update the average after a step, counted from 1, if one is due."""
        if step % self.period == 0:
            for average, vector in zip(self.averages, self._vectors(), strict=True):
                weights = vector.detach().to("cpu", torch.float64)
                # At the first update the factor is 0: the initial weights do not count.
                average.mul_(1 - self.period / step)
                average.add_(weights, alpha=self.period / step)

    def files(self) -> dict[str, dict[str, list[Tensor]]]:
        """Return the contents of this rank's files in a checkpoint, by file name."""
        if not self.active:
            return {}
        return {average_file(distributed.rank()): {AVERAGE: self.averages}}

    def load(self, checkpoint: Path, manifest: Manifest) -> None:
        """Load the average from a checkpoint of any number of ranks."""
        same_ranks = manifest["world_size"] == distributed.world_size()
        if same_ranks or self.engine.zero_optimization_stage() == 0:
            self._load_own_file(checkpoint)
            return
        files = ZeroFiles(checkpoint, manifest)
        parts = partitions(self.engine)
        for average, (_, slices) in zip(self.averages, parts, strict=True):
            fill(average, slices, files, AVERAGE)

    def _load_own_file(self, checkpoint: Path) -> None:
        if not self.active:
            return
        saved = load_file(checkpoint / average_file(distributed.rank()))[AVERAGE]
        for average, tensor in zip(self.averages, saved, strict=True):
            average.copy_(tensor)
