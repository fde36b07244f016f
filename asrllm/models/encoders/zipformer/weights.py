"""Read Zipformer encoders from the files of icefall and Auden.

The encoder is found by the name of its first weight, whatever else the file contains.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from asrllm.errors import UserError
from asrllm.integrity import verify_folder
from asrllm.models.encoders.zipformer.configuration import (
    PER_STACK,
    PUBLIC_SIZES,
    ZIPFORMER_FIELDS,
    ZipformerConfig,
)
from asrllm.models.hub_files import check_no_adapters
from asrllm.models.plain_tensors import load_plain_tensors
from asrllm.models.state_dict import StateDict, check_stored_values
from asrllm.text_files import JsonObject, read_json_object

FIRST_KEY = "encoder_embed.conv.0.weight"
MODULE_PREFIXES = ("encoder_embed.", "encoder.")
# Every layer of the published code has a parameter that is not used. The parameters in use are
# below bypass, bypass_mid and out_combiner.
DEAD_KEY = re.compile(r"(.*\.layers\.\d+\.bypass_scale|(.*\.)?model_batch_count)")
WRAPPERS = ("model", "state_dict", "model_avg")
POS_HEAD_DIM = 4  # icefall's value, which its checkpoints do not contain
# What icefall's causal recipes train with.
ICEFALL_CHUNKS = {
    "chunk_size": [16, 32, 64, -1],
    "left_context_frames": [64, 128, 256, -1],
}
ZIPFORMER_PATTERNS = ("*.safetensors", "pytorch_model*.bin", "pretrained.pt", "*.pt", "*.pth")
GIVE_CHECKPOINT = "Give the file or directory of an icefall or Auden checkpoint."


def without_dead_keys(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict without the entries that no module uses.

    They are each layer's `bypass_scale`, and `model_batch_count`, a counter of icefall.
    """
    return {key: value for key, value in state.items() if not DEAD_KEY.fullmatch(key)}


def read_zipformer(path: Path) -> tuple[ZipformerConfig, StateDict]:
    """Return an encoder's configuration and its weights, without a prefix.

    Fields that config.json does not contain are derived from the weights' shapes. Without a
    config.json, the heads are assumed to have 4 position channels each, and a causal encoder to be
    trained like icefall's.

    Args:
        path: a file, or a directory with weights and optionally a config.json.

    Raises:
        UserError: the file is corrupted, or has no Zipformer encoder.
    """
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        check_no_adapters(path, "model.audio_encoder.pretrained_model")
    verify_folder(folder)
    state = encoder_weights(_load_all(path), path)
    given = read_encoder_fields(folder / "config.json")
    return _complete_config(state, given, path), state


def _complete_config(state: StateDict, given: JsonObject, path: Path) -> ZipformerConfig:
    """Return the configuration of weights. `given` has some of its fields."""
    folder = path if path.is_dir() else path.parent
    try:
        return ZipformerConfig(**fields_of_shapes(state, given, folder / "config.json"))
    except (KeyError, IndexError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"{str(path)!r} is not a supported Zipformer ({type(error).__name__}: {error}). Check "
            "the file."
        ) from error


def _load_all(path: Path) -> StateDict:
    files = [path] if path.is_file() else zipformer_weight_files(path)
    tensors: StateDict = {}
    for file in files:
        tensors |= load_tensors(file)
    return tensors


def zipformer_weight_files(folder: Path) -> list[Path]:
    """Return the weight files of an icefall or Auden directory.

    Raises:
        UserError: there are none, or several checkpoints.
    """
    for pattern in ZIPFORMER_PATTERNS:
        found = sorted(folder.glob(pattern))
        if len(found) > 1 and pattern in ("*.pt", "*.pth"):
            raise UserError(
                f"{str(folder)!r} contains {len(found)} checkpoints (first: {found[0].name}). Give "
                "the path of one of them."
            )
        if found:
            return found
    raise UserError(
        f"{str(folder)!r} has no weights (none of {', '.join(ZIPFORMER_PATTERNS)}). "
        f"{GIVE_CHECKPOINT}"
    )


