"""The training loop."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import deepspeed
import torch
from torch import Tensor

from asrllm import distributed
from asrllm.collator.batch import PackedBatch
from asrllm.collator.loader import LoadedStep
from asrllm.data.index import RATE
from asrllm.data.plan import Position
from asrllm.errors import UserError
from asrllm.training.engine import set_lr
from asrllm.training.preemption import Preemption
from asrllm.training.run_config import TrainerConfig
from asrllm.training.schedules import lr_factor
from asrllm.training.watchdog import Watchdog

MODEL_INPUTS = (
    "waves",
    "wave_lengths",
    "input_ids",
    "position_ids",
    "cu_seqlens",
    "target_positions",
    "targets",
    "masks",
    "time_masks",
)


@dataclass(kw_only=True)
class StepSums:
    """What one rank counts in a step, or in several added up. Means are made after summing over ranks."""

    loss: float = 0.0  # nats over all targets
    correct: float = 0.0
    targets: float = 0.0
    tokens: float = 0.0  # audio and text tokens that the LLM reads
    utterances: float = 0.0
    audio_seconds: float = 0.0
    read_seconds: float = 0.0  # of audio with the padding that batching adds
    data_wait: float = 0.0  # seconds
    bad: float = 0.0  # utterances that could not be read
    skipped: float = (
        0.0  # steps that changed nothing, for want of a finite gradient; every rank counts them
    )

    def as_tensor(self) -> Tensor:
        return torch.tensor(list(vars(self).values()), dtype=torch.float64)

    @classmethod
    def from_tensor(cls, values: Tensor) -> "StepSums":
        return cls(**dict(zip(cls.__dataclass_fields__, values.tolist(), strict=True)))

    def __add__(self, other: "StepSums") -> "StepSums":
        return self.from_tensor(self.as_tensor() + other.as_tensor())

    def over_ranks(self, device: torch.device) -> "StepSums":
        return self.from_tensor(distributed.sum_over_ranks(self.as_tensor().to(device)))


class Callback:
    """Something beside the loop. Every rank calls it at every step; a hook defines what it needs of this."""

    def before_step(self, trainer: "Trainer", loaded: LoadedStep) -> None:
        """The data is there, the step is not begun."""

    def after_step(self, trainer: "Trainer", loaded: LoadedStep, sums: StepSums) -> None:
        """The step is done and counted in trainer.step."""

    def at_end(self, trainer: "Trainer") -> None:
        """All steps are done; the last hook is called first."""


@dataclass(kw_only=True)
class Trainer:
    """step: optimizer steps done; position: where the data goes on; last: whether the step just done was the last of the training.

    total_steps: where the training ends; an estimate where it ends with an epoch. preempted: whether a rank was asked to end, so that this
    step is the run's last; it is known to all ranks alike. nonfinite_keys: of this rank's utterances in the step whose loss was not finite.
    losses: of each supervised token in the step, micro-batch by micro-batch.
    """

    engine: deepspeed.DeepSpeedEngine
    config: TrainerConfig
    device: torch.device
    exp_dir: Path
    seed: int
    total_steps: int
    callbacks: Sequence[Callback] = ()
    preemption: Preemption = field(default_factory=Preemption)
    watchdog: Watchdog = field(default_factory=Watchdog)
    step: int = 0
    position: Position = field(default_factory=Position)
    last: bool = False
    preempted: bool = False
    nonfinite_keys: list[str] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    grad_norm: float | None = None
    lr: float = 0.0

    def fit(self, steps: Callable[[Position], Iterator[LoadedStep]]) -> None:
        """Train from self.step and self.position to the end. steps: the data from a position on."""
        self.engine.train()
        stream, self.last = steps(self.position), self._is_over()
        self.agree_to_end()
        while not self.ending:
            began = time.monotonic()
            self.watchdog.beat("waiting for data")
            loaded = next(stream, None)
            if loaded is None:
                raise UserError(
                    "no utterance is left to train on in these epochs: raise trainer.num_epochs, the weights, or widen data.filter"
                )
            self.position, waited = loaded.position, time.monotonic() - began
            self.watchdog.beat(
                f"in step {self.step + 1}",
                [key for batch in loaded.micro_batches for key in batch.keys],
            )
            for callback in self.callbacks:
                callback.before_step(self, loaded)
            sums = self.train_step(loaded)
            sums.data_wait = waited
            self.last = self._is_over()
            for callback in self.callbacks:
                self.watchdog.beat(f"in {type(callback).__name__} after step {self.step}")
                callback.after_step(self, loaded, sums)
        for callback in reversed(self.callbacks):
            callback.at_end(self)

    @property
    def ending(self) -> bool:
        """The step is the run's last, be the training over or not."""
        return self.last or self.preempted

    def agree_to_end(self) -> bool:
        """Whether any rank was asked to end. A collective; train_step has it in one of its own."""
        asked = torch.tensor(float(self.preemption.asked is not None), device=self.device)
        self.preempted |= bool(distributed.sum_over_ranks(asked))
        return self.preempted

    def _is_over(self) -> bool:
        """After num_steps or num_epochs, whichever comes first."""
        steps, epochs = self.config.num_steps, self.config.last_epoch
        return (steps is not None and self.step >= steps) or (
            epochs is not None and self.position.epoch >= epochs
        )

    def _schedule_step(self, loaded: LoadedStep) -> float:
        """Where in the schedule the step stands, in steps. By the share of the epochs that is done where they end the training, since how
        many steps those have is known for certain only when they are over, and changes with the number of ranks."""
        epochs = self.config.last_epoch
        if epochs is None or self.step < self.config.warmup_steps:
            return self.step
        by_epochs = loaded.before / epochs
        return max(by_epochs, self.step / (self.config.num_steps or math.inf)) * self.total_steps

    def train_step(self, loaded: LoadedStep) -> StepSums:
        """One optimizer step. The loss is the sum over all supervised tokens of all ranks and micro-batches, divided by their number."""
        seed_step(self.seed, self.step, distributed.rank())
        self.lr = self.config.lr * lr_factor(
            self.config.schedule,
            self._schedule_step(loaded),
            total=self.total_steps,
            warmup=self.config.warmup_steps,
            floor=self.config.min_lr_ratio,
            batch=self.step,
            epoch=loaded.before,
        )
        set_lr(self.engine, self.lr)
        self.engine.module.set_batch_count(self.step)
        micro_batches = [batch.to(self.device) for batch in loaded.micro_batches]
        targets = sum(len(b.targets) for b in micro_batches)
        mine = torch.tensor(
            [float(targets), float(self.preemption.asked is not None)], device=self.device
        )
        everywhere, asked = distributed.sum_over_ranks(mine)
        # DeepSpeed averages over ranks and micro-batches: undo that, and divide by the targets instead
        scale = distributed.world_size() * len(micro_batches) / everywhere.clamp(min=1)
        sums, self.nonfinite_keys, self.losses = StepSums(), [], []
        for batch in micro_batches:
            output = self.engine(**{name: getattr(batch, name) for name in MODEL_INPUTS})
            counted = count(batch, output.loss, output.correct)
            self.losses.append(output.losses)
            if not math.isfinite(counted.loss):
                counted.loss = counted.correct = counted.targets = 0.0
                self.nonfinite_keys += batch.keys
                scale = scale * math.nan  # of every gradient, by which all ranks skip the step
            self.engine.backward(output.loss * scale)
            self.engine.step()
            sums += counted
        self.step += 1
        self.preempted |= bool(asked)
        sums.skipped = float(not self.engine.was_step_applied())
        norm = self.engine.get_global_grad_norm()
        self.grad_norm = None if norm is None or sums.skipped else float(norm)
        return sums


def count(batch: PackedBatch, loss: Tensor, correct: Tensor) -> StepSums:
    return StepSums(
        loss=loss.item(),
        correct=correct.item(),
        targets=len(batch.targets),
        tokens=batch.input_ids.shape[1],
        utterances=len(batch.keys),
        audio_seconds=batch.audio_seconds,
        read_seconds=batch.waves.numel() / RATE,
        bad=len(batch.bad),
    )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout's randomness from (seed, step, rank): a resumed run draws what the uninterrupted one did, and nothing need be saved."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
