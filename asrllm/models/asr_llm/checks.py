"""What the config.json of a model's directory says, checked before anything is built from it."""

import json
from collections.abc import Mapping
from inspect import get_annotations
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import torch
import transformers

from asrllm.errors import UserError
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.encoders.registry import ENCODERS, build_encoder
from asrllm.models.hub_files import check_plain
from asrllm.models.projectors import PROJECTORS
from asrllm.text_files import first_words, read_json_object, reading

TYPES = get_annotations(AsrLlmConfig)
SIZES = ("projector_hidden_size", "audio_encoder_projector_ds_rate")
MEND = "correct it, or copy the config.json that was saved with the model"


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"{str(path.parent)!r} has no {path.name}: give a directory written by training or by 'asrllm export'"
        )
    return read_json_object(path, "the file")


def indexed_files(index: Path) -> list[Path]:
    """Return the weight files that an index names (transformers' *.index.json).

    Raises:
        UserError: the index is not one, or names a file outside of its directory.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
        raise UserError(f"{str(index)!r} has no 'weight_map' of file names. Copy it again.")
    names = sorted(set(weight_map.values()))
    for name in names:
        is_outside = Path(name).is_absolute() or ".." in Path(name).parts
        if is_outside or name.endswith(".json"):
            raise UserError(
                f"{str(index)!r} names {name!r}, which is not a weight file below it. Copy it again."
            )
    return [index.parent / name for name in names]


def read_config(folder: str | Path) -> AsrLlmConfig:
    """The configuration of a run's exp_dir or of an exported directory. Raises UserError naming a field that is wrong."""
    path = Path(folder) / "config.json"
    fields = read_json(path)
    if fields.get("model_type") != AsrLlmConfig.model_type:
        raise UserError(
            f"{str(folder)!r} is a {fields.get('model_type')!r} model, not {AsrLlmConfig.model_type!r}: give a directory of 'asrllm export'"
        )
    check_fields(fields, str(path))
    with reading(
        path, "the model's configuration", "Copy the config.json that was saved with the model."
    ):
        return AsrLlmConfig.from_pretrained(folder)


def check_given_config(config: Any, folder: str | Path) -> None:
    """Raises UserError where a caller's configuration says something else than the directory's own, which is the one that is taken."""
    own, given = (
        json.loads(json.dumps({name: getattr(c, name, None) for name in TYPES}))
        for c in (read_config(folder), config)
    )
    if other := [name for name in TYPES if own[name] != given[name]]:
        raise UserError(
            f"from_pretrained() builds what {str(Path(folder) / 'config.json')!r} says: leave out config and {other[0]}"
        )


def check_fields(fields: Mapping[str, Any], where: str) -> None:
    """Raises UserError where a field of AsrLlmConfig has another type than it says, or nothing can be built from it."""
    for name, hint in TYPES.items():
        if name in fields and not has_type(fields[name], hint):
            wanted = str(hint) if get_args(hint) else hint.__name__
            raise UserError(
                f"{where!r}: {name}={repr(fields[name])[:60]} is not of the type {wanted}: {MEND}"
            )
    for name in SIZES:
        if fields.get(name, 1) < 1:
            raise UserError(f"{where!r}: {name}={fields[name]} must be above 0: {MEND}")
    if fields.get("projector", "mlp") not in PROJECTORS:
        raise UserError(
            f"{where!r}: projector={fields['projector']!r} is none of {', '.join(PROJECTORS)}: {MEND}"
        )
    check_encoder(fields.get("audio_encoder") or {}, fields.get("pad_to_30s", False), where)
    check_llm(fields.get("llm") or {}, where)


def has_type(value: Any, hint: Any) -> bool:
    kinds = [
        get_origin(kind) or kind
        for kind in (get_args(hint) if isinstance(hint, UnionType) else (hint,))
    ]
    return isinstance(value, tuple(kinds)) and (not isinstance(value, bool) or bool in kinds)


def check_encoder(fields: Mapping[str, Any], pad_to_30s: bool, where: str) -> None:
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in ENCODERS:
        raise UserError(
            f"{where!r}: audio_encoder.model_type={kind!r} is none of {', '.join(ENCODERS)}: {MEND}"
        )
    try:
        with torch.device("meta"):
            build_encoder(dict(fields), pad_to_30s=pad_to_30s)
    except (UserError, TypeError, ValueError, RuntimeError) as error:
        texts = [
            f"{name}={value!r}"
            for name, value in fields.items()
            if isinstance(value, str) and name != "model_type"
        ]
        which = (
            f", with {texts[0]}," if texts else ""
        )  # torch does not say which of its arguments was a text
        raise UserError(
            f"{where!r}: audio_encoder{which} is of no {kind} ({said(error)}): {MEND}"
        ) from error


def check_llm(fields: Mapping[str, Any], where: str) -> None:
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"{where!r}: llm.model_type={kind!r} is no LLM that transformers {transformers.__version__} knows: {MEND}"
        )
    check_plain(fields, Path(where))
    try:
        config = transformers.AutoConfig.for_model(**fields)
    except Exception as error:  # transformers raises AttributeError and KeyError as well
        raise UserError(
            f"{where!r}: llm is no configuration of a {kind!r} ({said(error)}): {MEND}"
        ) from error
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{where!r}: llm.model_type={kind!r} is no causal LLM: {MEND}")


def said(error: Exception) -> str:
    return first_words(error)
