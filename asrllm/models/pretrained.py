"""The model's parts by themselves: an encoder or an LLM with pretrained weights or without, adapters on it."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from asrllm.errors import UserError
from asrllm.models.asr_llm.checks import indexed_files
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.attention import PACKED, register_packed_attention
from asrllm.models.encoders.registry import build_encoder, encoder_class
from asrllm.models.state_dict import check_state
from asrllm.models.zero3_loading import partitioned_llm
from asrllm.text_files import reading


def pretrained_encoder(config: AsrLlmConfig, path: str) -> nn.Module:
    """The encoder with a base model's weights. Raises UserError naming a key that is missing, unexpected or of another shape."""
    fields = config.audio_encoder or {}
    _, state = encoder_class(fields["model_type"]).read_pretrained(path)
    encoder = cast(nn.Module, build_encoder(fields, pad_to_30s=config.pad_to_30s))
    check_encoder_state(state, encoder, path)
    encoder.load_state_dict(state)
    return encoder


def check_encoder_state(state: Mapping[str, Tensor], encoder: nn.Module, path: str) -> None:
    """Raise UserError if a key of the encoder's weights is missing, unexpected or of another shape."""
    where = f"the encoder's weights at model.audio_encoder.pretrained_model={path!r}"
    fix = "download it again, or give the model that its configuration describes"
    check_state(state, encoder.state_dict(), where, fix)


def pretrained_llm(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """Under a live HfDeepSpeedConfig of stage 3, every rank keeps its partition alone.

    Raises UserError for files that cannot be read, for a missing, unexpected or wrong-shaped key, and for a family that cannot be packed.
    """
    for index in Path(path).glob("*.index.json"):
        indexed_files(index)  # transformers would load whatever file it names
    attention = register_packed_attention()
    if (
        is_deepspeed_zero3_enabled()
        and (llm := partitioned_llm(path, dtype, attention)) is not None
    ):
        return check_family(llm)
    with reading(path, "the LLM", "Download it again."):
        llm, found = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    for what in (
        "missing",
        "unexpected",
        "mismatched",
    ):  # mismatched: of another shape; (key, shape, shape)
        if keys := sorted(key if isinstance(key, str) else key[0] for key in found[f"{what}_keys"]):
            raise UserError(
                f"the LLM {path!r} has {len(keys)} {what} keys, the first {keys[0]}: download it again"
            )
    return check_family(llm)


def check_family(llm: PreTrainedModel) -> PreTrainedModel:
    """Raises UserError where the utterances of a packed row would see each other."""
    kinds = set(getattr(llm.config.get_text_config(), "layer_types", None) or []) - {
        "full_attention",
        "sliding_attention",
    }
    if llm._is_stateful or not llm._supports_attention_backend or kinds:
        what = f"layers of the kind {min(kinds)!r}" if kinds else "an attention of its own"
        raise UserError(
            f"the LLM is a {llm.config.model_type!r} model with {what}, which cannot be packed: take a Qwen, Llama or Gemma"
        )
    return llm


def empty_llm(
    fields: dict[str, Any],
    dtype: torch.dtype | None = None,
    *,
    where: str | Path = "config.json",
) -> PreTrainedModel:
    """Return an LLM without its weights.

    Args:
        fields: the LLM's own config.json.
        dtype: the dtype of its weights; by default the one in `fields`.
        where: the file or directory that `fields` were read from, for the error message.

    Raises:
        UserError: no LLM can be built from the fields, or the family is not supported.
    """
    register_packed_attention()
    given = {} if dtype is None else {"dtype": dtype}
    with reading(
        where,
        "the LLM's configuration (llm in config.json) of",
        "Copy the config.json that was saved with the model.",
    ):
        config = AutoConfig.for_model(**fields)
        llm = AutoModelForCausalLM.from_config(
            config, attn_implementation=PACKED, trust_remote_code=False, **given
        )
    return check_family(llm)


def with_lora(llm: PreTrainedModel, options: dict[str, Any]) -> nn.Module:
    """The LLM inside PEFT's wrapper. options: of PEFT's LoraConfig."""
    from peft import get_peft_model

    with _explained("model.llm.lora"):
        return get_peft_model(llm, lora_config(options, task_type="CAUSAL_LM"))


def add_lora(module: nn.Module, options: dict[str, Any], *, key: str) -> None:
    """Adapters in a module that is no transformers model, without a wrapper around it."""
    from peft import inject_adapter_in_model

    with _explained(key):
        inject_adapter_in_model(lora_config(options), module)


def lora_config(options: dict[str, Any], **more: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**options, **more)


def layer_without_bias(model: nn.Module) -> str | None:
    """The first layer that has no bias while its adapter has one (PEFT's lora_bias): the two cannot be merged."""
    for name, layer in model.named_modules():
        if (
            any(getattr(layer, "lora_bias", {}).values())
            and getattr(layer.get_base_layer(), "bias", None) is None
        ):
            return name
    return None


@contextlib.contextmanager
def _explained(key: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UserError(f"{key} does not fit: {' '.join(str(error).split())}") from error
