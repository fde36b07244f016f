"""The adapters of the LLM merged into it, from files, a weight at a time; or by themselves, in PEFT's form."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from asrllm.atomic import new_folder
from asrllm.checkpoints.llm_files import LLM, LlmFiles
from asrllm.checkpoints.parity import Parity, check_layers, check_parity
from asrllm.errors import UserError
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.serialization import (
    as_dtype,
    merged_parameter,
    prevailing_dtype,
    weight_source,
)
from asrllm.models.hub_files import load_tokenizer
from asrllm.models.pretrained import lora_config
from asrllm.models.state_dict import is_adapter
from asrllm.tensor_files import Spec, TensorSource, write_file, write_sharded


def merged_llm(files: LlmFiles, dtype: torch.dtype | None = None) -> TensorSource:
    """The LLM's weights by transformers' names, its adapters in it, each in the dtype that it has in the base, or in `dtype`."""
    weights, tuned = files.merged

    def pieces(name: str) -> Iterator[Tensor]:
        key, kind = LLM + name, specs[name].dtype
        if key in tuned:
            yield merged_parameter(files.layer(key), key.rpartition(".")[2], kind).flatten()
        else:
            yield files.places.read(key).to(kind).flatten()

    held = {key.removeprefix(LLM): files.places.meta[key] for key in weights}
    specs = {
        name: Spec(tuple(t.shape), dtype if dtype and t.is_floating_point() else t.dtype)
        for name, t in held.items()
    }
    return TensorSource(specs, pieces)


def merge_lora(
    files: LlmFiles,
    output: Path,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    check: bool = True,
) -> Parity | None:
    """Write a plain directory of the LLM, which transformers loads without this package; it appears when it is complete and right.

    check: compare logits; some columns of every merged weight are compared without it too.
    """
    with new_folder(output) as partial:
        write_tokenizer(
            files, partial
        )  # first: a damaged one is found before the weights are merged
        source = merged_llm(files, as_dtype(dtype))
        write_sharded(source, partial, max_shard_size=max_shard_size, what="merged LLM")
        check_layers(files, partial)
        config = AutoConfig.for_model(**(files.config.llm or {}))
        config.dtype = as_dtype(dtype) or prevailing_dtype(
            {key: files.places.meta[key] for key in files.merged[0]}, str(files.folder)
        )
        config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
        config.save_pretrained(partial)
        return check_parity(files, partial, config.dtype) if check else None


def write_tokenizer(files: LlmFiles, folder: Path) -> None:
    """Of the base model where it is read, with the chat template of the run; and the base model's generation settings."""
    home = files.base or files.folder
    tokenizer = load_tokenizer(home)
    tokenizer.chat_template = load_tokenizer(files.folder, config=files.config).chat_template
    tokenizer.save_pretrained(folder)
    name = "generation_config.json"
    homes = [home, Path((_base(files.config) or {}).get("path", home))]  # training writes none
    if settings := next((path / name for path in homes if (path / name).is_file()), None):
        shutil.copyfile(settings, folder / name)


def save_adapter(files: LlmFiles, output: Path) -> None:
    """Write the adapters in PEFT's own form: PeftModel.from_pretrained(base LLM, output).

    Raises UserError where they belong to an LLM that is not the base model any more.
    """
    if files.own_llm:
        raise UserError(
            f"the weights {str(files.weights)!r} hold weights of the LLM beside its adapters, which do not fit the base model without "
            "them: merge them (without --adapter-only), or take 'asrllm export --parts'"
        )
    with new_folder(output) as partial:
        names = [key for key in files.places.where if is_adapter(key) and key.startswith(LLM)]
        state = {
            key.removeprefix(LLM).replace(".default", ""): files.places.read(key) for key in names
        }
        write_file(weight_source(state, {}), partial / "adapter_model.safetensors")
        about = {
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "base_model_name_or_path": (_base(files.config) or {}).get("path"),
        }
        lora_config(files.config.lora or {}, **about).save_pretrained(partial)


def _base(config: AsrLlmConfig) -> dict[str, Any] | None:
    return (config.base_models or {}).get("llm")
