"""Steps whose loss or gradient is not finite: skipped by all ranks alike, named, and after too many in a row the end of the run.

DeepSpeed skips a step whose gradient norm is not finite on any rank, and keeps weights and moments as they were: ZeRO's and the bf16
optimizers do so in every precision, a plain optimizer (stage 0 in float32) does not and is taught to here. The trainer gives a loss that is
not finite such a gradient, so that there is one decision, which the ranks share anyway.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import deepspeed
import torch

from asrllm import distributed
from asrllm.collator.loader import LoadedStep
from asrllm.errors import UserError
from asrllm.training.trainer import Callback, StepSums, Trainer

NAMED = 20  # utterances that an error names


def skip_nonfinite(engine: deepspeed.DeepSpeedEngine) -> None:
    """Make the engine skip the steps whose gradients are not finite."""
    optimizer = engine.optimizer
    if hasattr(
        optimizer, "check_grad_overflow"
    ):  # ZeRO 1 and 2; "bf16": {"check_grad_overflow": false} would let NaN pass
        optimizer.check_grad_overflow = True
    if not hasattr(optimizer, "overflow"):
        optimizer.overflow = False  # the engine reads it after the step
        optimizer.step = functools.partial(_step_if_finite, optimizer, optimizer.step)


def _step_if_finite(optimizer: Any, step: Callable[[], Any]) -> None:
    """The gradients have been summed over ranks: all come to the same decision."""
    gradients = [
        p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    optimizer.overflow = (
        bool(gradients) and not torch.stack(torch._foreach_norm(gradients)).isfinite().all().item()
    )
    if not optimizer.overflow:
        step()


class NonFiniteGuard(Callback):
    """Names the utterances of skipped steps; raises UserError after `most` such steps in a row.

    What fp16's loss scaling skips is its way of finding a scale, and no error, as long as the losses are finite.
    """

    def __init__(self, *, most: int) -> None:
        self.most, self.in_row = most, 0

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        concerned = self._concerned(trainer, loaded) if sums.skipped else None
        if concerned is None:
            self.in_row = 0
            return
        self.in_row += 1
        what, ranks = concerned
        if mine := ranks[distributed.rank()]:
            said = f"step {trainer.step} is skipped, its {what} is not finite; rank {distributed.rank()}: {' '.join(mine)}"
            print(said, file=sys.stderr, flush=True)
        if self.in_row >= self.most:
            keys = [key for rank in ranks for key in rank]
            more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
            raise UserError(
                f"the {what} was not finite in {self.in_row} steps in a row (trainer.max_nonfinite_steps), the last, {trainer.step}, with "
                f"{' '.join(keys[:NAMED])}{more}: look at these utterances, lower trainer.lr, or go on from an earlier checkpoint"
            )

    def _concerned(
        self, trainer: Trainer, loaded: LoadedStep
    ) -> tuple[str, list[list[str]]] | None:
        """What is not finite, and the keys by rank; None: nothing but fp16's scaled gradients."""
        ranks = distributed.gather_objects(trainer.nonfinite_keys)
        if any(ranks):
            return "loss", ranks
        if trainer.config.precision == "fp16":
            return None
        return "gradient", distributed.gather_objects(
            [key for batch in loaded.micro_batches for key in batch.keys]
        )