def load_tensors(file: Path) -> StateDict:
    """Return the tensors of a file by name, taken out of their container.

    No code in the file is executed.

    Raises:
        UserError: the file is corrupted, contains more than tensors, or has a sparse tensor.
    """
    fix = "Save only its state dict, with torch.save or as safetensors."
    content = load_plain_tensors(file, repr(str(file)), fix)
    for name in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if not isinstance(content, dict):
        raise UserError(f"{str(file)!r} is not a state dict. {GIVE_CHECKPOINT}")
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    check_stored_values(tensors, file)
    return tensors


def encoder_weights(tensors: Mapping[str, Tensor], path: Path) -> StateDict:
    """Return the encoder's weights by its own names, without the dead keys.

    Args:
        tensors: all tensors of a checkpoint. The prefix of the encoder is what precedes the name of
            its first weight.
        path: the checkpoint, for error messages.

    Raises:
        UserError: there is no encoder, or more than one.
    """
    prefix = _encoder_prefix(tensors, path)
    starts = tuple(prefix + part for part in MODULE_PREFIXES)
    state: StateDict = {}
    for key, tensor in tensors.items():
        if key.startswith(starts):
            state[key.removeprefix(prefix)] = tensor
    return without_dead_keys(state)


def _encoder_prefix(tensors: Mapping[str, Tensor], path: Path) -> str:
    first_keys = [key for key in tensors if f".{key}".endswith(f".{FIRST_KEY}")]
    prefixes = sorted({key.removesuffix(FIRST_KEY) for key in first_keys})
    if not prefixes:
        raise UserError(
            f"{str(path)!r} has no Zipformer encoder (no key ends in {FIRST_KEY!r}). Check "
            "model.audio_encoder.pretrained_model."
        )
    if len(prefixes) > 1:
        raise UserError(
            f"{str(path)!r} contains {len(prefixes)} Zipformer encoders, with the prefixes "
            f"{', '.join(map(repr, prefixes))}. Save only one of them."
        )
    return prefixes[0]


def read_encoder_fields(path: Path) -> JsonObject:
    """Return the encoder's fields in a config.json, or {} if there are none.

    Args:
        path: the file, which need not exist. The fields are at its top level or in one of its
            objects.

    Raises:
        UserError: the file is not a JSON object.
    """
    if not path.exists():
        return {}
    content = read_json_object(path, "the encoder's configuration")
    for part in (content, *content.values()):
        if isinstance(part, dict) and "encoder_dim" in part:
            _check_fields(part, path)
            return {name: part[name] for name in ZIPFORMER_FIELDS if name in part}
    return {}


def _check_fields(fields: JsonObject, path: Path) -> None:
    """Check the values of an encoder's fields, and that none of their names is misspelled.

    Other names are ignored: they belong to icefall's and Auden's training.

    Raises:
        UserError: a value is not an integer above 0, a list of them or a bool, or a name is
            misspelled.
    """
    may_be_below_1 = ("causal", "chunk_size", "left_context_frames")
    for name, value in fields.items():
        values = value if isinstance(value, list) else [value]
        is_valid = bool(values) and all(isinstance(one, int) for one in values)
        if is_valid and name not in may_be_below_1:
            is_valid = min(values) >= 1
        if name in ZIPFORMER_FIELDS and not is_valid:
            raise UserError(
                f"{str(path)!r}: {name}={value!r} is not an integer above 0 or a list of them. "
                "Correct it."
            )
        close = difflib.get_close_matches(name, ZIPFORMER_FIELDS, n=1, cutoff=0.85)
        if name not in ZIPFORMER_FIELDS and close and close[0] not in fields:
            raise UserError(f"{str(path)!r}: {name} is unknown. Rename it to {close[0]}.")


