"""Zipformer encoders in the files of icefall and Auden: found by the name of their first weight, whatever is around them."""

import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from asrllm.errors import UserError
from asrllm.integrity import verify_weights
from asrllm.models.encoders.zipformer.configuration import (
    FIELDS,
    PER_STACK,
    PUBLIC_SIZES,
    ZipformerConfig,
)
from asrllm.text_files import parse_json

FIRST_KEY = "encoder_embed.conv.0.weight"
PARTS = ("encoder_embed.", "encoder.")
# every layer of the published code owns a parameter that nothing reads; the live ones are below bypass, bypass_mid and out_combiner
DEAD_KEY = re.compile(r"(.*\.layers\.\d+\.bypass_scale|(.*\.)?model_batch_count)")
CONTAINERS = ("model", "state_dict", "model_avg")
POS_HEAD_DIM = 4  # icefall's, which its checkpoints do not say
ICEFALL_CHUNKS = {
    "chunk_size": [16, 32, 64, -1],
    "left_context_frames": [64, 128, 256, -1],
}  # what its causal recipes train with
# what torch and safetensors raise at files that are cut short, of another kind, or hold more than tensors
DAMAGED = (
    pickle.UnpicklingError,
    SafetensorError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    struct.error,
)
FILES = ("*.safetensors", "pytorch_model*.bin", "pretrained.pt", "*.pt", "*.pth")


