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
from asrllm.data.plan import Position
from asrllm.defaults import RATE
from asrllm.errors import UserError
from asrllm.training.engine import set_lr
from asrllm.training.preemption import Preemption
from asrllm.training.run_config import TrainerConfig
from asrllm.training.schedules import lr_factor
from asrllm.watchdog import Watchdog

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
    """Sums that one rank counts in one or several steps. Divide only after summing over ranks.

    Attributes:
        loss: loss in nats over all supervised tokens.
        correct: supervised tokens that were predicted correctly.
        targets: supervised tokens.
        tokens: audio and text tokens that the LLM reads.
        utterances: utterances trained on.
        audio_seconds: seconds of audio.
        padded_audio_seconds: seconds of audio including the padding within batches.
        data_wait: seconds spent waiting for data.
        unreadable: utterances that could not be read.
        skipped: steps skipped because a loss or gradient was not finite. Every rank counts them.
    """

    loss: float = 0.0
    correct: float = 0.0
    targets: float = 0.0
    tokens: float = 0.0
    utterances: float = 0.0
    audio_seconds: float = 0.0
    padded_audio_seconds: float = 0.0
    data_wait: float = 0.0
    unreadable: float = 0.0
    skipped: float = 0.0

    def as_tensor(self) -> Tensor:
        """Return the fields in order, (fields,) in float64."""
        return torch.tensor(list(vars(self).values()), dtype=torch.float64)

    @classmethod
    def from_tensor(cls, values: Tensor) -> "StepSums":
        """Build the sums from what `as_tensor` returned."""
        return cls(**dict(zip(cls.__dataclass_fields__, values.tolist(), strict=True)))

    def __add__(self, other: "StepSums") -> "StepSums":
        return self.from_tensor(self.as_tensor() + other.as_tensor())

    def over_ranks(self, device: torch.device) -> "StepSums":
        """Return the sums over all ranks. All ranks must call this."""
        return self.from_tensor(distributed.sum_over_ranks(self.as_tensor().to(device)))


class Callback:
    """Optional behaviour around the training loop.

    All ranks call every method at the same steps. Subclasses override the methods they need.
    """

    def before_step(self, trainer: "Trainer", loaded: LoadedStep) -> None:
        """Run after the data of a step was loaded, before the step itself."""

    def after_step(self, trainer: "Trainer", loaded: LoadedStep, sums: StepSums) -> None:
        """Run after a step. `trainer.step` already counts it."""

    def at_end(self, trainer: "Trainer") -> None:
        """Run after the last step, in reverse order of the callbacks."""


