"""Checks of a model directory's config.json, before anything is built from it."""

import json
from inspect import get_annotations
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import torch
import transformers
from pydantic import Field
from transformers import PreTrainedConfig

from asrllm.defaults import PadTo30s
from asrllm.errors import UserError
from asrllm.integrity import verify_folder
from asrllm.models.asr_llm.configuration import COPY_CONFIG, AsrLlmConfig
from asrllm.models.config_numbers import MAX_ENCODER_NUMBER, MAX_LLM_NUMBER, check_numbers
from asrllm.models.encoders.registry import ENCODERS, build_encoder
from asrllm.models.hub_files import check_not_quantized
from asrllm.models.projectors import PROJECTORS
from asrllm.schema import (
    SETTINGS,
    PositiveFloat,
    PositiveInt,
    RatioBelowOne,
    build,
    keys_and_types,
    shown,
)
from asrllm.text_files import (
    JsonObject,
    check_no_bom,
    first_words,
    missing_problem,
    read_json_object,
    reading,
)

TYPES = get_annotations(AsrLlmConfig)
# Limits far above any model, so that a corrupted size does not take all memory or run for hours.
MAX_PROJECTOR_WIDTH = 1 << 17
MAX_DOWNSAMPLING = 1000
BOUNDED_TYPES = {
    "projector": Literal[tuple(PROJECTORS)],
    "projector_hidden_size": Annotated[int, Field(ge=1, le=MAX_PROJECTOR_WIDTH)],
    "audio_encoder_projector_ds_rate": Annotated[int, Field(ge=1, le=MAX_DOWNSAMPLING)],
}
Rank = Annotated[int, Field(ge=1, le=MAX_PROJECTOR_WIDTH)]
# types of the options of PEFT's LoraConfig that training writes; PEFT validates few of them
LORA_TYPES = {
    "r": Rank,
    "lora_alpha": PositiveInt | PositiveFloat,
    "lora_dropout": RatioBelowOne,
    "target_modules": list[str] | str | None,
    "use_rslora": bool,
    "use_dora": bool,
    "exclude_modules": list[str] | str | None,
    "layers_to_transform": list[int] | int | None,
    "layers_pattern": list[str] | str | None,
    "rank_pattern": dict[str, Rank] | None,
    "alpha_pattern": dict[str, PositiveInt | PositiveFloat] | None,
    "init_lora_weights": bool | str | None,
    "lora_bias": bool,
}
BASE_MODEL_TYPES = {"path": str, "fingerprint": str}
# types of the fields of AsrLlmConfig, which transformers does not validate
FIELD_TYPES: dict[str, Any] = {name: (hint, None) for name, hint in (TYPES | BOUNDED_TYPES).items()}
CONFIG_FIELDS = pydantic.create_model("ConfigFields", __config__=SETTINGS, **FIELD_TYPES)
OPTION_TYPES: dict[str, Any] = {name: (hint, None) for name, hint in LORA_TYPES.items()}
LORA_OPTIONS = pydantic.create_model("LoraOptions", __config__=SETTINGS, **OPTION_TYPES)
CORRECT_MODEL_CONFIG = "Correct it, or copy the config.json that was saved with the model."


def read_config_fields(folder: str | Path) -> JsonObject:
    """Return the content of the config.json in a model's directory.

    Raises:
        UserError: the file does not exist or is not a JSON object, or a file of the directory
            does not match its checksum.
    """
    if Path(folder).exists() and not Path(folder).is_dir():
        raise UserError(f"{str(folder)!r} is not a directory. Give the directory of a model.")
    if not Path(folder).exists():
        raise UserError(f"the model {str(folder)!r} {missing_problem(folder)}")
    verify_folder(Path(folder))
    path = Path(folder) / "config.json"
    if not path.exists():
        check_not_a_checkpoint(Path(folder))
        raise UserError(
            f"{str(folder)!r} has no config.json. Give a directory written by training or by "
            "'asrllm export'."
        )
    return read_json_object(path, "the model's configuration")


def check_not_a_checkpoint(folder: Path) -> None:
    """Raise UserError if a directory is a ZeRO checkpoint, which is neither a model nor weights."""
    if any(folder.glob("*mp_rank_*_states.pt")):
        raise UserError(
            f"{str(folder)!r} is a ZeRO checkpoint. Convert it to weights with "
            f"'asrllm consolidate {folder.parent} --tag {folder.name}', and give them with the "
            "directory of the run."
        )


def read_config(folder: str | Path) -> AsrLlmConfig:
    """Return the configuration of a run's exp_dir or of an exported directory.

    Raises:
        UserError: config.json is missing, is corrupted, or has a wrong field.
    """
    path = Path(folder) / "config.json"
    fields = read_config_fields(folder)
    kind = fields.get("model_type")
    if kind != AsrLlmConfig.model_type:
        raise UserError(
            f"{str(folder)!r} is a {kind!r} model, not {AsrLlmConfig.model_type!r}. Give a "
            "directory written by 'asrllm export' without --as."
        )
    check_config_fields(fields, str(path))
    if fields.get("separate_adapter"):
        raise UserError(
            f"{str(folder)!r} has the LLM's adapter in its subdirectory 'adapter', for vLLM and "
            "PEFT. Give the run, or export it without --separate-adapter."
        )
    check_no_bom(path)
    with reading(path, "the model's configuration", COPY_CONFIG):
        return AsrLlmConfig.from_pretrained(folder)