def without_dead_keys(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict without each layer's unused `bypass_scale` and without `model_batch_count`, a counter of icefall's."""
    return {key: value for key, value in state.items() if not DEAD_KEY.fullmatch(key)}


def read_zipformer(path: Path) -> tuple[ZipformerConfig, dict[str, Tensor]]:
    """The configuration and the encoder's weights, with no prefix. path: a file, or a directory with weights and maybe a config.json.

    What config.json does not say follows from the weights' shapes; where there is none, that the heads have 4 position channels each is
    assumed, and that a causal encoder was trained as icefall's are.
    """
    files = [path] if path.is_file() else weight_files(path)
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= load_tensors(file)
    state = encoder_weights(tensors, path)
    folder = path if path.is_dir() else path.parent
    given = read_fields(folder / "config.json")
    try:
        config = ZipformerConfig(**fields_of_shapes(state, given))
    except (KeyError, IndexError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"{str(path)!r} is no Zipformer that is known ({type(error).__name__}: {error}): check the file"
        ) from error
    return config, state


def weight_files(folder: Path) -> list[Path]:
    for pattern in FILES:
        found = sorted(folder.glob(pattern))
        if len(found) > 1 and pattern in ("*.pt", "*.pth"):
            raise UserError(
                f"{str(folder)!r} holds {len(found)} checkpoints, such as {found[0].name}: give the path of one of them"
            )
        if found:
            return found
    raise UserError(
        f"{str(folder)!r} holds no weights (none of {', '.join(FILES)}): give an icefall or Auden checkpoint's file or directory"
    )


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, out of their container; nothing in it is executed."""
    try:
        verify_weights(file)
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (*DAMAGED, OSError) as error:
        raise UserError(
            f"{str(file)!r} cannot be read as plain tensors ({' '.join(str(error).split())[:160]}): save its state dict alone, with "
            "torch.save or as safetensors"
        ) from error
    for name in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if not isinstance(content, dict):
        raise UserError(f"{str(file)!r} holds no state dict: give an icefall or Auden checkpoint")
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def encoder_weights(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The encoder's part by its own names: below whatever stands before its first weight's name. Without the dead keys."""
    prefixes = sorted(
        {
            key.removesuffix(FIRST_KEY)
            for key in tensors
            if key == FIRST_KEY or key.endswith("." + FIRST_KEY)
        }
    )
    if not prefixes:
        raise UserError(
            f"{str(path)!r} holds no Zipformer encoder (no key ends in {FIRST_KEY!r}): check model.audio_encoder.pretrained_model"
        )
    if len(prefixes) > 1:
        raise UserError(
            f"{str(path)!r} holds {len(prefixes)} Zipformer encoders, below {', '.join(map(repr, prefixes))}: save one alone"
        )
    starts = tuple(prefixes[0] + part for part in PARTS)
    return without_dead_keys(
        {k.removeprefix(prefixes[0]): v for k, v in tensors.items() if k.startswith(starts)}
    )


def read_fields(path: Path) -> dict[str, Any]:
    """The encoder's fields in a config.json: at the top, or in the part of it that has them. {} where there are none."""
    if not path.is_file():
        return {}
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{str(path)!r} is no JSON ({error}): download it again, or remove it"
        ) from error
    content = content if isinstance(content, dict) else {}
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        if "encoder_dim" in part:
            return {name: part[name] for name in FIELDS if name in part}
    return {}


def fields_of_shapes(state: dict[str, Tensor], given: dict[str, Any]) -> dict[str, Any]:
    """All fields: from the weights' shapes, and from `given` what those leave open. Raises UserError where the two contradict."""
    count = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.encoders."))
    positions = given.get("pos_head_dim", POS_HEAD_DIM)
    positions = [positions] if isinstance(positions, int) else list(positions)
    stacks = [stack_of_shapes(state, i, positions[i % len(positions)]) for i in range(count)]
    found: dict[str, Any] = {name: [stack[name] for stack in stacks] for name in stacks[0]}
    found["pos_dim"] = state[first_layer(state, 0) + "self_attn_weights.linear_pos.weight"].shape[1]
    found["causal"] = any(key.endswith("chunkwise_conv_scale") for key in state)
    for name, value in found.items():
        said = given.get(name, value)
        if name in PER_STACK and (isinstance(said, int) or len(said) == 1):
            said = [said if isinstance(said, int) else said[0]] * count
        if (list(said) if isinstance(value, list) else said) != value:
            raise UserError(
                f"config.json says {name}={said}, but the weights beside it have {value}: they are of another model"
            )
    chunks = ICEFALL_CHUNKS if found["causal"] else {}
    return {"encoder_unmasked_dim": unmasked(found["encoder_dim"]), **chunks, **given, **found}


def first_layer(state: dict[str, Tensor], i: int) -> str:
    """What the names of the first layer of stack i begin with."""
    slow = f"encoder.encoders.{i}.encoder.layers.0."
    return slow if slow + "norm.bias" in state else f"encoder.encoders.{i}.layers.0."


def stack_of_shapes(state: dict[str, Tensor], i: int, pos_head_dim: int) -> dict[str, int]:
    """The fields of stack i."""
    layer = first_layer(state, i)

    def rows(name: str) -> int:
        return state[layer + name].shape[0]

    heads = rows("self_attn_weights.linear_pos.weight") // pos_head_dim
    depthwise = layer + "conv_module1.depthwise_conv."
    kernel = state[
        depthwise
        + ("chunkwise_conv.weight" if depthwise + "chunkwise_conv.weight" in state else "weight")
    ]
    downsample = state.get(f"encoder.encoders.{i}.downsample.bias")
    layers = {
        key.removeprefix(layer[:-2]).split(".")[0] for key in state if key.startswith(layer[:-2])
    }
    return {
        "num_encoder_layers": len(layers),
        "encoder_dim": rows("norm.bias"),
        "feedforward_dim": rows("feed_forward2.in_proj.weight"),
        "downsampling_factor": 1 if downsample is None else len(downsample),
        "cnn_module_kernel": kernel.shape[-1],
        "num_heads": heads,
        "query_head_dim": (rows("self_attn_weights.in_proj.weight") // heads - pos_head_dim) // 2,
        "value_head_dim": rows("self_attn1.in_proj.weight") // heads,
        "pos_head_dim": pos_head_dim,
    }


def unmasked(widths: list[int]) -> list[int]:
    """encoder_unmasked_dim, which no shape shows: of the published size with these widths; of another, as icefall's, 192 and 256."""
    for size in PUBLIC_SIZES.values():
        if size["encoder_dim"] == widths:
            return size["encoder_unmasked_dim"]
    return [min(width, 192 if width <= 256 else 256) for width in widths]
