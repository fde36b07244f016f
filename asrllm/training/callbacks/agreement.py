"""Whether all ranks are about to do the same step: where they are not, collectives hang or mix up without a word."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from asrllm import distributed
from asrllm.collator.loader import LoadedStep
from asrllm.errors import UserError
from asrllm.training.trainer import Callback, Trainer


class RankCheck(Callback):
    """Compares the ranks before every step."""

    def before_step(self, trainer: Trainer, loaded: LoadedStep) -> None:
        check_same_step(trainer.step + 1, distributed.gather_objects(signature(trainer, loaded)))


def signature(trainer: Trainer, loaded: LoadedStep) -> dict[str, Any]:
    """What has to be the same on all ranks. A filler has no targets, and is the only thing without."""
    batches = loaded.micro_batches
    training = str(
        [name for name, module in trainer.engine.module.named_modules() if module.training]
    )
    return {
        "step": trainer.step + 1,
        "position in the data": loaded.position.as_dict(),
        "number of micro-batches": len(batches),
        "micro-batches with audio": [i for i, b in enumerate(batches) if b.waves.numel()],
        "micro-batches without the targets they should have": [
            i for i, b in enumerate(batches) if b.keys and not len(b.targets)
        ],
        "tensors' dtypes": {
            name: str(v.dtype)
            for b in batches
            for name, v in vars(b).items()
            if isinstance(v, torch.Tensor)
        },
        "modules in training mode": hashlib.blake2b(training.encode(), digest_size=4).hexdigest(),
    }


def check_same_step(step: int, everywhere: Sequence[dict[str, Any]]) -> None:
    """Raises UserError, on every rank alike, that names what differs, the values and who has them."""
    told = []
    for what in everywhere[0]:
        ranks: dict[str, list[int]] = {}
        for rank, mine in enumerate(everywhere):
            ranks.setdefault(str(mine[what]), []).append(rank)
        if len(ranks) > 1:
            said = "; ".join(
                f"{value} on rank {', '.join(map(str, those))}" for value, those in ranks.items()
            )
            told.append(f"{what}: {said}")
    if told:
        raise UserError(
            f"the ranks differ before step {step} in {' | '.join(told)}: start all of them with the same command, code and data"
        )