@dataclass(kw_only=True)
class Trainer:
    """Runs optimizer steps until the configured number of steps or epochs is reached.

    Attributes:
        engine: DeepSpeed engine around the model.
        config: `trainer` part of the run's configuration.
        device: device of this rank.
        exp_dir: directory of the run.
        seed: seed of the run.
        total_steps: number of steps of the whole run, an estimate if the run ends with an epoch.
        callbacks: callbacks in the order in which they are called.
        preemption: records signals that interrupt the run.
        watchdog: ends the process if a step hangs.
        step: optimizer steps done.
        position: position in the data after the current step.
        last: whether the current step completes the training.
        preempted: whether a rank received a signal, so that the current step is the last one of
            this process. The same on all ranks.
        nonfinite_keys: keys of this rank's utterances whose loss was not finite in this step.
        losses: loss of every supervised token in this step, one tensor per micro-batch.
        grad_norm: global gradient norm before clipping, or None if the step was skipped.
        lr: learning rate of the current step.
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

    def fit(self, open_stream: Callable[[Position], Iterator[LoadedStep]]) -> None:
        """Train from `self.step` and `self.position` to the end, watched for hangs.

        Args:
            open_stream: returns the steps of this rank from a position in the data.

        Raises:
            UserError: the epochs hold no more utterances to train on.
        """
        with self.watchdog:
            self.engine.train()
            stream = open_stream(self.position)
            self.last = self._is_complete()
            self.sync_preemption()
            while not self.stopping:
                self._fit_step(stream)
            for callback in reversed(self.callbacks):
                callback.at_end(self)

    def _fit_step(self, stream: Iterator[LoadedStep]) -> None:
        """Load the data of one step, train on it and call the callbacks."""
        wait_start = time.monotonic()
        self.watchdog.beat("waiting for data")
        loaded = next(stream, None)
        if loaded is None:
            raise UserError(
                "no utterance is left to train on in these epochs. "
                "Raise trainer.num_epochs or the weights of the corpora, or widen data.filter."
            )
        self.position = loaded.next_position
        waited = time.monotonic() - wait_start
        keys: list[str] = []
        for batch in loaded.micro_batches:
            keys += batch.keys
        self.watchdog.beat(f"in step {self.step + 1}", keys)
        for callback in self.callbacks:
            callback.before_step(self, loaded)
        sums = self.train_step(loaded)
        sums.data_wait = waited
        self.last = self._is_complete()
        for callback in self.callbacks:
            self.watchdog.beat(f"in {type(callback).__name__} after step {self.step}")
            callback.after_step(self, loaded, sums)

    @property
    def stopping(self) -> bool:
        """Whether the current step is the last one of this process."""
        return self.last or self.preempted

    def sync_preemption(self) -> bool:
        """Return whether any rank received a signal. All ranks must call this.

        `train_step` exchanges the same flag in a collective that it needs anyway.
        """
        signalled = torch.tensor(self._signalled(), device=self.device)
        self.preempted |= bool(distributed.sum_over_ranks(signalled))
        return self.preempted

    def _signalled(self) -> float:
        """Return 1 if this rank received a signal, else 0."""
        return float(self.preemption.signal_name is not None)

    def _is_complete(self) -> bool:
        """Return whether num_steps or num_epochs is reached, whichever comes first."""
        num_steps = self.config.num_steps
        last_epoch = self.config.last_epoch
        if num_steps is not None and self.step >= num_steps:
            return True
        return last_epoch is not None and self.position.epoch >= last_epoch

    def _schedule_step(self, loaded: LoadedStep) -> float:
        """Return the position in the learning-rate schedule, in steps.

        If epochs end the run, the position is the completed fraction of the epochs times
        `total_steps`: the exact number of steps is known only at the end, and it changes with the
        number of ranks.
        """
        epochs = self.config.last_epoch
        if epochs is None or self.step < self.config.warmup_steps:
            return self.step
        fraction = loaded.epochs_done / epochs
        if self.config.num_steps is not None:
            fraction = max(fraction, self.step / self.config.num_steps)
        return fraction * self.total_steps

    def _current_lr(self, loaded: LoadedStep) -> float:
        """Return the learning rate of the next step."""
        factor = lr_factor(
            self.config.schedule,
            self._schedule_step(loaded),
            total=self.total_steps,
            warmup=self.config.warmup_steps,
            floor=self.config.min_lr_ratio,
            batch=self.step,
            epoch=loaded.epochs_done,
        )
        return self.config.lr * factor

    def train_step(self, loaded: LoadedStep) -> StepSums:
        """Do one optimizer step and return this rank's sums.

        The loss is summed over the supervised tokens of all ranks and micro-batches, and divided
        by their number.
        """
        seed_step(self.seed, self.step, distributed.rank())
        self.lr = self._current_lr(loaded)
        set_lr(self.engine, self.lr)
        self.engine.module.set_batch_count(self.step)
        micro_batches = [batch.to(self.device) for batch in loaded.micro_batches]
        targets = sum(len(batch.targets) for batch in micro_batches)
        # One collective for both, so that all ranks stop after the same step.
        flags = torch.tensor([float(targets), self._signalled()], device=self.device)
        total_targets, signalled = distributed.sum_over_ranks(flags)
        # DeepSpeed averages over ranks and micro-batches. This is undone, and the sum is divided by
        # the number of targets, which is 0 in a step of fillers.
        scale = distributed.world_size() * len(micro_batches) / total_targets.clamp(min=1)
        sums = self._accumulate(micro_batches, scale)
        self.step += 1
        self.preempted |= bool(signalled)
        sums.skipped = float(not self.engine.was_step_applied())
        norm = self.engine.get_global_grad_norm()
        self.grad_norm = None
        if norm is not None and not sums.skipped:
            self.grad_norm = float(norm)
        return sums

    def _accumulate(self, micro_batches: Sequence[PackedBatch], scale: Tensor) -> StepSums:
        """Run forward and backward for every micro-batch; the engine steps after the last one.

        A loss that is not finite makes every gradient NaN, so that all ranks skip the step. The
        losses are read once, after the loop, because reading waits for the device.

        Args:
            micro_batches: this rank's micro-batches, on its device.
            scale: (), factor on the summed loss.
        """
        self.losses = []
        counts: list[Tensor] = []
        for batch in micro_batches:
            output = self.engine(**{name: getattr(batch, name) for name in MODEL_INPUTS})
            loss = output.loss.detach().float()
            counts.append(torch.stack([loss, output.correct.float()]))
            self.losses.append(output.losses)
            scale = scale.where(output.loss.isfinite(), math.nan)
            self.engine.backward(output.loss * scale)
            self.engine.step()
        sums = StepSums()
        self.nonfinite_keys = []
        rows = torch.stack(counts).tolist()
        for batch, (loss, correct) in zip(micro_batches, rows, strict=True):
            counted = count(batch, loss, correct)
            if not math.isfinite(loss):
                counted.loss = 0.0
                counted.correct = 0.0
                counted.targets = 0.0
                self.nonfinite_keys += batch.keys
            sums += counted
        return sums


def count(batch: PackedBatch, loss: float, correct: float) -> StepSums:
    """Return the sums of one micro-batch.

    Args:
        batch: the micro-batch.
        loss: loss in nats over its supervised tokens.
        correct: supervised tokens that were predicted correctly.
    """
    return StepSums(
        loss=loss,
        correct=correct,
        targets=len(batch.targets),
        tokens=batch.input_ids.shape[1],
        utterances=len(batch.keys),
        audio_seconds=batch.audio_seconds,
        padded_audio_seconds=batch.waves.numel() / RATE,
        unreadable=len(batch.bad),
    )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generator for dropout from (seed, step, rank).

    A resumed run therefore draws the same masks without saving the generator's state.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
