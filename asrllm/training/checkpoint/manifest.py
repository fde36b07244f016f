"""Manifests of checkpoints, and the checkpoints that a run has."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asrllm.errors import CorruptedError, UserError
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.init_from import base_difference
from asrllm.text_files import read_json_object

Manifest = dict[str, Any]  # content of asrllm.json
Settings = dict[str, Any]  # settings that a run and its checkpoint must have in common
ParameterInfo = dict[str, Any]  # "shape" and "dtype" of a trained parameter

MANIFEST = "asrllm.json"
SHA256 = "sha256"  # key of the checksum of all other keys
STEP_TAG = re.compile(r"checkpoint-(\d+)")
EPOCH_TAG = re.compile(r"epoch-(\d+)")
MANIFEST_KEYS = {
    "step",
    "position",
    "zero_stage",
    "world_size",
    "trainable",
    "param_groups",
    "base_models",
    "settings",
    "prompts",
    "files",
}


def list_checkpoints(exp_dir: Path, pattern: re.Pattern[str] = STEP_TAG) -> dict[int, Path]:
    """Return the complete checkpoints by step, in ascending order.

    Args:
        exp_dir: directory of the run.
        pattern: STEP_TAG, or EPOCH_TAG for checkpoints by epoch.
    """
    found = {}
    for path in exp_dir.glob("*"):
        match = pattern.fullmatch(path.name)
        if match and (path / MANIFEST).is_file():
            found[int(match.group(1))] = path
    return dict(sorted(found.items()))


def check_exp_dir(exp_dir: Path) -> None:
    """Raise UserError if exp_dir is not a directory, or is one checkpoint of a run."""
    if not exp_dir.is_dir():
        problem = "is not a directory" if exp_dir.exists() else "does not exist"
        raise UserError(f"exp_dir={str(exp_dir)!r} {problem}. Give the directory of a trained run.")
    if (exp_dir / MANIFEST).is_file():
        raise UserError(
            f"exp_dir={str(exp_dir)!r} is one checkpoint of a run. Give the directory of the run, "
            f"{str(exp_dir.absolute().parent)!r}, and choose the checkpoint by its number."
        )


def find_checkpoint(exp_dir: Path, tag: str | None) -> Path:
    """Return the checkpoint with a name, or the newest one.

    Args:
        exp_dir: directory of the run.
        tag: name of the checkpoint, or None for the newest one.

    Raises:
        UserError: there is no such complete checkpoint. The message names the available ones.
    """
    check_exp_dir(exp_dir)
    if not tag:
        return _require_newest(exp_dir)
    name = tag.rstrip("/")
    if "/" in name or not (exp_dir / name / MANIFEST).is_file():
        available = ", ".join(path.name for path in complete_checkpoints(exp_dir))
        raise UserError(
            f"{str(exp_dir)!r} has no complete checkpoint named {tag!r}. "
            f"Set --tag to another one. Available: {available or 'none'}."
        )
    return exp_dir / name


def _require_newest(exp_dir: Path) -> Path:
    """Return the newest complete checkpoint, or raise UserError if there is none."""
    newest = newest_checkpoint(exp_dir)
    if newest is None:
        raise UserError(
            f"exp_dir={str(exp_dir)!r} has no complete checkpoint. "
            "Give the exp_dir of a run that has saved one."
        )
    return newest


def newest_checkpoint(exp_dir: Path) -> Path | None:
    """Return the complete checkpoint with the highest step, or None.

    The file `latest` is not read: a run may be killed just before it is written.
    """
    return max(complete_checkpoints(exp_dir), key=step_of, default=None)


def complete_checkpoints(exp_dir: Path) -> list[Path]:
    """Return the complete checkpoints of epochs, then those of steps."""
    return [*list_checkpoints(exp_dir, EPOCH_TAG).values(), *list_checkpoints(exp_dir).values()]


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint, from its name if possible, else from its manifest."""
    match = STEP_TAG.fullmatch(checkpoint.name)
    return int(match[1]) if match else _verified_manifest(checkpoint)["step"]


def read_manifest(checkpoint: Path) -> Manifest:
    """Read and verify the manifest of a checkpoint.

    Raises:
        CorruptedError: the manifest is not valid, lacks keys or does not match its checksum.
        UserError: the manifest is missing, because the checkpoint was not written completely; or
            the step in the manifest is not the one in the name of the directory.
    """
    manifest = _verified_manifest(checkpoint)
    _check_number(checkpoint, manifest)
    return manifest


