"""Merge adapters into the weights of the layers that they change."""

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from asrllm.errors import UserError
from asrllm.models.asr_llm.network import AsrLlmNetwork
from asrllm.models.pretrained import layer_without_bias
from asrllm.models.state_dict import StateDict, plain_name
from asrllm.tensor_files import Spec, TensorSource

WITHOUT_MERGING = "Save without merging (asrllm export: --keep-adapters)."


def merged_names(
    model: AsrLlmNetwork, state: Mapping[str, Tensor]
) -> tuple[StateDict, dict[str, nn.Module]]:
    """Rename weights to their names in the model without adapters.

    Args:
        model: the model with adapters.
        state: its weights.

    Returns:
        The renamed state without the adapters, and the layers whose adapters change it, by the key
        of the changed weight.

    Raises:
        UserError: the model has no adapters, an adapted part is excluded from the checkpoint, or a
            layer cannot represent the merged adapter.
    """
    layers = adapted_layers(model)
    _check_mergeable(model, state, layers)
    factors = _adapter_keys(layers)
    renamed = {plain_name(key): tensor for key, tensor in state.items() if key not in factors}
    return renamed, _tuned_weights(layers)


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that have adapters by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            layers[name] = module
    return layers


def _adapter_keys(layers: Mapping[str, nn.Module]) -> set[str]:
    """Return the keys of the adapters' own weights."""
    factors: set[str] = set()
    for name, layer in layers.items():
        keys = [key for key, _ in layer.named_parameters(name)]
        factors.update(key for key in keys if not is_base_layer(key, name))
    return factors


def _tuned_weights(layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the adapted layers by the plain names of the weights that the adapters change."""
    tuned: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        tuned[plain_name(f"{name}.base_layer.weight")] = layer
        if any(getattr(layer, "lora_bias", {}).values()):
            tuned[plain_name(f"{name}.base_layer.bias")] = layer
    return tuned


def _check_mergeable(
    model: AsrLlmNetwork, state: Mapping[str, Tensor], layers: Mapping[str, nn.Module]
) -> None:
    if not layers:
        raise UserError("merge_adapter=True, but the model has no adapters. Save it without.")
    for part in model.config.exclude_from_checkpoint or []:
        if any(name.startswith(f"{part}.") for name in layers):
            raise UserError(
                f"the adapters cannot be merged into the {part}, because "
                f"exclude_from_checkpoint excludes the {part}. {WITHOUT_MERGING}"
            )
    for key in state:
        if ".modules_to_save." in key or ".token_adapter." in key:
            raise UserError(
                f"{key!r} is trained beside the adapted layers and cannot be "
                f"merged. {WITHOUT_MERGING}"
            )
    biased = layer_without_bias(model)
    if biased:
        raise UserError(
            f"the adapter of {biased!r} has a bias (lora_bias), but the layer "
            f"has none. {WITHOUT_MERGING}"
        )
    _check_untied(model, layers)


def _check_untied(model: AsrLlmNetwork, layers: Mapping[str, nn.Module]) -> None:
    """Raise UserError if adapted embeddings are tied to the head."""
    head = model.causal_lm.get_output_embeddings().weight
    is_tied = head is model.causal_lm.get_input_embeddings().weight
    if is_tied and any(layer.get_base_layer().weight is head for layer in layers.values()):
        raise UserError(
            "merging the adapter of the embeddings would change the head, which is "
            f"tied to them. {WITHOUT_MERGING}"
        )


def is_base_layer(key: str, layer: str) -> bool:
    """Return whether a key belongs to the base layer inside the adapted layer `layer`."""
    return key.startswith(f"{layer}.base_layer.")


@torch.no_grad()
def merged_parameter(layer: nn.Module, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return a parameter of the base layer with the adapters merged into it.

    The merge is computed in at least float32 and rounded once. The layer does not change.

    Args:
        layer: the adapted layer.
        name: "weight" or "bias".
        dtype: dtype of the result; by default the parameter's own.
    """
    own = getattr(layer.get_base_layer(), name).dtype
    # PEFT merges in place and in the dtype of the layer.
    layer = copy.deepcopy(layer).to(torch.promote_types(own, torch.float32))
    layer.merge()
    return getattr(layer.get_base_layer(), name).to(dtype or own).contiguous()


def weight_source(state: Mapping[str, Tensor], tuned: Mapping[str, nn.Module]) -> TensorSource:
    """Return a state dict in the form that the writers take.

    Args:
        state: the weights.
        tuned: by key, the layer whose adapters are merged into the weight when it is written.
    """

    def pieces(key: str) -> Iterator[Tensor]:
        tensor = state[key]
        if key in tuned:
            tensor = merged_parameter(tuned[key], key.rpartition(".")[2])
        yield tensor.flatten()

    specs: dict[str, Spec] = {}
    for key, tensor in state.items():
        specs[key] = Spec(tuple(tensor.shape), tensor.dtype)
    return TensorSource(specs, pieces)
