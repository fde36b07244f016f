"""Load an LLM under ZeRO-3: every rank reads its own partition of every weight.

No rank ever holds more than a few rows of a whole weight. transformers reads everything on the
first rank, broadcasts it weight by weight, and does not report keys that do not fit.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ContextManagers

from asrllm.defaults import LLM_KEY
from asrllm.errors import UserError
from asrllm.models.fingerprint import pretrained_weight_files
from asrllm.models.hub_files import load_generation_config, load_hf_config
from asrllm.models.plain_tensors import open_tensors


def partitioned_llm(path: str, dtype: torch.dtype, attention: str) -> PreTrainedModel | None:
    """Return an LLM with its weights, partitioned by DeepSpeed.

    Args:
        path: the LLM's directory.
        dtype: dtype of the weights.
        attention: name of the attention implementation.

    Returns:
        The LLM, or None if transformers must rename the keys or the weights are not safetensors.
    """
    files = pretrained_weight_files(path)
    if any(file.suffix != ".safetensors" for file in files):
        return None
    keys = {file: _keys(file) for file in files}
    file_of = {key: file for file in files for key in keys[file]}
    llm = _uninitialized_llm(load_hf_config(path, LLM_KEY), dtype, attention)
    parameters = dict(llm.named_parameters())
    saved = set(llm.state_dict())
    if not parameters.keys() <= file_of.keys() <= saved:
        return None
    if not all(_is_evenly_partitioned(p) for p in parameters.values()):
        return None
    for file in files:
        with open_tensors(file) as tensors:
            for name in keys[file] & parameters.keys():
                what = f"{name!r} in {str(file)!r}"
                _fill_partition(parameters[name], tensors.get_slice(name), what)
    _fill_buffers(llm, file_of)
    if (Path(path) / "generation_config.json").is_file():
        llm.generation_config = load_generation_config(path)
    return llm.eval()


def _keys(file: Path) -> set[str]:
    with open_tensors(file) as tensors:
        return set(tensors.keys())


def _uninitialized_llm(
    config: PreTrainedConfig, dtype: torch.dtype, attention: str
) -> PreTrainedModel:
    """Build the LLM as transformers does before loading: partitioned and not initialized."""
    family = AutoModelForCausalLM._model_mapping[type(config)]
    config._attn_implementation = attention
    config.dtype = dtype
    # what from_pretrained enters: with ZeRO-3, deepspeed.zero.Init among others
    with ContextManagers(family.get_init_context(dtype, False, False, None)):
        llm = family(config)
    llm.tie_weights()
    return llm


def _is_evenly_partitioned(parameter: nn.Parameter) -> bool:
    """Return whether DeepSpeed holds a parameter once, in equal partitions in memory.

    Otherwise it is swapped to a disk, or has a secondary copy.
    """
    has_copy = getattr(parameter, "ds_secondary_tensor", None) is not None
    return parameter.ds_tensor.numel() == parameter.partition_numel() and not has_copy


@torch.no_grad()
def _fill_partition(parameter: nn.Parameter, source: Tensor, what: str) -> None:
    """Read this rank's partition from the rows that contain it.

    Args:
        parameter: the partitioned parameter. A partition is a range of the flattened weight.
        source: the whole weight in the file, from which slices can be read.
        what: a name of the weight, for error messages.
    """
    shape = list(source.get_shape())
    expected = list(parameter.ds_shape)
    if shape != expected:
        raise UserError(
            f"the weight {what} has the shape {shape}, expected {expected}. Download it again."
        )
    partition = parameter.ds_tensor
    begin = partition.numel() * torch.distributed.get_rank(parameter.ds_process_group)
    end = min(begin + partition.numel(), parameter.ds_numel)
    # This rank has nothing but padding.
    if begin >= end:
        return
    row_size = parameter.ds_numel // parameter.ds_shape[0]
    first_row = begin // row_size
    last_row = -(-end // row_size)  # exclusive
    offset = first_row * row_size
    rows: Tensor = source[first_row:last_row]
    partition[: end - begin].copy_(rows.reshape(-1)[begin - offset : end - offset])


@torch.no_grad()
def _fill_buffers(llm: PreTrainedModel, file_of: dict[str, Path]) -> None:
    """Read the saved buffers, which DeepSpeed does not partition."""
    for name, buffer in llm.named_buffers():
        if name in file_of:
            with open_tensors(file_of[name]) as tensors:
                buffer.copy_(tensors.get_tensor(name))
