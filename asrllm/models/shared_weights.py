"""Share the memory of weights that several models have in common."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def share_weights(model: nn.Module, others: Iterable[nn.Module]) -> int:
    """Let a model use the weights of other models wherever they equal its own bit for bit.

    Models that adapt the same LLM then hold it once. All of them must be frozen.

    Args:
        model: the model that gives up its own tensors.
        others: models whose weights have the same names.

    Returns:
        The number of bytes that the model does not hold any more.
    """
    freed = 0
    for other in others:
        theirs = dict(other.named_parameters())
        for name, weight in model.named_parameters():
            same = theirs.get(name)
            if same is not None and _is_copy(weight, same):
                freed += weight.nbytes
                weight.data = same.data
    return freed


def _is_copy(weight: Tensor, other: Tensor) -> bool:
    """Return whether two tensors at different addresses have the same bits."""
    if weight.data_ptr() == other.data_ptr() or weight.device != other.device:
        return False
    if weight.dtype != other.dtype or weight.shape != other.shape:
        return False
    if not (weight.is_contiguous() and other.is_contiguous()):
        return False
    return torch.equal(_bits(weight), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a contiguous tensor; as numbers, NaN differs from itself."""
    return tensor.detach().reshape(-1).view(torch.uint8)
