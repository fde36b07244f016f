"""Check that the merged LLM computes the same as the trained LLM with its adapters."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from asrllm.checkpoints.llm_files import LLM, LazyTensors, LlmFiles, stored_name
from asrllm.errors import UserError
from asrllm.models.asr_llm.weight_files import weight_files
from asrllm.models.meta_device import parameters_on_meta

SENTENCE = "The quick brown fox jumps over the lazy dog, and 17 others watch it."
COMPARED_COLUMNS = 64  # the number of columns of each merged weight that are compared


class Parity(NamedTuple):
    """Comparison of the merged LLM's logits (T, V) with those of the LLM and its adapters.

    The logits are in float32, and the first three values are root mean squares.

    Attributes:
        difference: size of the difference between the two.
        change: size of the change that the adapters make.
        size: size of the logits.
        same: number of positions with the same most probable token.
        tokens: number of positions T.
    """

    difference: float
    change: float
    size: float
    same: int
    tokens: int


@torch.no_grad()
def check_layers(files: LlmFiles, merged: Path) -> None:
    """Compare columns of every merged weight with what its layer and adapters compute.

    They may differ by half a step of their dtype. One layer is in memory at a time.

    Args:
        files: the LLM and its adapters.
        merged: directory of the merged LLM.

    Raises:
        UserError: a weight does not match; the message names it.
    """
    written = LazyTensors()
    for file in weight_files(merged):
        written.add_file(file, lambda key: LLM + key)
    for key in files.adapted_layers:
        if key.startswith(LLM) and key.endswith(".weight"):
            _check_layer(files, written, key)


def _check_layer(files: LlmFiles, written: LazyTensors, key: str) -> None:
    """Compare columns of one merged weight."""
    adapted = files.layer(key).float()
    plain = copy.deepcopy(files.adapted_layers[key].get_base_layer())
    prefix = key.removesuffix("weight")
    state = {name: written.read(prefix + name).float() for name, _ in plain.named_parameters()}
    plain.load_state_dict(state, assign=True)
    found = some_columns(plain, plain, adapted.in_features)
    expected = some_columns(adapted, plain, adapted.in_features)
    largest = torch.maximum(found.abs(), expected.abs())
    rounding = step(largest, written.meta[key].dtype) / 2
    # The two sides also add in another order.
    allowed = rounding + 1e-5 * expected.abs().max()
    difference = (found - expected).abs()
    if not (difference <= allowed).all():
        raise UserError(
            f"the merged {key!r} does not match its adapters: the difference is "
            f"{float(difference.max()):.3g}, but rounding explains at most "
            f"{float(allowed.max()):.3g}. The adapters are corrupted, or too large for the dtype. "
            "Average other checkpoints, or use --dtype float32."
        )


def some_columns(layer: nn.Module, plain: nn.Module, size: int) -> Tensor:
    """Compute up to COMPARED_COLUMNS columns of the weight of a layer, and its bias.

    Args:
        layer: the layer, with or without adapters.
        plain: the layer without adapters.
        size: number of inputs of the layer; for an embedding, of its rows.

    Returns:
        (COMPARED_COLUMNS + 1, outputs) with the bias last; for an embedding
        (COMPARED_COLUMNS, outputs).
    """
    picked = torch.linspace(0, size - 1, min(size, COMPARED_COLUMNS)).long()
    if isinstance(plain, nn.Embedding):
        return layer(picked)
    # A layer is affine, so a one-hot input yields a column plus the bias.
    bias = layer(torch.zeros(1, size))
    columns = layer(nn.functional.one_hot(picked, size).float()) - bias
    return torch.cat([columns, bias])


def step(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance between neighbouring numbers of a dtype.

    Args:
        values: where to measure it, in float32 and not negative.
        dtype: the dtype.
    """
    limits = torch.finfo(dtype)
    distance = limits.eps * torch.exp2(torch.frexp(values).exponent - 1.0)
    return distance.clamp(min=limits.tiny * limits.eps)


