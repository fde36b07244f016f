"""Weights by name: which are adapters, what PEFT's wrappers add to a name, and whether a state dict fits."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from asrllm.errors import UserError


def is_adapter(name: str) -> bool:
    return "lora_" in name


def plain_name(name: str) -> str:
    """A weight's name without adapters around it."""
    part, dot, rest = name.partition(".")
    return (part + dot + rest.removeprefix("base_model.model.")).replace(".base_layer.", ".")


def without_second_names(
    model: nn.Module, state: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """The state dict without a head that is tied to the embeddings: the model has it once, Auden's files and DeepSpeed's converter twice.

    Raises UserError where the two are not the same.
    """
    first, twice = dict[Tensor, str](), dict[str, str]()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        twice[name] = first.setdefault(parameter, name)
    twice = {
        name: one for name, one in twice.items() if name != one and {name, one} <= state.keys()
    }
    for name, one in twice.items():
        if not torch.equal(state[name], state[one]):
            raise UserError(
                f"{where!r}: {name!r} differs from {one!r}, to which the LLM's configuration ties it: set tie_word_embeddings to false"
            )
    return {name: tensor for name, tensor in state.items() if name not in twice}


def check_state(
    state: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    where: str,
    mend: str,
    *,
    needed: Collection[str] | None = None,
) -> None:
    """Raises UserError naming a key that is missing (of `needed`, all that are expected by default), unexpected, or of another shape."""
    if missing := sorted(set(expected if needed is None else needed) - state.keys()):
        raise UserError(f"{where} lack {len(missing)} keys, the first {missing[0]!r}: {mend}")
    if extra := sorted(state.keys() - expected.keys()):
        raise UserError(
            f"{where} have {len(extra)} unexpected keys, the first {extra[0]!r}: {mend}"
        )
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape:
            raise UserError(
                f"{where}: {key!r} has the shape {tuple(tensor.shape)}, expected {tuple(expected[key].shape)}: {mend}"
            )
