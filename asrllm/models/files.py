"""A model's directory on disk: what save_pretrained writes, and loading it back, strict about keys."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor

from asrllm.errors import UserError
from asrllm.models.configuration import AsrLlmConfig
from asrllm.models.fingerprint import check_fingerprint
from asrllm.models.model import AsrLlmModel
from asrllm.models.parts import pretrained_encoder, pretrained_llm
from asrllm.models.processor import AsrLlmProcessor


def save_model(model: AsrLlmModel, folder: Path) -> None:
    """See AsrLlmModel.save_pretrained."""
    folder.mkdir(parents=True, exist_ok=True)
    model.require_processor().save_pretrained(folder)
    model.llm.generation_config.save_pretrained(folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    left_out = tuple(f"{part}." for part in model.config.exclude_from_checkpoint or [])
    state = {k: v for k, v in model.weights().items() if not k.startswith(left_out) or "lora_" in k}
    save_torch_state_dict(state, folder)


def load_directory(path: str | Path, *, dtype: Any = None) -> AsrLlmModel:
    """See AsrLlmModel.from_pretrained."""
    files = sorted(Path(path).glob("model*.safetensors"))
    if not files:
        raise UserError(f"{str(path)!r} holds no model*.safetensors: give a directory written by save_pretrained or 'asrllm export'")
    state: dict[str, Tensor] = {}
    for file in files:
        state |= load_file(file)
    return load_model(path, state, dtype=dtype)


def load_model(path: str | Path, state: Mapping[str, Tensor], *, dtype: Any = None) -> AsrLlmModel:
    """The model described in directory `path` with the weights `state`; parts that `state` leaves out come from the base models.

    Raises UserError naming a missing, unexpected or wrong-shaped key, or a base model that is not the one of training.
    """
    config = AsrLlmConfig.from_pretrained(path)
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    dtype = dtype if isinstance(dtype, torch.dtype) else next(iter(state.values())).dtype
    encoder, llm = None, None
    if not any(k.startswith("audio_encoder.") for k in state):
        encoder = pretrained_encoder(config, base_path(config, "audio_encoder"))
    if not any(k.startswith("llm.") and "lora_" not in k for k in state):
        llm = pretrained_llm(base_path(config, "llm"), dtype)
    model = AsrLlmModel(config, audio_encoder=encoder, llm=llm)
    given = tuple(f"{part}." for part, module in (("audio_encoder", encoder), ("llm", llm)) if module is not None)
    state = scalars_again(model, state)
    check_keys(model, state, from_base=given, where=str(path))
    model.load_state_dict(state, strict=False)
    model.llm.tie_weights()
    model.processor = AsrLlmProcessor.from_pretrained(path)
    return model.to(dtype).eval()


def scalars_again(model: AsrLlmModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with the model's scalars as such: training holds them as vectors of one element."""
    scalars = {name for name, tensor in model.weights().items() if tensor.dim() == 0}
    return {name: tensor.reshape(()) if name in scalars and tensor.numel() == 1 else tensor for name, tensor in state.items()}


def check_keys(model: AsrLlmModel, state: Mapping[str, Tensor], *, from_base: tuple[str, ...], where: str) -> None:
    expected = {k: v for k, v in model.weights().items() if not k.startswith(from_base) or "lora_" in k}
    if missing := sorted(expected.keys() - state.keys()):
        raise UserError(f"the weights of {where!r} lack {len(missing)} keys, the first {missing[0]!r}: they are of another model")
    if extra := sorted(state.keys() - expected.keys()):
        raise UserError(f"the weights of {where!r} have {len(extra)} unexpected keys, the first {extra[0]!r}: they are of another model")
    for key, tensor in expected.items():
        if tensor.shape != state[key].shape:
            raise UserError(f"the weights of {where!r}: {key!r} has the shape {tuple(state[key].shape)}, expected {tuple(tensor.shape)}")


def base_path(config: AsrLlmConfig, part: str) -> str:
    base = (config.base_models or {}).get(part)
    if base is None:
        raise UserError(f"the weights leave out the {part}, and config.json names no base model for it: export the whole model")
    check_fingerprint(part, base["path"], base["fingerprint"])
    return base["path"]
