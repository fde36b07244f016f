"""Whisper's weights: Hugging Face directories (safetensors or pytorch_model.bin, in one file or several) and OpenAI's own .pt files."""

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from asrllm.errors import UserError
from asrllm.integrity import verify_weights
from asrllm.models.encoders.zipformer.weights import DAMAGED, load_tensors
from asrllm.models.hub_files import check_kind, check_plain
from asrllm.text_files import read_json_object

KEY = "model.audio_encoder.pretrained_model"
FIELDS = (
    "num_mel_bins",
    "d_model",
    "encoder_layers",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "max_source_positions",
)
# the hub's large models hold a second copy, model.fp32-*: the plain names come first; safetensors before others, as in fingerprints
FILES = (
    "model.safetensors",
    "model-*.safetensors",
    "*.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*.bin",
)
DIMS = {
    "num_mel_bins": "n_mels",
    "d_model": "n_audio_state",
    "encoder_layers": "n_audio_layer",
    "encoder_attention_heads": "n_audio_head",
    "max_source_positions": "n_audio_ctx",
}
# OpenAI's names, below `encoder.`, and transformers'
TOP = {"conv1": "conv1", "conv2": "conv2", "ln_post": "layer_norm"}
BLOCK = {
    "attn.query": "self_attn.q_proj",
    "attn.key": "self_attn.k_proj",
    "attn.value": "self_attn.v_proj",
    "attn.out": "self_attn.out_proj",
    "attn_ln": "self_attn_layer_norm",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
    "mlp_ln": "final_layer_norm",
}


def read_whisper(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The encoder's fields and its weights by transformers' names, with no prefix."""
    return read_openai(path) if path.is_file() else read_directory(path)


def read_openai(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:  # mapped where the format allows: the decoder is most of the file
        verify_weights(file)
        content = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except (*DAMAGED, OSError) as error:
        raise UserError(
            f"{KEY}={str(file)!r} cannot be read as plain tensors ({' '.join(str(error).split())[:160]}): download it again"
        ) from error
    dims, state = (
        content.get(name) if isinstance(content, dict) else None
        for name in ("dims", "model_state_dict")
    )
    if not isinstance(dims, dict) or not isinstance(state, dict):
        raise UserError(
            f"{KEY}={str(file)!r} is no file of OpenAI's Whisper (no 'dims' with 'model_state_dict'): give one, or a Hugging Face directory"
        )
    if absent := [name for name in DIMS.values() if name not in dims]:
        raise UserError(
            f"{KEY}={str(file)!r} has no {absent[0]!r} in its 'dims': download it again"
        )
    fields = {field: dims[name] for field, name in DIMS.items()}
    check_fields(fields, file)
    fields["encoder_ffn_dim"] = 4 * fields["d_model"]
    return fields, from_openai(
        {k: v for k, v in state.items() if k.startswith("encoder.")}, str(file)
    )


def from_openai(state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The encoder's weights by transformers' names. Raises UserError naming a key that is not known."""
    renamed = {}
    for key, tensor in state.items():
        if key == "encoder.positional_embedding":
            renamed["embed_positions.weight"] = tensor
            continue
        match = re.fullmatch(r"encoder\.(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", key)
        number, name, kind = match.groups() if match else (None, "", "")
        table, head = (TOP, "") if number is None else (BLOCK, f"layers.{number}.")
        if name not in table:
            raise UserError(
                f"{KEY}={where!r} has {key!r}, which no Whisper encoder of OpenAI's has: check that it is one"
            )
        renamed[f"{head}{table[name]}.{kind}"] = tensor
    return renamed


def read_directory(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    check_kind(folder, KEY)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{KEY}={str(folder)!r} has no config.json: give a Hugging Face Whisper directory, or OpenAI's .pt file itself"
        )
    config = read_json_object(folder / "config.json", "the encoder's configuration")
    check_plain(config, folder / "config.json")
    if config.get("model_type") != "whisper":
        raise UserError(
            f"{KEY}={str(folder)!r} is a {config.get('model_type')!r} model, not whisper: set model.audio_encoder.model_type to match"
        )
    state = {}
    for file in weight_files(folder):
        for key, tensor in encoder_tensors(file).items():
            head, found, name = key.partition("encoder.")
            if found and head in ("", "model."):
                state[name] = tensor
    if not state:
        raise UserError(
            f"{KEY}={str(folder)!r} has no weights of an encoder (no key starts with 'model.encoder.'): download it again"
        )
    if absent := [field for field in FIELDS if field not in config]:
        raise UserError(f"{str(folder / 'config.json')!r} has no {absent[0]!r}: download it again")
    fields = {field: config[field] for field in FIELDS}
    check_fields(fields, folder / "config.json")
    return fields, state


def check_fields(fields: dict[str, Any], path: Path) -> None:
    """Raise UserError if a size of the encoder is not a positive whole number, or the heads do not fit."""
    for name, value in fields.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(
                f"{str(path)!r}: {name}={value!r} is not a whole number above 0. Correct it."
            )
    width, heads = fields["d_model"], fields["encoder_attention_heads"]
    if width % heads:
        raise UserError(
            f"{str(path)!r}: d_model={width} is not a multiple of encoder_attention_heads={heads}. Correct them."
        )


def weight_files(folder: Path) -> list[Path]:
    for pattern in FILES:
        if found := sorted(folder.glob(pattern)):
            return found
    raise UserError(
        f"{KEY}={str(folder)!r} has no weights (none of {', '.join(FILES)}): download it again"
    )


def encoder_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that may be the encoder's; of safetensors the others are not read."""
    if file.suffix == ".bin":
        return load_tensors(file)
    try:
        verify_weights(file)
        with safe_open(file, "pt") as tensors:
            return {key: tensors.get_tensor(key) for key in tensors.keys() if "encoder." in key}  # noqa: SIM118 (not a mapping)
    except (*DAMAGED, OSError) as error:
        raise UserError(
            f"{str(file)!r} cannot be read ({' '.join(str(error).split())[:160]}): download it again"
        ) from error