@torch.no_grad()
def check_parity(files: LlmFiles, merged: Path, dtype: torch.dtype) -> Parity:
    """Compare the logits of the merged LLM with those of the LLM and its adapters.

    Both are computed in float32, with one layer in memory at a time.

    Args:
        files: the LLM and its adapters.
        merged: directory of the merged LLM.
        dtype: dtype of the merged weights.

    Raises:
        UserError: the logits differ by more than rounding to `dtype` explains.
    """
    tokens = AutoTokenizer.from_pretrained(merged)(SENTENCE, return_tensors="pt").input_ids
    before, base = _adapted_logits(files, tokens)
    after = _merged_logits(merged, tokens)
    parity = Parity(
        difference=_root_mean_square(after - before),
        change=_root_mean_square(before - base),
        size=_root_mean_square(before),
        same=int((after.argmax(-1) == before.argmax(-1)).sum()),
        tokens=len(before),
    )
    allowed = _allowed_difference(parity, dtype)
    if not parity.difference <= allowed:
        raise UserError(
            f"the logits of the merged LLM differ by {parity.difference:.3g}. The adapters change "
            f"them by {parity.change:.3g}, and rounding to {dtype} explains {allowed:.3g}. Use "
            "--dtype float32, or write the adapters separately with --adapter-only."
        )
    return parity


def _allowed_difference(parity: Parity, dtype: torch.dtype) -> float:
    """Return the difference of the logits that rounding the weights to a dtype explains."""
    if dtype.itemsize >= 4:
        return 1e-4 * parity.size
    return max(4 * torch.finfo(dtype).eps * parity.size, parity.change / 2)


def _adapted_logits(files: LlmFiles, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits (T, V) of the LLM with its adapters, and without."""
    llm = files.model.llm.eval()

    def read(name: str) -> Tensor:
        return files.tensors.read(stored_name(LLM + name), torch.float32)

    with weights_while_run(llm, read):
        adapted = llm(input_ids=tokens, use_cache=False).logits[0]
        with llm.disable_adapter():
            base = llm(input_ids=tokens, use_cache=False).logits[0]
    return adapted, base


def _merged_logits(merged: Path, tokens: Tensor) -> Tensor:
    """Return the logits (T, V) of the merged LLM."""
    written = LazyTensors()
    for file in weight_files(merged):
        written.add_file(file, str)
    with parameters_on_meta():
        llm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(merged)).eval()
    with weights_while_run(llm, lambda name: written.read(name, torch.float32)):
        return llm(input_ids=tokens, use_cache=False).logits[0]


def _root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


@contextlib.contextmanager
def weights_while_run(model: PreTrainedModel, read: Callable[[str], Tensor]) -> Iterator[None]:
    """Give each layer of a model on the meta device its weights only while the layer runs.

    accelerate's hooks do the same. With them a 500 MB LLM whose layers have 51 MB took up to 137 MB
    of anonymous memory instead of 67.

    Args:
        model: the model.
        read: returns a weight by its name.
    """
    first_names: dict[Tensor, str] = {}  # tied weights are stored once, under the first name
    names: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names[name] = first_names.setdefault(tensor, name)

    def add_hooks(prefix: str, layer: nn.Module) -> Iterator[RemovableHandle]:
        empty = layer.state_dict(keep_vars=True)

        def fill(*_: object) -> None:
            state = {name: read(names[f"{prefix}.{name}"]) for name in empty}
            layer.load_state_dict(state, assign=True)

        def drain(*_: object) -> None:
            layer.load_state_dict(empty, assign=True)

        yield layer.register_forward_pre_hook(fill)
        yield layer.register_forward_hook(drain)

    handles = [handle for prefix, layer in layers_of(model) for handle in add_hooks(prefix, layer)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layers_of(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the LLM's layers, and the modules outside them that have weights, with their names."""
    whole = set(model._no_split_modules or ())
    inside = " "  # begins no name
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        is_layer = type(module).__name__ in whole or isinstance(module, BaseTunerLayer)
        if is_layer or any(True for _ in module.parameters(recurse=False)):
            yield name, module
            inside = f"{name}."
