"""Skips steps whose loss or gradient is not finite, and stops the run after too many in a row.

DeepSpeed skips a step whose gradient norm is not finite on any rank, and leaves weights and moments
unchanged. ZeRO's and the bf16 optimizers do so in every precision. A plain optimizer (stage 0 in
float32) does not, so this module adds it. If a loss is not finite, the trainer makes its gradients
NaN, so that there is one decision, on which the ranks agree anyway.
"""

import functools
import sys
from collections.abc import Callable, Sequence

import deepspeed
import torch

from asrllm import distributed
from asrllm.collator.loader import LoadedStep
from asrllm.errors import UserError
from asrllm.training.trainer import Callback, StepSums, Trainer

MAX_NAMED = 20  # utterances that the error names


def skip_nonfinite(engine: deepspeed.DeepSpeedEngine) -> None:
    """Make the engine skip steps whose gradients are not finite."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "check_grad_overflow"):
        # ZeRO 1 and 2: "bf16": {"check_grad_overflow": false} would let NaN pass
        optimizer.check_grad_overflow = True
    if not hasattr(optimizer, "overflow"):
        optimizer.overflow = False  # the engine reads it after the step
        optimizer.step = functools.partial(_step_if_finite, optimizer, optimizer.step)


def _step_if_finite(optimizer: torch.optim.Optimizer, step: Callable[[], object]) -> None:
    """Do the step unless a gradient is not finite.

    The gradients are summed over ranks already, so all ranks come to the same decision.
    """
    gradients = []
    for group in optimizer.param_groups:
        gradients += [p.grad for p in group["params"] if p.grad is not None]
    optimizer.overflow = False
    if gradients:
        norms = torch.stack(torch._foreach_norm(gradients))
        optimizer.overflow = not norms.isfinite().all().item()
    if not optimizer.overflow:
        step()


class NonFiniteGuard(Callback):
    """Reports the utterances of skipped steps, and stops after `max_steps` such steps in a row.

    Steps that fp16's loss scaling skips do not count as long as the losses are finite: that is how
    it finds its scale.
    """

    def __init__(self, *, max_steps: int) -> None:
        self.max_steps = max_steps
        self.in_row = 0

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        """Report a skipped step.

        Raises:
            UserError: too many steps in a row were skipped.
        """
        cause = None
        if sums.skipped:
            cause = self._find_cause(trainer, loaded)
        if cause is None:
            self.in_row = 0
            return
        self.in_row += 1
        what, keys_by_rank = cause
        rank = distributed.rank()
        own_keys = keys_by_rank[rank]
        if own_keys:
            print(
                f"step {trainer.step} is skipped, because its {what} is not finite. "
                f"Utterances of rank {rank}: {' '.join(own_keys)}",
                file=sys.stderr,
                flush=True,
            )
        if self.in_row >= self.max_steps:
            raise self._error(what, trainer.step, keys_by_rank)

    def _error(self, what: str, step: int, keys_by_rank: Sequence[Sequence[str]]) -> UserError:
        """Return the error for too many skipped steps in a row."""
        keys: list[str] = []
        for of_rank in keys_by_rank:
            keys += of_rank
        named = " ".join(keys[:MAX_NAMED])
        if len(keys) > MAX_NAMED:
            named += f" and {len(keys) - MAX_NAMED} more"
        return UserError(
            f"the {what} was not finite in {self.in_row} steps in a row "
            f"(trainer.max_nonfinite_steps={self.max_steps}). "
            f"The last one, step {step}, had the utterances {named}. "
            "Check these utterances, lower trainer.lr, or resume from an earlier checkpoint."
        )

    def _find_cause(
        self, trainer: Trainer, loaded: LoadedStep
    ) -> tuple[str, list[list[str]]] | None:
        """Return what was not finite in a skipped step, and the keys of its utterances by rank.

        Returns:
            ("loss" or "gradient", keys), or None if fp16's loss scaling skipped the step.
        """
        keys_by_rank = distributed.gather_objects(trainer.nonfinite_keys)
        if any(keys_by_rank):
            return "loss", keys_by_rank
        # fp16 finds its loss scale by skipping steps, so a gradient is not the fault of the data.
        if trainer.config.precision == "fp16":
            return None
        own_keys: list[str] = []
        for batch in loaded.micro_batches:
            own_keys += batch.keys
        return "gradient", distributed.gather_objects(own_keys)
