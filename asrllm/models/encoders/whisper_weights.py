"""Read the weights of Whisper's encoder.

Supported are Hugging Face directories (safetensors or pytorch_model.bin, in one file or several)
and OpenAI's own .pt files.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from asrllm.defaults import ENCODER_KEY
from asrllm.errors import UserError
from asrllm.integrity import verify_folder
from asrllm.models.encoders.zipformer.weights import load_tensors
from asrllm.models.hub_files import DOWNLOAD_AGAIN, check_kind, check_not_quantized
from asrllm.models.plain_tensors import load_plain_tensors, open_tensors
from asrllm.models.state_dict import StateDict, check_stored_values
from asrllm.text_files import JsonObject, read_json_object

WHISPER_FIELDS = (
    "num_mel_bins",
    "d_model",
    "encoder_layers",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "max_source_positions",
)
# The hub's large models contain a second copy, model.fp32-*, so that the plain names come first.
# safetensors come before other formats, as in fingerprints.
WHISPER_PATTERNS = (
    "model.safetensors",
    "model-*.safetensors",
    "*.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*.bin",
)
# transformers' field: OpenAI's name in "dims"
DIMS = {
    "num_mel_bins": "n_mels",
    "d_model": "n_audio_state",
    "encoder_layers": "n_audio_layer",
    "encoder_attention_heads": "n_audio_head",
    "max_source_positions": "n_audio_ctx",
}
# OpenAI's name below `encoder.`: transformers' name
TOP_NAMES = {"conv1": "conv1", "conv2": "conv2", "ln_post": "layer_norm"}
# OpenAI's name below `encoder.blocks.N.`: transformers' name
BLOCK_NAMES = {
    "attn.query": "self_attn.q_proj",
    "attn.key": "self_attn.k_proj",
    "attn.value": "self_attn.v_proj",
    "attn.out": "self_attn.out_proj",
    "attn_ln": "self_attn_layer_norm",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
    "mlp_ln": "final_layer_norm",
}
OPENAI_KEY = re.compile(r"encoder\.(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)")


def read_whisper(path: Path) -> tuple[JsonObject, StateDict]:
    """Return the encoder's fields, and its weights by transformers' names without a prefix.

    Args:
        path: a Hugging Face directory, or OpenAI's .pt file.

    Raises:
        UserError: the files are corrupted, or are not a Whisper model.
    """
    if path.is_file():
        return read_openai(path)
    return read_directory(path)


def read_openai(file: Path) -> tuple[JsonObject, StateDict]:
    """Read OpenAI's .pt file. See `read_whisper`."""
    # mapped into memory, because the decoder is most of the file
    content = load_plain_tensors(file, f"{ENCODER_KEY}={str(file)!r}", DOWNLOAD_AGAIN, mapped=True)
    dims = None
    state = None
    if isinstance(content, dict):
        dims = content.get("dims")
        state = content.get("model_state_dict")
    if not isinstance(dims, dict) or not isinstance(state, dict):
        raise UserError(
            f"{ENCODER_KEY}={str(file)!r} has no 'dims' and 'model_state_dict', so it is not an "
            "OpenAI Whisper checkpoint. Give such a file, or a Hugging Face directory."
        )
    for name in DIMS.values():
        if name not in dims:
            raise UserError(
                f"{ENCODER_KEY}={str(file)!r} has no {name!r} in its 'dims'. {DOWNLOAD_AGAIN}"
            )
    fields = {field: dims[name] for field, name in DIMS.items()}
    check_sizes(fields, f"{str(file)!r}: ")
    fields["encoder_ffn_dim"] = 4 * fields["d_model"]
    encoder: StateDict = {}
    for key, tensor in state.items():
        if key.startswith("encoder.") and isinstance(tensor, Tensor):
            encoder[key] = tensor
    check_stored_values(encoder, file)
    renamed = from_openai(encoder, str(file))
    _check_last_layer(fields, renamed, file)
    return fields, renamed


def from_openai(state: Mapping[str, Tensor], where: str) -> StateDict:
    """Rename an encoder's weights from OpenAI's to transformers' names.

    Args:
        state: weights whose keys begin with "encoder.".
        where: their file, for the error message.

    Raises:
        UserError: a key is unknown.
    """
    renamed: StateDict = {}
    for key, tensor in state.items():
        if key == "encoder.positional_embedding":
            renamed["embed_positions.weight"] = tensor
        else:
            renamed[_transformers_name(key, where)] = tensor
    return renamed


