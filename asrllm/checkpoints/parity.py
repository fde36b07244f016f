"""Whether the LLM that was merged is the one that was trained."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from asrllm.checkpoints.llm_files import LLM, LlmFiles, Places, stored_name
from asrllm.errors import UserError
from asrllm.models.asr_llm.serialization import parameters_on_meta, weight_files

CHECKED = "The quick brown fox jumps over the lazy dog, and 17 others watch it."
COLUMNS = 64  # of each merged weight that are compared


class Parity(NamedTuple):
    """Logits (T, V) of the merged LLM and of the one with its adapters beside it, in float32: the root mean squares of their difference, of
    what the adapters change, and of the logits; at how many of T the same word is first.
    """

    difference: float
    change: float
    size: float
    same: int
    tokens: int


@torch.no_grad()
def check_layers(files: LlmFiles, merged: Path) -> None:
    """Some columns of every merged weight in the files of `merged` are what the layer computes with its adapters beside it, to half a
    step of their dtype. A layer at a time in memory. Raises UserError naming the weight.
    """
    found = Places()
    for file in weight_files(merged):
        found.add_file(file, lambda key: LLM + key)
    for key in (key for key in files.merged[1] if key.startswith(LLM) and key.endswith(".weight")):
        adapted, plain = (
            files.layer(key).float(),
            copy.deepcopy(files.merged[1][key].get_base_layer()),
        )
        state = {
            name: found.read(f"{key.removesuffix('weight')}{name}").float()
            for name, _ in plain.named_parameters()
        }
        plain.load_state_dict(state, assign=True)
        there, here = (
            some_columns(plain, plain, adapted.in_features),
            some_columns(adapted, plain, adapted.in_features),
        )
        allowed = (
            step(torch.maximum(there.abs(), here.abs()), found.meta[key].dtype) / 2
            + 1e-5 * here.abs().max()
        )
        if not ((there - here).abs() <= allowed).all():
            what = f"{float((there - here).abs().max()):.3g} off, where rounding makes at most {float(allowed.max()):.3g}"
            raise UserError(
                f"the merged {key!r} is not what its adapters make of it ({what}): they are damaged, or too large for the dtype; "
                "average other checkpoints, or choose --dtype float32"
            )


def some_columns(layer: nn.Module, plain: nn.Module, size: int) -> Tensor:
    """COLUMNS of the weight by which a layer of `size` inputs multiplies, and its bias. plain: the layer without adapters."""
    picked = torch.linspace(0, size - 1, min(size, COLUMNS)).long()
    if isinstance(plain, nn.Embedding):
        return layer(picked)
    bias = layer(torch.zeros(1, size))
    return torch.cat([layer(nn.functional.one_hot(picked, size).float()) - bias, bias])


def step(values: Tensor, dtype: torch.dtype) -> Tensor:
    """How far the numbers of `dtype` are apart where `values` (float32, not negative) lie."""
    kind = torch.finfo(dtype)
    return (kind.eps * torch.exp2(torch.frexp(values).exponent - 1.0)).clamp(
        min=kind.tiny * kind.eps
    )


@torch.no_grad()
def check_parity(files: LlmFiles, merged: Path, dtype: torch.dtype) -> Parity:
    """The logits of the LLM in `merged` and of the one with its adapters beside it, both computed in float32, a layer at a time in memory.

    dtype: of the merged weights. Raises UserError where they differ by more than rounding to it explains.
    """
    tokens = AutoTokenizer.from_pretrained(merged)(CHECKED, return_tensors="pt").input_ids
    llm = files.model.llm.eval()
    with weights_while_run(
        llm, lambda name: files.places.read(stored_name(LLM + name), torch.float32)
    ):
        before = llm(input_ids=tokens, use_cache=False).logits[0]
        with llm.disable_adapter():
            base = llm(input_ids=tokens, use_cache=False).logits[0]
    found = Places()
    for file in weight_files(merged):
        found.add_file(file, str)
    with parameters_on_meta():
        plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(merged)).eval()
    with weights_while_run(plain, lambda name: found.read(name, torch.float32)):
        after = plain(input_ids=tokens, use_cache=False).logits[0]
    difference, change, size = (
        float(logits.square().mean().sqrt()) for logits in (after - before, before - base, before)
    )
    parity = Parity(
        difference, change, size, int((after.argmax(-1) == before.argmax(-1)).sum()), len(before)
    )
    allowed = (
        1e-4 * size if dtype.itemsize >= 4 else max(4 * torch.finfo(dtype).eps * size, change / 2)
    )
    if not difference <= allowed:
        raise UserError(
            f"the merged LLM gives other logits: off by {difference:.3g}, where the adapters change them by {change:.3g} and rounding to "
            f"{dtype} explains {allowed:.3g}: choose --dtype float32, or leave the adapters beside the LLM with --adapter-only"
        )
    return parity


@contextlib.contextmanager
def weights_while_run(model: nn.Module, read: Callable[[str], Tensor]) -> Iterator[None]:
    """Within the block each layer of a model without weights has its own only while it runs. read: one by its name."""
    first: dict[Any, str] = {}  # of tied weights, which are stored once
    names = {
        name: first.setdefault(tensor, name)
        for name, tensor in model.state_dict(keep_vars=True).items()
    }

    def hooks(prefix: str, layer: nn.Module) -> Iterator[RemovableHandle]:
        empty = layer.state_dict(keep_vars=True)

        def fill(*_: Any) -> None:
            layer.load_state_dict(
                {name: read(names[f"{prefix}.{name}"]) for name in empty}, assign=True
            )

        def drain(*_: Any) -> None:
            layer.load_state_dict(empty, assign=True)

        yield layer.register_forward_pre_hook(fill)
        yield layer.register_forward_hook(drain)

    handles = [handle for prefix, layer in layers_of(model) for handle in hooks(prefix, layer)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layers_of(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The LLM's layers, and what has weights outside of them."""
    whole, inside = set(model._no_split_modules or ()), " "
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if (
            type(module).__name__ in whole
            or isinstance(module, BaseTunerLayer)
            or any(True for _ in module.parameters(recurse=False))
        ):
            yield name, module
            inside = f"{name}."
