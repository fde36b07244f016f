"""Build the parts of a model: encoder and LLM, with or without pretrained weights, and adapters."""

import contextlib
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from asrllm.errors import UserError, nearest
from asrllm.models.asr_llm.configuration import COPY_CONFIG, AsrLlmConfig
from asrllm.models.asr_llm.weight_files import indexed_files
from asrllm.models.attention import PACKED, register_packed_attention
from asrllm.models.encoders.registry import build_encoder, encoder_class
from asrllm.models.fingerprint import pretrained_weight_files
from asrllm.models.hub_files import PLAIN_OUTPUTS
from asrllm.models.state_dict import check_finite, check_state, counted, is_finite
from asrllm.models.zero3_loading import partitioned_llm
from asrllm.text_files import JsonObject, first_words, reading

if TYPE_CHECKING:
    from peft import LoraConfig

SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}
LLM_CONFIG = "the LLM's configuration (llm in config.json) of"
# PEFT's warnings about rank_pattern, alpha_pattern and exclude_modules
IGNORED_BY_PEFT = ".*(did not match any targeted module|no modules were excluded)"
NOT_FINITE_BASE = "Download it again, or choose another model."
FIX_FAMILY = "Choose a Qwen, Llama or Gemma model."


def initial_encoder(config: AsrLlmConfig, *, is_random: bool = True) -> nn.Module:
    """Return the encoder with which a training starts.

    Args:
        config: the model's configuration.
        is_random: whether an encoder without a base model starts from random weights. Otherwise
            its weights come from an earlier run.

    Raises:
        UserError: the base model does not fit.
    """
    base = (config.base_models or {}).get("audio_encoder")
    if base is not None:
        return pretrained_encoder(config, base["path"])
    encoder = build_encoder(config.audio_encoder or {}, pad_to_30s=config.pad_to_30s)
    if is_random:
        encoder.start_from_scratch()
    assert isinstance(encoder, nn.Module)
    return encoder


def pretrained_encoder(config: AsrLlmConfig, path: str) -> nn.Module:
    """Return the encoder with a base model's weights.

    Args:
        config: the model's configuration.
        path: directory or file of the base model.

    Raises:
        UserError: a key is missing, unexpected or has another shape.
    """
    fields = config.audio_encoder or {}
    _, state = encoder_class(fields["model_type"]).read_pretrained(path)
    encoder: nn.Module = build_encoder(fields, pad_to_30s=config.pad_to_30s)
    check_encoder_state(state, encoder, path)
    encoder.load_state_dict(state)
    return encoder


def check_encoder_state(state: Mapping[str, Tensor], encoder: nn.Module, path: str) -> None:
    """Raise UserError if a key of the weights is missing, or a weight has another shape or NaN."""
    what = f"the encoder's weights at model.audio_encoder.pretrained_model={path!r}"
    fix = "Download them again, or give the model that its configuration describes."
    check_state(state, encoder.state_dict(), what, fix)
    check_finite_weights(state.items(), path)


def check_finite_weights(weights: Iterable[tuple[str, Tensor]], path: str) -> None:
    """Check that the weights of a base model are finite, before they make every loss NaN.

    Args:
        weights: names and tensors.
        path: directory or file of the base model.

    Raises:
        UserError: a weight contains NaN or infinite values.
    """
    for name, tensor in weights:
        tensor = getattr(tensor, "ds_tensor", tensor)  # with ZeRO-3, the partition of this rank
        if not is_finite(tensor):
            check_finite(name, tensor, _file_of(name, path), NOT_FINITE_BASE)


def _file_of(name: str, path: str) -> str:
    """Return the file with a weight, or the path of the model if it is not known."""
    files = pretrained_weight_files(path)
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                if any(f".{key}".endswith(f".{name}") for key in tensors.keys()):  # noqa: SIM118
                    return str(file)
    return str(files[0]) if len(files) == 1 else path


