"""Loading an LLM under ZeRO-3: every rank reads its own part of every weight, and no rank ever has the whole of more than a few rows.

transformers reads all of it on the first rank, broadcasts it weight by weight, and tells nobody of keys that do not fit.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ContextManagers

from asrllm.errors import UserError
from asrllm.models.fingerprint import weight_files
from asrllm.models.hub_files import load_config, load_generation_config

KEY = "model.llm.pretrained_model"


def partitioned_llm(path: str, dtype: torch.dtype, attention: str) -> PreTrainedModel | None:
    """The LLM, partitioned by DeepSpeed, with its weights; None where transformers must rename the keys, or the format is another."""
    files = weight_files(path)
    if any(file.suffix != ".safetensors" for file in files):
        return None
    where = {name: file for file in files for name in _names(file)}
    llm = _empty(load_config(path, KEY), dtype, attention)
    parameters = dict(llm.named_parameters())
    stored = set(llm.state_dict())
    if not parameters.keys() <= where.keys() <= stored or any(
        _in_whole(p) for p in parameters.values()
    ):
        return None
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in _names(file) & parameters.keys():
                _fill(parameters[name], tensors.get_slice(name), f"{name!r} in {str(file)!r}")
    _fill_buffers(llm, where)
    if (Path(path) / "generation_config.json").is_file():
        llm.generation_config = load_generation_config(path)
    return llm.eval()


def _names(file: Path) -> set[str]:
    try:
        with safe_open(file, "pt") as tensors:
            return set(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"the weights {str(file)!r} cannot be read ({' '.join(str(error).split())[:160]}): download it again"
        ) from error


def _empty(config: PreTrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """As transformers builds it before it loads: partitioned, its weights not initialised, its tied weights one."""
    family = AutoModelForCausalLM._model_mapping[type(config)]
    config._attn_implementation, config.dtype = attention, dtype
    with ContextManagers(family.get_init_context(dtype, False, False, None)):
        llm = family(config)
    llm.tie_weights()
    return llm


def _in_whole(parameter: nn.Parameter) -> bool:
    """DeepSpeed holds it in another way than in equal parts in memory: swapped to a disk, or twice."""
    part = parameter.ds_tensor
    return (
        part.numel() != parameter.partition_numel()
        or getattr(parameter, "ds_secondary_tensor", None) is not None
    )


@torch.no_grad()
def _fill(parameter: nn.Parameter, source: Any, what: str) -> None:
    """This rank's part: so many elements of the flattened weight, from the rows that hold them."""
    if list(source.get_shape()) != list(parameter.ds_shape):
        raise UserError(
            f"the weight {what} has the shape {source.get_shape()}, expected {list(parameter.ds_shape)}: download it again"
        )
    part = parameter.ds_tensor
    begin = part.numel() * torch.distributed.get_rank(parameter.ds_process_group)
    end = min(begin + part.numel(), parameter.ds_numel)
    if begin >= end:
        return
    row = parameter.ds_numel // parameter.ds_shape[0]
    first = begin // row
    rows: Tensor = source[first : -(-end // row)]
    part[: end - begin].copy_(rows.reshape(-1)[begin - first * row : end - first * row])


@torch.no_grad()
def _fill_buffers(llm: PreTrainedModel, where: dict[str, Path]) -> None:
    """Buffers that a model saves; DeepSpeed leaves them whole."""
    for name, buffer in llm.named_buffers():
        if name in where:
            with safe_open(where[name], "pt") as tensors:
                buffer.copy_(tensors.get_tensor(name))