def check_given_config(config: PreTrainedConfig, folder: str | Path) -> None:
    """Raise UserError if a caller's configuration contradicts the config.json in the directory.

    The model is built from config.json, so that a changed value would have no effect.
    """
    own = _plain_fields(read_config(folder))
    given = _plain_fields(config)
    different = [name for name in TYPES if own[name] != given[name]]
    if different:
        path = Path(folder) / "config.json"
        raise UserError(
            f"from_pretrained() builds the model from {str(path)!r}, whose {different[0]} differs "
            "from the one in config. Leave config out."
        )


def _plain_fields(config: PreTrainedConfig) -> JsonObject:
    """Return the fields of a configuration as they are after a round trip through JSON."""
    fields = {name: getattr(config, name, None) for name in TYPES}
    return json.loads(json.dumps(fields))


def check_config_fields(fields: JsonObject, where: str) -> None:
    """Check the fields of an AsrLlmConfig.

    Args:
        fields: the fields of config.json.
        where: its path, for the error message.

    Raises:
        UserError: a field has the wrong type, or no model can be built from it.
    """
    _check_types(CONFIG_FIELDS, fields, where)
    for name in ("lora", "audio_encoder_lora"):
        _check_types(LORA_OPTIONS, fields.get(name) or {}, where, group=f"{name}.")
    _check_base_models(fields.get("base_models") or {}, where)
    for part, limit in (("audio_encoder", MAX_ENCODER_NUMBER), ("llm", MAX_LLM_NUMBER)):
        check_numbers(fields.get(part) or {}, limit, f"{where!r}: {part}.", CORRECT_MODEL_CONFIG)
    _check_encoder_fields(fields.get("audio_encoder") or {}, fields.get("pad_to_30s", False), where)
    _check_llm_fields(fields.get("llm") or {}, where)


def _check_types(types: type, fields: JsonObject, where: str, group: str = "") -> None:
    """Check the fields that a pydantic model declares, and leave others to their library."""
    declared = keys_and_types(types)
    known = {name: value for name, value in fields.items() if name in declared}
    try:
        build(types, known, where=f"{where!r}: ", group=group)
    except UserError as error:
        raise UserError(f"{error} {CORRECT_MODEL_CONFIG}") from error


def _check_base_models(bases: JsonObject, where: str) -> None:
    """Check that every base model has a path and a fingerprint, which are texts."""
    for part, base in bases.items():
        name = f"base_models.{part}"
        if not isinstance(base, dict) or not BASE_MODEL_TYPES.keys() <= base.keys():
            raise UserError(
                f"{where!r}: {name}={shown(base)} has no 'path' and 'fingerprint'. "
                f"{CORRECT_MODEL_CONFIG}"
            )
        for key, kind in BASE_MODEL_TYPES.items():
            if not isinstance(base[key], kind) or not base[key]:
                raise UserError(
                    f"{where!r}: {name}.{key}={shown(base[key])} is not a text. "
                    f"{CORRECT_MODEL_CONFIG}"
                )


def _check_encoder_fields(fields: JsonObject, pad_to_30s: PadTo30s, where: str) -> None:
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in ENCODERS:
        raise UserError(
            f"{where!r}: audio_encoder.model_type={kind!r} is not supported. "
            f"Available: {', '.join(ENCODERS)}. {CORRECT_MODEL_CONFIG}"
        )
    try:
        with torch.device("meta"):
            build_encoder(dict(fields), pad_to_30s=pad_to_30s)
    except (UserError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        # torch does not say which of its arguments was a text instead of a number
        texts = [
            f"{name}={value!r}"
            for name, value in fields.items()
            if isinstance(value, str) and name != "model_type"
        ]
        which = f" with {texts[0]}" if texts else ""
        raise UserError(
            f"{where!r}: audio_encoder{which} does not describe a {kind}: {first_words(error)}. "
            f"{CORRECT_MODEL_CONFIG}"
        ) from error


def _check_llm_fields(fields: JsonObject, where: str) -> None:
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"{where!r}: llm.model_type={kind!r} is not an LLM that transformers "
            f"{transformers.__version__} knows. {CORRECT_MODEL_CONFIG}"
        )
    check_not_quantized(fields, Path(where))
    try:
        config = transformers.AutoConfig.for_model(**fields)
    except Exception as error:  # transformers raises AttributeError and KeyError as well
        raise UserError(
            f"{where!r}: llm is not a configuration of a {kind!r} model: {first_words(error)}. "
            f"{CORRECT_MODEL_CONFIG}"
        ) from error
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{where!r}: llm.model_type={kind!r} is not a causal LLM. {CORRECT_MODEL_CONFIG}"
        )
