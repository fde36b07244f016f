"""Checkpoints of a run: DeepSpeed tags with a manifest, complete or invisible."""

import contextlib
import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

import asrllm
from asrllm.config import read_json_object
from asrllm.data.plan import Position
from asrllm.errors import UserError
from asrllm.models.auto import read_state
from asrllm.models.configuration import AsrLlmConfig
from asrllm.models.earlier import copy_into, whole
from asrllm.training import distributed
from asrllm.training.engine import full_shape

MANIFEST = "asrllm.json"
CARRIED = "carried.pt"  # below exp_dir: frozen weights that no base model holds; they are the same in every checkpoint
STAGING = ".incomplete"  # below exp_dir: what is being written
STEP_TAG, EPOCH_TAG = re.compile(r"checkpoint-(\d+)"), re.compile(r"epoch-(\d+)")


def save_checkpoint(engine: deepspeed.DeepSpeedEngine, exp_dir: Path, tag: str, manifest: dict[str, Any]) -> None:
    """Write `exp_dir/tag` on all ranks. It is built aside and renamed when it is complete; `latest` follows."""
    staging = exp_dir / STAGING
    if distributed.rank() == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    distributed.barrier()
    engine.save_checkpoint(str(staging), tag=tag, save_latest=False, exclude_frozen_parameters=True)
    distributed.barrier()
    if distributed.rank() == 0:
        (staging / tag / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for file in (staging / tag).iterdir():
            _sync(file)
        if (exp_dir / tag).exists():  # written before, by a run that was resumed from an earlier step
            shutil.rmtree(exp_dir / tag)
        (staging / tag).rename(exp_dir / tag)
        script = staging / "zero_to_fp32.py"
        if script.exists():
            script.replace(exp_dir / "zero_to_fp32.py")
        write_whole(exp_dir / "latest", tag)
        shutil.rmtree(staging)
    distributed.barrier()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """The file appears with all of its text or stays as it was."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    _sync(partial)
    partial.replace(path)


def make_manifest(engine: deepspeed.DeepSpeedEngine, settings: dict[str, Any], *, step: int, position: Position) -> dict[str, Any]:
    """What the checkpoint holds and what it belongs to. settings: what a run that goes on from it must have in common."""
    description: AsrLlmConfig = engine.module.config
    return {
        "format": 1,
        "asrllm": asrllm.__version__,
        "step": step,
        "position": position.as_dict(),
        "zero_stage": engine.zero_optimization_stage(),
        "world_size": distributed.world_size(),
        "trainable": trained_parameters(engine.module),
        "carried": list(engine.module.carried),
        "base_models": description.base_models,
        "settings": settings,
        "prompts": description.prompts,
    }


def trained_parameters(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Shape and dtype by name."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: {"shape": full_shape(p), "dtype": str(p.dtype).removeprefix("torch.")} for name, p in trained.items()}


def write_carried(model: nn.Module, exp_dir: Path) -> None:
    """Write exp_dir/carried.pt on all ranks, if there is anything to carry."""
    parameters, state = dict(model.named_parameters()), {}
    for name in model.carried:
        with whole(parameters[name]):
            if distributed.rank() == 0:
                state[name] = parameters[name].detach().cpu().clone()
    if state:
        partial = exp_dir / f"{CARRIED}.partial"
        torch.save(state, partial)
        _sync(partial)
        partial.replace(exp_dir / CARRIED)
    distributed.barrier()


def read_carried(exp_dir: Path, manifest: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The frozen weights that belong to a checkpoint and lie beside it."""
    names = manifest.get("carried", [])
    state = read_state(exp_dir / CARRIED) if names else {}
    if missing := sorted(set(names) - state.keys()):
        raise UserError(f"{str(exp_dir / CARRIED)!r} lacks {missing[0]!r}, which its checkpoints need: it is of another run")
    return {name: state[name] for name in names}


def restore_carried(model: nn.Module, exp_dir: Path, manifest: dict[str, Any]) -> None:
    copy_into(model, read_carried(exp_dir, manifest))


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, exp_dir: Path, tag: str) -> None:
    """Weights and optimizer of `exp_dir/tag`; pickles may build nothing but what DeepSpeed's checkpoints hold."""
    damaged = f"the checkpoint {str(exp_dir / tag)!r} is damaged: remove it to go on from the one before"
    try:
        with trusted_unpickling():
            loaded, _ = engine.load_checkpoint(str(exp_dir), tag=tag, load_module_strict=False)
    except (OSError, EOFError, RuntimeError, AssertionError, KeyError, ValueError, struct.error, pickle.UnpicklingError) as error:
        raise UserError(f"{damaged} ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from error
    if loaded is None:
        raise UserError(damaged)


@contextlib.contextmanager
def trusted_unpickling() -> Iterator[None]:
    """torch.load refuses, inside the block, whatever is neither a tensor nor one of DeepSpeed's plain classes."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def stage_named(kind: Any, name: str) -> Any:
        """Python 3.11.0 to 3.11.3 pickle an enum as getattr(its class, its name); of getattr nothing else is let through."""
        if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
            raise pickle.UnpicklingError(f"the checkpoint asks for {name!r} of {kind!r}")
        return getattr(ZeroStageEnum, name)

    plain = [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address, (stage_named, "builtins.getattr")]
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals(plain):
            yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def list_checkpoints(exp_dir: Path, pattern: re.Pattern[str] = STEP_TAG) -> dict[int, Path]:
    """Complete checkpoints by step (or, with EPOCH_TAG, by epoch), in ascending order."""
    found = {
        int(match.group(1)): path for path in exp_dir.glob("*") if (match := pattern.fullmatch(path.name)) and (path / MANIFEST).is_file()
    }
    return dict(sorted(found.items()))


def latest_tag(exp_dir: Path) -> str | None:
    """The newest complete checkpoint's tag."""
    latest = exp_dir / "latest"
    if latest.is_file() and (exp_dir / latest.read_text().strip() / MANIFEST).is_file():
        return latest.read_text().strip()
    found = [*list_checkpoints(exp_dir).values(), *list_checkpoints(exp_dir, EPOCH_TAG).values()]
    return max(found, key=lambda path: read_manifest(path)["step"]).name if found else None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise UserError(f"{str(checkpoint)!r} is no complete checkpoint: {MANIFEST} is missing")
    manifest = read_json_object(path, "the manifest")
    if missing := {"step", "position", "zero_stage", "world_size", "trainable", "base_models", "settings", "prompts"} - manifest.keys():
        raise UserError(f"the manifest {str(path)!r} lacks {sorted(missing)}: the checkpoint is damaged; remove it")
    return manifest


def check_same_model(exp_dir: Path, tag: str, description: AsrLlmConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the checkpoint to resume from; raises UserError where it belongs to another model or to other settings."""
    manifest = read_manifest(exp_dir / tag)
    for part, base in (description.base_models or {}).items():
        trained_on = manifest["base_models"][part]
        if trained_on["fingerprint"] != base["fingerprint"]:
            raise UserError(
                f"exp_dir={str(exp_dir)!r} holds checkpoints of another model: its {part} was {trained_on['path']!r}, now it is "
                f"{base['path']!r} with other weights; choose another exp_dir"
            )
    for key, value in settings.items():
        if manifest["settings"].get(key) != value:  # an older version may not have written it
            raise UserError(
                f"exp_dir={str(exp_dir)!r}: {tag} was written with {key}={manifest['settings'].get(key)}, this run has {value}: "
                "go on as it was, or choose another exp_dir"
            )
    return manifest


def check_same_parameters(exp_dir: Path, manifest: dict[str, Any], now: dict[str, Any]) -> None:
    """The trained parameters by name and shape are those of the checkpoint."""
    then = manifest["trainable"]
    for name in sorted(then.keys() | now.keys()):
        if name not in now or name not in then:
            where = "the checkpoint alone" if name in then else "this run alone"
            raise UserError(
                f"exp_dir={str(exp_dir)!r} holds checkpoints of another model: {name!r} is trained in {where}; choose another exp_dir"
            )
        if then[name]["shape"] != now[name]["shape"]:
            raise UserError(
                f"exp_dir={str(exp_dir)!r} holds checkpoints of another model: {name!r} has the shape {then[name]['shape']} there and "
                f"{now[name]['shape']} here; choose another exp_dir"
            )


def prune(exp_dir: Path, keep: int) -> None:
    """Remove all but the last `keep` step checkpoints; 0 keeps all."""
    for path in list(list_checkpoints(exp_dir).values())[:-keep] if keep else []:
        (path / MANIFEST).unlink()  # from here on it is no checkpoint any more, whatever happens to the rest
        shutil.rmtree(path)