def fields_of_shapes(
    state: Mapping[str, Tensor], given: Mapping[str, Any], file: Path
) -> JsonObject:
    """Return all fields of an encoder.

    Args:
        state: its weights, whose shapes determine most fields.
        given: the fields in its config.json.
        file: path of that config.json, which an error names.

    Raises:
        UserError: the shapes contradict `given`.
    """
    stack_keys = [key for key in state if key.startswith("encoder.encoders.")]
    count = 1 + max(int(key.split(".")[2]) for key in stack_keys)
    positions = given.get("pos_head_dim", POS_HEAD_DIM)
    positions = [positions] if isinstance(positions, int) else list(positions)
    stacks = [stack_of_shapes(state, i, positions[i % len(positions)]) for i in range(count)]
    found: JsonObject = {}
    for name in stacks[0]:
        found[name] = [stack[name] for stack in stacks]
    found["pos_dim"] = state[first_layer(state, 0) + "self_attn_weights.linear_pos.weight"].shape[1]
    found["causal"] = any(key.endswith("chunkwise_conv_scale") for key in state)
    _check_given(given, found, count, file)
    chunks = ICEFALL_CHUNKS if found["causal"] else {}
    return {"encoder_unmasked_dim": unmasked(found["encoder_dim"]), **chunks, **given, **found}


def _check_given(given: Mapping[str, Any], found: JsonObject, count: int, file: Path) -> None:
    """Raise UserError if a given field contradicts the one found in the weights."""
    for name, value in found.items():
        stated = given.get(name, value)
        if name in PER_STACK:
            stated = _for_each_stack(stated, count)
        if stated != value:
            raise UserError(
                f"{str(file)!r} has {name}={stated}, but the weights beside it have {value}. Give "
                "files of the same model."
            )


def _for_each_stack(value: int | list[int], count: int) -> list[int]:
    if isinstance(value, int):
        return [value] * count
    return [value[0]] * count if len(value) == 1 else list(value)


def first_layer(state: Mapping[str, Tensor], i: int) -> str:
    """Return the prefix of the weights of the first layer in stack i."""
    downsampled = f"encoder.encoders.{i}.encoder.layers.0."
    if downsampled + "norm.bias" in state:
        return downsampled
    return f"encoder.encoders.{i}.layers.0."


def stack_of_shapes(state: Mapping[str, Tensor], i: int, pos_head_dim: int) -> dict[str, int]:
    """Return the fields of stack i, derived from the shapes of its weights.

    Args:
        state: the encoder's weights.
        i: index of the stack.
        pos_head_dim: width of a head's position queries, which no shape shows.
    """
    layer = first_layer(state, i)
    layers = layer.removesuffix("0.")

    def rows(name: str) -> int:
        return state[layer + name].shape[0]

    heads = rows("self_attn_weights.linear_pos.weight") // pos_head_dim
    kernel_key = layer + "conv_module1.depthwise_conv.chunkwise_conv.weight"
    if kernel_key not in state:
        kernel_key = layer + "conv_module1.depthwise_conv.weight"
    downsample = state.get(f"encoder.encoders.{i}.downsample.bias")
    layer_keys = [key.removeprefix(layers) for key in state if key.startswith(layers)]
    return {
        "num_encoder_layers": len({key.split(".")[0] for key in layer_keys}),
        "encoder_dim": rows("norm.bias"),
        "feedforward_dim": rows("feed_forward2.in_proj.weight"),
        "downsampling_factor": 1 if downsample is None else len(downsample),
        "cnn_module_kernel": state[kernel_key].shape[-1],
        "num_heads": heads,
        "query_head_dim": (rows("self_attn_weights.in_proj.weight") // heads - pos_head_dim) // 2,
        "value_head_dim": rows("self_attn1.in_proj.weight") // heads,
        "pos_head_dim": pos_head_dim,
    }


def unmasked(widths: list[int]) -> list[int]:
    """Return encoder_unmasked_dim, which no shape shows.

    It is that of the published size with these widths. For other widths it is 192 or 256, as in
    icefall.
    """
    for size in PUBLIC_SIZES.values():
        if size["encoder_dim"] == widths:
            return size["encoder_unmasked_dim"]
    return [min(width, 192 if width <= 256 else 256) for width in widths]
