"""The current paths of the base models that a model was trained from."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from asrllm.defaults import BASE_MODEL_KEYS
from asrllm.errors import UserError, nearest
from asrllm.models.asr_llm.configuration import COPY_CONFIG, AsrLlmConfig
from asrllm.models.fingerprint import (
    check_fingerprint,
    is_hub_id,
    pretrained_weight_files,
    resolve_pretrained,
)
from asrllm.text_files import JsonObject

BasePaths = Mapping[str, str | Path]


def move_base_models(config: AsrLlmConfig, base_models: BasePaths | None, *, where: str) -> None:
    """Replace the paths of base models in a configuration.

    Args:
        config: configuration of a run or of an exported directory; changed in place.
        base_models: current paths of "audio_encoder" and "llm". A path is a directory, a hub id
            or, for the encoder, a file. None means that none has moved.
        where: the directory of the configuration, for error messages.

    Raises:
        UserError: a path is not found or does not contain the weights of training, or the
            configuration names no base model for the part.
    """
    if not base_models:
        return
    named = dict(config.base_models or {})
    for part, path in base_models.items():
        named[part] = _moved_entry(config, part, path, where)
        # transformers stores a copy of the path
        if part == "llm" and config.llm and "_name_or_path" in config.llm:
            config.llm = config.llm | {"_name_or_path": named[part]["path"]}
    config.base_models = named


def _moved_entry(config: AsrLlmConfig, part: str, path: str | Path, where: str) -> JsonObject:
    """Return the entry of a base model with its current path, after checking the fingerprint."""
    if part not in BASE_MODEL_KEYS:
        hint = nearest(part, BASE_MODEL_KEYS)
        raise UserError(f"base_models[{part!r}] is not a pretrained part. {hint}")
    base = base_entry(config, part)
    if base is None:
        raise UserError(
            f"{BASE_MODEL_KEYS[part]}={str(path)!r} has no effect: {where!r} names no base model "
            f"of the {part}. Leave it out."
        )
    found = find_base_model(part, path)
    check_fingerprint(part, found, base["fingerprint"])
    return base | {"path": str(found)}


def find_base_model(part: str, path: str | Path) -> Path:
    """Return the absolute path of a base model that the user gives for a part.

    Raises:
        UserError: the path is not found, or has no weights.
    """
    key = BASE_MODEL_KEYS[part]
    may_be_file = part == "audio_encoder"
    what = "directory or file" if may_be_file else "directory"
    fix = f"Give the {what} of the base model."
    if not str(path):
        raise UserError(f"{key} is empty. {fix}")
    folder = Path(path).expanduser()
    if not folder.exists() and not is_hub_id(path):
        raise UserError(f"{key}={str(path)!r} is not found. {fix}")
    if folder.is_file() and not may_be_file:
        raise UserError(f"{key}={str(path)!r} is a file. {fix}")
    found = resolve_pretrained(path, file=may_be_file)
    if not is_present(found):
        raise UserError(f"{key}={str(path)!r} has no weights. {fix}")
    return found


def base_paths(config: AsrLlmConfig, parts: Iterable[str]) -> dict[str, str]:
    """Return the paths of the base models of some parts, after checking their fingerprints.

    Raises:
        UserError: the configuration names none, or one is missing or has other weights.
    """
    bases: dict[str, JsonObject] = {}
    missing: list[str] = []
    for part in parts:
        base = base_entry(config, part)
        if base is None:
            raise UserError(
                f"the weights do not contain the {part}, and config.json names no base model for "
                "it. Export the whole model."
            )
        bases[part] = base
        if not is_present(base["path"]):
            missing.append(part)
    if missing:
        raise UserError(_not_found(bases, missing))
    for part, base in bases.items():
        check_fingerprint(part, base["path"], base["fingerprint"])
    return {part: base["path"] for part, base in bases.items()}


def _not_found(bases: Mapping[str, JsonObject], missing: Iterable[str]) -> str:
    """Return the message for missing base models."""
    paths = ", ".join(f"the {part} at {bases[part]['path']!r}" for part in missing)
    keys = " ".join(f"{BASE_MODEL_KEYS[part]}=PATH" for part in missing)
    python = ", ".join(f"{part!r}: PATH" for part in missing)
    return (
        f"base models not found: {paths}. If they moved, give their present paths: {keys} "
        f"(in Python: base_models={{{python}}})."
    )


def base_entry(config: AsrLlmConfig, part: str) -> JsonObject | None:
    """Return {"path", "fingerprint"} of a part's base model, or None if the configuration has none.

    Raises:
        UserError: the configuration's entry is incomplete.
    """
    base = (config.base_models or {}).get(part)
    if base is None:
        return None
    if not isinstance(base, dict) or not {"path", "fingerprint"} <= base.keys():
        raise UserError(
            f"config.json: base_models.{part}={base!r} has no 'path' and 'fingerprint'. "
            f"{COPY_CONFIG}"
        )
    return base


def is_present(path: str | Path) -> bool:
    """Return whether a path has weights. An empty mount point has none."""
    try:
        pretrained_weight_files(path)
    except UserError:
        return False
    return True


def public_name(path: str) -> str:
    """Return a base model's hub id, or its directory's name; the rest of the path is private."""
    for part in Path(path).parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    return Path(path).name
