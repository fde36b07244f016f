"""Names of weights: adapters, PEFT's wrappers, tied weights, and whether a state dict fits."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from asrllm.errors import UserError
from asrllm.tensor_files import WEIGHT_DTYPES, is_finite

DIVERGED = (
    "The training diverged. Use the weights of an earlier checkpoint, or train again with a lower "
    "trainer.lr."
)
NOT_QUANTIZED = "Give weights that are not quantized."
StateDict: TypeAlias = dict[str, Tensor]


def is_adapter(name: str) -> bool:
    """Return whether a weight belongs to a LoRA adapter."""
    return "lora_" in name


def plain_name(name: str) -> str:
    """Return the name that a weight has in the model without adapters."""
    part, dot, rest = name.partition(".")
    return (part + dot + rest.removeprefix("base_model.model.")).replace(".base_layer.", ".")


def without_second_names(model: nn.Module, state: Mapping[str, Tensor], where: str) -> StateDict:
    """Return a state dict without the second names of tied weights.

    The model has a head that is tied to the embeddings once. Auden's files and DeepSpeed's
    converter contain it twice.

    Args:
        model: the model.
        state: its weights.
        where: the directory or file of the weights, for the error message.

    Raises:
        UserError: two tied weights differ.
    """
    second_names = _second_names(model, state)
    for name, first in second_names.items():
        if not torch.equal(state[name], state[first]):
            raise UserError(
                f"{where!r}: {name!r} differs from {first!r}, but the LLM's configuration ties "
                "them. Set tie_word_embeddings to false."
            )
    return {name: tensor for name, tensor in state.items() if name not in second_names}


def _second_names(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the first name of a tied weight by its second name, if `state` has both."""
    first_names: dict[Tensor, str] = {}
    second_names: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(parameter, name)
        if name != first and name in state and first in state:
            second_names[name] = first
    return second_names


def check_dense(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Check that weights of torch.save are dense, because models and writers expect flat bytes.

    Args:
        state: the weights; on the meta device if only their layout is known.
        path: their file.

    Raises:
        UserError: a weight is sparse or nested.
    """
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_nested:
            layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            raise UserError(
                f"the weight {name!r} in {str(path)!r} has the layout {layout}. Save it as a dense "
                "tensor, with tensor.to_dense() for a sparse one."
            )


def check_stored_values(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Check that a file of torch.save has a dense tensor with values for every weight.

    Raises:
        UserError: a weight is sparse or nested, or was saved from the meta device.
    """
    check_dense(state, path)
    for name, tensor in state.items():
        if tensor.is_meta:
            raise UserError(
                f"the weight {name!r} in {str(path)!r} was saved from the meta device, without "
                "values. Save it again after the model is loaded."
            )


def check_finite(name: str, tensor: Tensor, path: str | Path, fix: str = DIVERGED) -> None:
    """Check that a weight is finite, because NaN would become empty or random texts.

    Args:
        name: name of the weight.
        tensor: the weight, or a part of it.
        path: the file or checkpoint with the weight.
        fix: the end of the error message.

    Raises:
        UserError: the weight contains NaN or infinite values.
    """
    if not is_finite(tensor):
        raise UserError(
            f"the weight {name!r} in {str(path)!r} contains NaN or infinite values. {fix}"
        )


def check_state(
    state: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    what: str,
    fix: str,
    *,
    needed: Collection[str] | None = None,
) -> None:
    """Check the keys and shapes of a state dict.

    Args:
        state: the weights.
        expected: weights of the expected keys and shapes.
        what: a name of the weights in the plural, which begins the error message.
        fix: a sentence that ends the error message.
        needed: keys that `state` must contain; by default all expected ones.

    Raises:
        UserError: a key is missing, unexpected or has another shape, or a weight is quantized.
    """
    missing = sorted(set(expected if needed is None else needed) - state.keys())
    if missing:
        raise UserError(f"{what} lack {counted('key', missing)}. {fix}")
    extra = sorted(state.keys() - expected.keys())
    if extra:
        raise UserError(f"{what} have {counted('unexpected key', extra)}. {fix}")
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape:
            raise UserError(
                f"{what}: {key!r} has the shape {tuple(tensor.shape)}, expected "
                f"{tuple(expected[key].shape)}. {fix}"
            )
        if expected[key].is_floating_point() and tensor.dtype not in WEIGHT_DTYPES:
            raise UserError(f"{what}: {key!r} has the dtype {tensor.dtype}. {NOT_QUANTIZED}")


def counted(noun: str, names: Sequence[str]) -> str:
    """Return "1 key 'a'" or "3 keys (first: 'a')"."""
    if len(names) == 1:
        return f"1 {noun} {names[0]!r}"
    return f"{len(names)} {noun}s (first: {names[0]!r})"
