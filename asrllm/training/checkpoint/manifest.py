"""What a checkpoint says of itself, and which checkpoints a run has."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from asrllm.errors import CorruptedError, UserError
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.text_files import read_json_object

MANIFEST = "asrllm.json"
SHA256 = "sha256"  # key of the checksum of all other keys
STEP_TAG, EPOCH_TAG = re.compile(r"checkpoint-(\d+)"), re.compile(r"epoch-(\d+)")
KEYS = {
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
    """Complete checkpoints by step (or, with EPOCH_TAG, by epoch), in ascending order."""
    found = {
        int(match.group(1)): path
        for path in exp_dir.glob("*")
        if (match := pattern.fullmatch(path.name)) and (path / MANIFEST).is_file()
    }
    return dict(sorted(found.items()))


def check_run(exp_dir: Path) -> None:
    if not exp_dir.is_dir():
        raise UserError(
            f"exp_dir={str(exp_dir)!r} does not exist: give the directory of a trained run"
        )


def find_checkpoint(exp_dir: Path, tag: str | None) -> Path:
    """The checkpoint of that name in exp_dir, or without one the newest. Raises UserError naming those that are there."""
    check_run(exp_dir)
    found = [
        path.name
        for pattern in (EPOCH_TAG, STEP_TAG)
        for path in list_checkpoints(exp_dir, pattern).values()
    ]
    if not tag:
        if (newest := newest_checkpoint(exp_dir)) is None:
            raise UserError(
                f"{str(exp_dir)!r} holds no complete checkpoint: give the exp_dir of a run that has saved one"
            )
        return newest
    name = tag.rstrip("/")
    if "/" in name or not (exp_dir / name / MANIFEST).is_file():
        raise UserError(
            f"--tag {tag!r} is no complete checkpoint in {str(exp_dir)!r}: give the name of one (there are: {', '.join(found) or 'none'})"
        )
    return exp_dir / name


def newest_checkpoint(exp_dir: Path) -> Path | None:
    """The complete checkpoint of the highest step, whatever `latest` says: a run may be killed just before it is written."""
    return max(complete_checkpoints(exp_dir), key=step_of, default=None)


def complete_checkpoints(exp_dir: Path) -> list[Path]:
    """Return the checkpoints of epochs and of steps, in no order."""
    return [*list_checkpoints(exp_dir, EPOCH_TAG).values(), *list_checkpoints(exp_dir).values()]


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint, from its name where that holds it."""
    match = STEP_TAG.fullmatch(checkpoint.name)
    return int(match[1]) if match else read_manifest(checkpoint)["step"]


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise UserError(f"{str(checkpoint)!r} is no complete checkpoint: {MANIFEST} is missing")
    try:
        manifest = read_json_object(path, "the manifest")
    except UserError as error:
        raise CorruptedError(f"{error}. The checkpoint is corrupted: remove it.") from error
    if missing := KEYS - manifest.keys():
        raise CorruptedError(
            f"the manifest {str(path)!r} lacks {sorted(missing)}, so the checkpoint is corrupted. Remove it."
        )
    written = manifest.pop(SHA256, None)  # the first version did not write it
    if written is not None and written != manifest_sha256(manifest):
        raise CorruptedError(
            f"the manifest {str(path)!r} does not match its SHA-256, so the checkpoint is corrupted. Remove it."
        )
    return manifest


def manifest_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def manifest_text(manifest: dict[str, Any]) -> str:
    """Return the content of a manifest's file, its checksum included."""
    manifest = json.loads(json.dumps(manifest))  # tuples are lists in the file
    return json.dumps(manifest | {SHA256: manifest_sha256(manifest)}, indent=1)


def check_same_model(
    checkpoint: Path, description: AsrLlmConfig, settings: dict[str, Any]
) -> dict[str, Any]:
    """The manifest of the checkpoint to go on from; raises UserError where it belongs to another model or to other settings."""
    manifest = read_manifest(checkpoint)
    for part, base in (description.base_models or {}).items():
        trained_on = manifest["base_models"][part]
        if trained_on["fingerprint"] != base["fingerprint"]:
            raise UserError(
                f"{str(checkpoint)!r} is a checkpoint of another model: its {part} was {trained_on['path']!r}, now it is "
                f"{base['path']!r} with other weights; choose another exp_dir"
            )
    for key, value in settings.items():
        if manifest["settings"].get(key) != value:  # an older version may not have written it
            raise UserError(
                f"{str(checkpoint)!r} was written with {key}={manifest['settings'].get(key)}, this run has {value}: "
                "go on as it was, or choose another exp_dir"
            )
    return manifest


def check_same_parameters(checkpoint: Path, manifest: dict[str, Any], now: dict[str, Any]) -> None:
    """The trained parameters by name and shape are those of the checkpoint."""
    then, another = manifest["trainable"], f"{str(checkpoint)!r} is a checkpoint of another model"
    for name in sorted(then.keys() | now.keys()):
        if name not in now or name not in then:
            where = "the checkpoint alone" if name in then else "this run alone"
            raise UserError(f"{another}: {name!r} is trained in {where}; choose another exp_dir")
        if then[name]["shape"] != now[name]["shape"]:
            raise UserError(
                f"{another}: {name!r} has the shape {then[name]['shape']} there and {now[name]['shape']} here; choose another exp_dir"
            )