def _verified_manifest(checkpoint: Path) -> Manifest:
    """Read a manifest without comparing it with the name of the directory.

    Raises:
        CorruptedError: the manifest is not valid, lacks keys or does not match its checksum.
        UserError: the manifest is missing, because the checkpoint was not written completely.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{str(checkpoint)!r} is not a complete checkpoint, because {MANIFEST} is missing. "
            "Choose another one."
        )
    try:
        manifest = read_json_object(path, "the manifest")
    except UserError as error:
        problem = str(error).rstrip(".")
        raise CorruptedError(f"{problem}. The checkpoint is corrupted. Remove it.") from error
    missing = MANIFEST_KEYS - manifest.keys()
    if missing:
        raise CorruptedError(
            f"the manifest {str(path)!r} lacks {sorted(missing)}, so the checkpoint is corrupted. "
            "Remove it."
        )
    written = manifest.pop(SHA256, None)  # the first version did not write it
    if written is not None and written != manifest_sha256(manifest):
        raise CorruptedError(
            f"the manifest {str(path)!r} does not match its SHA-256, so the checkpoint is "
            "corrupted. Remove it."
        )
    return manifest


def _check_number(checkpoint: Path, manifest: Manifest) -> None:
    """Check that a checkpoint has the step or the epoch in its directory's name.

    A renamed checkpoint would be evaluated, averaged or resumed in place of another one.

    Raises:
        UserError: the numbers differ.
    """
    position = manifest["position"]
    epoch = position.get("epoch") if isinstance(position, dict) else None
    written = {STEP_TAG: ("step", manifest["step"]), EPOCH_TAG: ("epoch", epoch)}
    for pattern, (unit, number) in written.items():
        match = pattern.fullmatch(checkpoint.name)
        if match and int(match[1]) != number:
            prefix = checkpoint.name.removesuffix(match[1])
            raise UserError(
                f"{str(checkpoint)!r} has another name than it was saved with: its {MANIFEST} says "
                f"{unit} {number}. Rename the directory to {prefix}{number}."
            )


def manifest_sha256(manifest: Manifest) -> str:
    """Return the checksum of a manifest without its checksum key."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def manifest_text(manifest: Manifest) -> str:
    """Return the content of a manifest's file, including its checksum."""
    manifest = json.loads(json.dumps(manifest))  # tuples become lists, as in the file
    return json.dumps(manifest | {SHA256: manifest_sha256(manifest)}, indent=1)


def check_same_model(
    checkpoint: Path, manifest: Manifest, config: AsrLlmConfig, settings: Settings
) -> None:
    """Check that a run can resume from a checkpoint.

    Args:
        checkpoint: directory of the checkpoint.
        manifest: its manifest.
        config: configuration of the run's model.
        settings: settings that the run and the checkpoint must have in common.

    Raises:
        UserError: the checkpoint has different base models or settings.
    """
    _check_same_base_models(checkpoint, manifest, config)
    for key, value in settings.items():
        written = manifest["settings"].get(key)
        if written != value:
            raise UserError(
                f"{str(checkpoint)!r} was written with {key}={written}, but this run has {value}. "
                "Use the same value, or choose another exp_dir."
            )


def _check_same_base_models(checkpoint: Path, manifest: Manifest, config: AsrLlmConfig) -> None:
    """Raise UserError if a base model has other weights than the one of the checkpoint."""
    problem = base_difference(manifest["base_models"], config.base_models or {})
    if problem:
        raise UserError(
            f"{str(checkpoint)!r} does not match the model. {problem} Choose another exp_dir."
        )


def check_same_parameters(
    checkpoint: Path, manifest: Manifest, trained: Mapping[str, ParameterInfo]
) -> None:
    """Check that a run trains the parameters of its checkpoint.

    Args:
        checkpoint: directory of the checkpoint.
        manifest: manifest of the checkpoint.
        trained: trained parameters of the run by name.

    Raises:
        UserError: names or shapes differ.
    """
    saved = manifest["trainable"]
    mismatch = f"{str(checkpoint)!r} does not match the model"
    for name in sorted(saved.keys() | trained.keys()):
        if name not in trained or name not in saved:
            where = "the checkpoint" if name in saved else "this run"
            raise UserError(
                f"{mismatch}: {name!r} is trained only in {where}. Choose another exp_dir."
            )
        saved_shape = saved[name]["shape"]
        shape = trained[name]["shape"]
        if saved_shape != shape:
            raise UserError(
                f"{mismatch}: {name!r} has the shape {saved_shape} in the checkpoint and {shape} "
                "in this run. Choose another exp_dir."
            )
