"""The model's parts by themselves: an encoder or an LLM with pretrained weights or without, adapters on it."""

from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from asrllm.errors import UserError
from asrllm.models.attention import PACKED, register_packed_attention
from asrllm.models.configuration import AsrLlmConfig
from asrllm.models.encoders import build_encoder, encoder_class


def pretrained_encoder(config: AsrLlmConfig, path: str) -> nn.Module:
    """The encoder with a base model's weights; strict about keys."""
    fields = config.audio_encoder or {}
    _, state = encoder_class(fields["model_type"]).read_pretrained(path)
    encoder = cast(nn.Module, build_encoder(fields, pad_to_30s=config.pad_to_30s))
    encoder.load_state_dict(state)
    return encoder


def pretrained_llm(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """Under a live HfDeepSpeedConfig of stage 3, every rank keeps its partition alone."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=register_packed_attention())


def empty_llm(fields: dict[str, Any], dtype: torch.dtype | None = None) -> PreTrainedModel:
    """An LLM without its weights, from its config.json. dtype: as config.json says when None."""
    register_packed_attention()
    config = AutoConfig.for_model(**fields)
    return AutoModelForCausalLM.from_config(config, attn_implementation=PACKED, **({"dtype": dtype} if dtype else {}))


def with_lora(llm: PreTrainedModel, options: dict[str, Any]) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    try:
        return get_peft_model(llm, LoraConfig(task_type="CAUSAL_LM", **options))
    except ValueError as error:
        raise UserError(f"model.llm.lora does not fit the LLM: {' '.join(str(error).split())}") from error
