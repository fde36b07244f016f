"""Parameters that ZeRO-3 partitions."""

import contextlib

from torch import nn


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Return whether ZeRO-3 partitions a parameter, so that this rank has only a part of it."""
    return hasattr(parameter, "ds_id")


def gathered(
    parameter: nn.Parameter, *, change: bool = False
) -> contextlib.AbstractContextManager[None]:
    """Gather a parameter inside the block, if ZeRO-3 partitions it.

    Args:
        parameter: the parameter.
        change: whether changes inside the block are written to the partitions.
    """
    if not is_partitioned(parameter):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if change else None)