def pretrained_llm(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """Return an LLM with its weights.

    With ZeRO-3 (a live HfDeepSpeedConfig of stage 3) every rank holds only its own partition.

    Args:
        path: the LLM's directory.
        dtype: dtype of the weights.

    Raises:
        UserError: a file cannot be read, a key is missing, unexpected or has another shape, or the
            family does not support packed sequences.
    """
    for index in Path(path).glob("*.index.json"):
        indexed_files(index)  # transformers would load whatever file it names
    attention = register_packed_attention()
    llm = None
    if is_deepspeed_zero3_enabled():
        llm = partitioned_llm(path, dtype, attention)
    if llm is None:
        llm = _load_llm(path, dtype, attention)
    check_finite_weights(llm.named_parameters(), path)
    return check_family(llm)


def _load_llm(path: str, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """Load an LLM with transformers, and check its keys."""
    files = pretrained_weight_files(path)
    with reading(files[0] if len(files) == 1 else path, "the LLM", "Download it again."):
        llm, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **PLAIN_OUTPUTS,
        )
    _check_loading_report(report, path)
    return llm


def _check_loading_report(report: JsonObject, path: str) -> None:
    for problem in ("missing", "unexpected", "mismatched"):
        entries = report[f"{problem}_keys"]
        # a mismatched key comes with its two shapes: (key, shape, shape)
        keys = sorted(entry if isinstance(entry, str) else entry[0] for entry in entries)
        if keys:
            raise UserError(
                f"the LLM {path!r} has {counted(f'{problem} key', keys)}. Download it again."
            )


def check_family(llm: PreTrainedModel) -> PreTrainedModel:
    """Return the LLM, or raise UserError if its family does not support packed sequences.

    In an unsupported family the utterances of a packed row would attend to each other.
    """
    kind = llm.config.model_type
    layer_types = set(getattr(llm.config.get_text_config(), "layer_types", None) or [])
    unsupported = layer_types - SUPPORTED_LAYER_TYPES
    if unsupported:
        raise UserError(
            f"{kind!r} models have layers of the type {min(unsupported)!r}, which do not support "
            f"packed sequences. {FIX_FAMILY}"
        )
    if llm._is_stateful or not llm._supports_attention_backend:
        raise UserError(
            f"{kind!r} models use a custom attention that does not support packed sequences. "
            f"{FIX_FAMILY}"
        )
    return llm


def empty_llm(
    fields: JsonObject,
    dtype: torch.dtype | None = None,
    *,
    where: str | Path = "config.json",
) -> PreTrainedModel:
    """Return an LLM without its weights.

    Args:
        fields: the LLM's own config.json.
        dtype: dtype of its weights; by default the one in `fields`.
        where: the file or directory that `fields` were read from, for the error message.

    Raises:
        UserError: no LLM can be built from the fields, or the family is not supported.
    """
    register_packed_attention()
    options: JsonObject = {"attn_implementation": PACKED, "trust_remote_code": False}
    if dtype is not None:
        options["dtype"] = dtype
    with reading(where, LLM_CONFIG, COPY_CONFIG):
        config = AutoConfig.for_model(**(fields | PLAIN_OUTPUTS))
        llm = AutoModelForCausalLM.from_config(config, **options)
    return check_family(llm)


def with_lora(llm: PreTrainedModel, options: JsonObject) -> nn.Module:
    """Return an LLM in PEFT's wrapper, with adapters.

    Args:
        llm: the LLM.
        options: options of PEFT's LoraConfig.
    """
    from peft import get_peft_model

    with _checked_lora(llm, options, "model.llm.lora"), warnings.catch_warnings():
        # PEFT 0.21 reads a property that transformers 5 renames
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(llm, lora_config(options, task_type="CAUSAL_LM"))


def add_lora(
    module: nn.Module,
    options: JsonObject,
    *,
    key: str,
    not_called: Collection[str] = (),
) -> None:
    """Add adapters to a module that is not a transformers model, without a wrapper.

    Args:
        module: the module; changed in place.
        options: options of PEFT's LoraConfig.
        key: their configuration key, for error messages.
        not_called: names of layers on which adapters would have no effect.

    Raises:
        UserError: the options are not valid, or adapt such a layer.
    """
    from peft import inject_adapter_in_model

    if "layers_to_transform" in options:  # PEFT's own pattern needs a name before that of the list
        options = {"layers_pattern": "layers"} | options
    with _checked_lora(module, options, key):
        inject_adapter_in_model(lora_config(options), module)
    for name, layer in module.named_modules():
        if name.rpartition(".")[2] in not_called and hasattr(layer, "lora_A"):
            raise UserError(
                f"{key}.target_modules adapts {name!r}, but the model reads the weights of that "
                "layer without calling it, so that the adapter has no effect. Name other layers, "
                "for example those of the feed-forward part."
            )


def lora_config(options: JsonObject, **more: Any) -> "LoraConfig":
    """Return PEFT's LoraConfig with these options."""
    from peft import LoraConfig

    return LoraConfig(**options, **more)


def layer_without_bias(model: nn.Module) -> str | None:
    """Return the first adapted layer that has no bias although its adapter has one, or None.

    Such an adapter (PEFT's lora_bias) cannot be merged into its layer.
    """
    for name, layer in model.named_modules():
        if not any(getattr(layer, "lora_bias", {}).values()):
            continue
        if getattr(layer.get_base_layer(), "bias", None) is None:
            return name
    return None


@contextlib.contextmanager
def _checked_lora(module: nn.Module, options: JsonObject, key: str) -> Iterator[None]:
    """Add adapters in the block, and check that each of the options has an effect.

    PEFT accepts names of layers that do not exist if another name does.

    Args:
        module: the module that gets the adapters.
        options: options of PEFT's LoraConfig.
        key: their configuration key, for error messages.

    Raises:
        UserError: PEFT rejects or ignores an option, or a layer does not exist.
    """
    names: list[str] = []
    layers: set[str] = set()
    for name, layer in module.named_modules():
        names.append(name)
        if isinstance(layer, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)):
            layers.add(name.rpartition(".")[2])
    for option, place in (("target_modules", key), ("exclude_modules", f"{key}.options")):
        given = options.get(option, ())
        for wanted in () if isinstance(given, str) else given:
            if not any(f".{name}".endswith(f".{wanted}") for name in names):
                raise UserError(
                    f"{place}.{option}: the model has no layer {wanted!r}. "
                    f"{nearest(wanted, layers)}"
                )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", IGNORED_BY_PEFT)
            yield
    except (ValueError, TypeError, re.error, Warning) as error:
        raise UserError(
            f"{key} is not valid for this model: {first_words(error)}. Correct its options."
        ) from error
    _check_layer_numbers(module, options.get("layers_to_transform", ()), key)


def _check_layer_numbers(module: nn.Module, numbers: Iterable[int], key: str) -> None:
    """Raise UserError if a layer in layers_to_transform has no adapter."""
    adapted: set[str] = set()
    for name, layer in module.named_modules():
        if hasattr(layer, "lora_A"):
            adapted.update(name.split("."))
    missing = [number for number in numbers if str(number) not in adapted]
    if missing:
        raise UserError(
            f"{key}.options.layers_to_transform: no layer {missing[0]} has one of target_modules. "
            "Layers are numbered from 0."
        )
