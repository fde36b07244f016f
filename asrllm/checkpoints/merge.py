"""Write an LLM with its adapters merged, one weight at a time, or the adapters in PEFT's format."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from asrllm.atomic import new_folder
from asrllm.checkpoints.llm_files import LLM, LlmFiles
from asrllm.checkpoints.parity import Parity, check_layers, check_parity
from asrllm.defaults import MAX_SHARD_SIZE
from asrllm.errors import UserError
from asrllm.integrity import write_checksums
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.merging import merged_parameter, weight_source
from asrllm.models.asr_llm.placement import as_dtype, prevailing_dtype
from asrllm.models.hub_files import load_tokenizer
from asrllm.models.pretrained import lora_config
from asrllm.models.state_dict import is_adapter
from asrllm.progress import waiting
from asrllm.tensor_files import Spec, TensorSource, write_file, write_sharded
from asrllm.text_files import JsonObject

GENERATION_CONFIG = "generation_config.json"


def merged_llm(files: LlmFiles, dtype: torch.dtype | None = None) -> TensorSource:
    """Return the LLM's weights with merged adapters, by the names of transformers.

    Args:
        files: the LLM and its adapters.
        dtype: dtype of floating-point weights; default: the dtype that each has in the base model.
    """
    specs: dict[str, Spec] = {}
    for key in files.merged_weights:
        tensor = files.tensors.meta[key]
        weight_dtype = tensor.dtype
        if dtype and tensor.is_floating_point():
            weight_dtype = dtype
        specs[key.removeprefix(LLM)] = Spec(tuple(tensor.shape), weight_dtype)

    def pieces(name: str) -> Iterator[Tensor]:
        key = LLM + name
        weight_dtype = specs[name].dtype
        if key in files.adapted_layers:
            parameter = key.rpartition(".")[2]
            yield merged_parameter(files.layer(key), parameter, weight_dtype).flatten()
        else:
            yield files.tensors.read(key).to(weight_dtype).flatten()

    return TensorSource(specs, pieces)


def merge_lora(
    files: LlmFiles,
    output: Path,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    check: bool = True,
) -> Parity | None:
    """Write the merged LLM as a directory that transformers loads without this package.

    The directory appears when it is complete and checked.

    Args:
        files: the LLM and its adapters.
        output: the directory to write.
        dtype: dtype of the weights; default: that of each weight in the base model.
        max_shard_size: maximum size of each file.
        check: compare the logits of the merged LLM with those of the LLM and its adapters. Some
            columns of every merged weight are compared in any case.

    Returns:
        The comparison of the logits; None without it.

    Raises:
        UserError: the merged weights do not match, or the output is not empty.
    """
    with new_folder(output) as partial:
        # first, so that a corrupted tokenizer is found before the weights are merged
        write_tokenizer(files, partial)
        chosen_dtype = as_dtype(dtype)
        source = merged_llm(files, chosen_dtype)
        write_sharded(source, partial, max_shard_size=max_shard_size, what="merged LLM")
        with waiting("checking the merged weights"):
            check_layers(files, partial)
        config = AutoConfig.for_model(**(files.config.llm or {}))
        weights = {key: files.tensors.meta[key] for key in files.merged_weights}
        config.dtype = chosen_dtype or prevailing_dtype(weights, str(files.folder))
        config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
        config.save_pretrained(partial)
        write_checksums(partial)
        if not check:
            return None
        with waiting("comparing the logits before and after the merge"):
            return check_parity(files, partial, config.dtype)


def write_tokenizer(files: LlmFiles, folder: Path) -> None:
    """Write the tokenizer with the run's chat template, and the generation settings.

    Both come from the base model if its weights are read.
    """
    home = files.base or files.folder
    tokenizer = load_tokenizer(home)
    tokenizer.chat_template = load_tokenizer(files.folder, config=files.config).chat_template
    tokenizer.save_pretrained(folder)
    base = _base_model(files.config) or {}
    # a run does not have the generation settings, so the base model's path is tried too
    for directory in (home, Path(base.get("path", home))):
        settings = directory / GENERATION_CONFIG
        if settings.is_file():
            shutil.copyfile(settings, folder / GENERATION_CONFIG)
            return


def save_adapter(files: LlmFiles, output: Path) -> None:
    """Write the adapters in PEFT's format, for PeftModel.from_pretrained(base LLM, output).

    Args:
        files: the LLM and its adapters.
        output: the directory to write.

    Raises:
        UserError: the LLM was trained too, so the adapters do not fit the base model.
    """
    if files.own_llm:
        raise UserError(
            f"the weights {str(files.weights)!r} contain weights of the LLM beside its adapters, "
            "so the adapters do not fit the base model. Merge them without --adapter-only, or use "
            "'asrllm export --parts'."
        )
    with new_folder(output) as partial:
        state: dict[str, Tensor] = {}
        for key in files.tensors.sources:
            if is_adapter(key) and key.startswith(LLM):
                name = key.removeprefix(LLM).replace(".default", "")
                state[name] = files.tensors.read(key)
        write_file(weight_source(state, {}), partial / "adapter_model.safetensors")
        base = _base_model(files.config) or {}
        config = lora_config(
            files.config.lora or {},
            task_type="CAUSAL_LM",
            inference_mode=True,
            base_model_name_or_path=base.get("path"),
        )
        config.save_pretrained(partial)


def _base_model(config: AsrLlmConfig) -> JsonObject | None:
    return (config.base_models or {}).get("llm")
