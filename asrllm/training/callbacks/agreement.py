"""Checks that all ranks have the same settings, and are about to do the same step.

If they are not, collectives hang, or mix up data and weights, without an error.
"""

import hashlib

import torch
from torch import nn

from asrllm import distributed
from asrllm.collator.loader import LoadedStep
from asrllm.distributed import Signature
from asrllm.training.trainer import Callback, Trainer


class RankCheck(Callback):
    """Compares the ranks before every step."""

    def before_step(self, trainer: Trainer, loaded: LoadedStep) -> None:
        """Raise UserError on all ranks if they differ."""
        when = f"before step {trainer.step + 1}"
        distributed.check_same(when, distributed.gather_objects(signature(trainer, loaded)))


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
        "position in the data": loaded.next_position.as_dict(),
        "number of micro-batches": len(loaded.micro_batches),
        "micro-batches with audio": with_audio,
        "micro-batches that lack targets": without_targets,
        "dtypes of the tensors": dtypes,
        "modules in training mode": _digest_of_training_modules(trainer.engine.module),
    }
