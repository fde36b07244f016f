"""Checks before every step that all ranks are about to do the same step.

If they are not, collectives hang or mix up data without an error.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from asrllm import distributed
from asrllm.collator.loader import LoadedStep
from asrllm.errors import UserError
from asrllm.training.trainer import Callback, Trainer

Signature = dict[str, object]  # what must be the same on all ranks, by description


class RankCheck(Callback):
    """Compares the ranks before every step."""

    def before_step(self, trainer: Trainer, loaded: LoadedStep) -> None:
        """Raise UserError on all ranks if they differ."""
        check_same_step(trainer.step + 1, distributed.gather_objects(signature(trainer, loaded)))


def _digest_of_training_modules(model: nn.Module) -> str:
    training = str([name for name, module in model.named_modules() if module.training])
    return hashlib.blake2b(training.encode(), digest_size=4).hexdigest()


def signature(trainer: Trainer, loaded: LoadedStep) -> Signature:
    """Return what must be the same on all ranks.

    Only fillers, which have no keys, may lack targets.
    """
    with_audio = []
    without_targets = []
    dtypes = {}
    for index, batch in enumerate(loaded.micro_batches):
        if batch.waves.numel():
            with_audio.append(index)
        if batch.keys and not len(batch.targets):
            without_targets.append(index)
        for name, value in vars(batch).items():
            if isinstance(value, torch.Tensor):
                dtypes[name] = str(value.dtype)
    return {
        "step": trainer.step + 1,
        "position in the data": loaded.position.as_dict(),
        "number of micro-batches": len(loaded.micro_batches),
        "micro-batches with audio": with_audio,
        "micro-batches that lack targets": without_targets,
        "dtypes of the tensors": dtypes,
        "modules in training mode": _digest_of_training_modules(trainer.engine.module),
    }


def check_same_step(step: int, everywhere: Sequence[Signature]) -> None:
    """Compare the signatures of all ranks.

    Args:
        step: number of the next step.
        everywhere: signatures by rank.

    Raises:
        UserError: they differ. The message names what differs, the values and their ranks.
    """
    differences = []
    for what in everywhere[0]:
        ranks: dict[str, list[int]] = {}
        for rank, values in enumerate(everywhere):
            ranks.setdefault(str(values[what]), []).append(rank)
        if len(ranks) > 1:
            found = [f"{value} on rank {', '.join(map(str, ranks[value]))}" for value in ranks]
            differences.append(f"{what}: {'; '.join(found)}")
    if differences:
        raise UserError(
            f"the ranks differ before step {step} in {' | '.join(differences)}. "
            "Start all of them with the same command, code and data."
        )