def _transformers_name(key: str, where: str) -> str:
    match = OPENAI_KEY.fullmatch(key)
    if match:
        block, name, kind = match.groups()
        if block is None and name in TOP_NAMES:
            return f"{TOP_NAMES[name]}.{kind}"
        if block is not None and name in BLOCK_NAMES:
            return f"layers.{block}.{BLOCK_NAMES[name]}.{kind}"
    raise UserError(
        f"{ENCODER_KEY}={where!r} has the key {key!r}, which OpenAI's Whisper encoders do not "
        "have. Check that the file is one of OpenAI's."
    )


def read_directory(folder: Path) -> tuple[JsonObject, StateDict]:
    """Read a Hugging Face directory. See `read_whisper`."""
    path = folder / "config.json"
    verify_folder(folder)
    check_kind(folder, ENCODER_KEY)
    if not path.exists():
        raise UserError(
            f"{ENCODER_KEY}={str(folder)!r} has no config.json. Give a Hugging Face Whisper "
            "directory, or OpenAI's .pt file itself."
        )
    config = read_json_object(path, "the encoder's configuration")
    check_not_quantized(config, path)
    kind = config.get("model_type")
    if kind != "whisper":
        raise UserError(
            f"{ENCODER_KEY}={str(folder)!r} is a {kind!r} model, not whisper. Set "
            "model.audio_encoder.model_type to match."
        )
    activation = config.get("activation_function", "gelu")
    if activation != "gelu":
        raise UserError(
            f"{str(path)!r}: activation_function={activation!r} is not supported. Give a Whisper "
            "model with gelu."
        )
    state = _read_encoder(folder)
    for field in WHISPER_FIELDS:
        if field not in config:
            raise UserError(f"{str(path)!r} has no {field!r}. {DOWNLOAD_AGAIN}")
    fields = {field: config[field] for field in WHISPER_FIELDS}
    check_sizes(fields, f"{str(path)!r}: ")
    _check_last_layer(fields, state, path)
    return fields, state


def _check_last_layer(fields: JsonObject, state: StateDict, path: Path) -> None:
    """Check that the weights have the last layer: building a million layers takes minutes."""
    last = f"layers.{fields['encoder_layers'] - 1}."
    if not any(key.startswith(last) for key in state):
        raise UserError(
            f"{str(path)!r} has encoder_layers={fields['encoder_layers']}, but its weights have no "
            f"{last!r}. Give files of the same model."
        )


def _read_encoder(folder: Path) -> StateDict:
    """Return the encoder's weights in a directory, without their prefix."""
    state: StateDict = {}
    for file in whisper_weight_files(folder):
        for key, tensor in _encoder_tensors(file).items():
            head, found, name = key.partition("encoder.")
            if found and head in ("", "model."):
                state[name] = tensor
    if not state:
        raise UserError(
            f"{ENCODER_KEY}={str(folder)!r} has no weights of an encoder (no key starts with "
            f"'model.encoder.'). {DOWNLOAD_AGAIN}"
        )
    return state


def check_sizes(fields: JsonObject, where: str = "") -> None:
    """Check the sizes of an encoder.

    Args:
        fields: the encoder's fields.
        where: prefix of the error message.

    Raises:
        UserError: a size is not an integer above 0, or the heads do not divide the width.
    """
    for name, value in fields.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{where}{name}={value!r} is not an integer above 0. Correct it.")
    width = fields["d_model"]
    heads = fields["encoder_attention_heads"]
    if width % heads:
        raise UserError(
            f"{where}d_model={width} is not a multiple of encoder_attention_heads={heads}. "
            "Correct them."
        )


def whisper_weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a Hugging Face Whisper directory."""
    for pattern in WHISPER_PATTERNS:
        found = sorted(folder.glob(pattern))
        if found:
            return found
    raise UserError(
        f"{ENCODER_KEY}={str(folder)!r} has no weights (none of {', '.join(WHISPER_PATTERNS)}). "
        f"{DOWNLOAD_AGAIN}"
    )


def _encoder_tensors(file: Path) -> StateDict:
    """Read the tensors that may be the encoder's. The others in a safetensors file are not read."""
    if file.suffix == ".bin":
        return load_tensors(file)
    with open_tensors(file) as tensors:
        keys = list(tensors.keys())
        names = [key for key in keys if "encoder." in key]
        return {key: tensors.get_tensor(key) for key in names}
