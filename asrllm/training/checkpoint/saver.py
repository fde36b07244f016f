"""Checkpoints of a run: DeepSpeed tags with a manifest, complete or invisible."""

import contextlib
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import zero_to_fp32
from torch import Tensor, nn

import asrllm
from asrllm import distributed
from asrllm.atomic import sync, write_whole
from asrllm.data.plan import Position
from asrllm.errors import UserError
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.init_from import gathered
from asrllm.stored_tensors import StoredTensor, read_stored
from asrllm.training.checkpoint.manifest import (
    MANIFEST,
    list_checkpoints,
    manifest_text,
    newest_checkpoint,
)
from asrllm.training.checkpoint.partitions import full_shape, parameter_names
from asrllm.training.checkpoint.writer import CheckpointWriter
from asrllm.training.checkpoint.zero_files import check_files, file_digest, trusted_unpickling

INHERITED = "inherited_weights.pt"  # frozen weights that no base model has; the same for all checkpoints of a run
STAGING = ".incomplete"  # below exp_dir: what is being written, or removed


class CheckpointSaver:
    """Writes checkpoints on all ranks: built aside, renamed when every rank's files are on the disk; `latest` follows.

    With `background` the ranks go on training meanwhile, and `look` publishes what they have written. Every method is a collective. Raises
    UserError on all ranks where one of them cannot write: what it began is removed, earlier checkpoints stay. keep: step checkpoints to
    keep; 0: all.
    """

    def __init__(self, exp_dir: Path, *, background: bool, keep: int) -> None:
        self.exp_dir, self.staging, self.keep = exp_dir, exp_dir / STAGING, keep
        self.writer = CheckpointWriter(background=background)
        self.pending: tuple[Sequence[str], dict[str, Any]] | None = None

    def begin(
        self,
        engine: deepspeed.DeepSpeedEngine,
        tags: Sequence[str],
        manifest: dict[str, Any],
        more: dict[str, Any] | None = None,
    ) -> None:
        """Copy all that the checkpoint holds, under one or several names. more: further files of this rank's."""
        self.finish()
        self._on_first_rank(self._clear, tags)
        with _written_by(engine, self.writer):
            engine.save_checkpoint(
                str(self.staging), tag=tags[0], save_latest=False, exclude_frozen_parameters=True
            )
        for name, state in (more or {}).items():
            self.writer.save(state, str(self.staging / tags[0] / name))
        self.pending = (tags, manifest)
        self.writer.start()
        if not self.writer.background:
            self.finish()

    def look(self, device: torch.device) -> None:
        """Publish what is being written if all ranks are done with it."""
        if self.pending is None:
            return
        busy = torch.tensor(float(self.writer.writing), device=device)
        if not distributed.sum_over_ranks(busy):
            self.finish()

    def finish(self) -> None:
        """Wait for what is being written, and publish it."""
        if self.pending is None:
            return
        self.writer.wait()
        (tags, manifest), self.pending = self.pending, None
        self._agree(self.writer.error, tags)
        self._on_first_rank(lambda: self._publish(tags, manifest), tags)

    def _clear(self) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True)

    def _publish(self, tags: Sequence[str], manifest: dict[str, Any]) -> None:
        first = self.staging / tags[0]
        files = {path.name: file_digest(path) for path in sorted(first.glob("*.pt"))}
        inherited = {}
        if manifest["inherited"]:
            inherited["inherited_file"] = file_digest(self.exp_dir / INHERITED)
        write_whole(first / MANIFEST, manifest_text(manifest | {"files": files} | inherited))
        for tag in tags[1:]:
            _link_files(first, self.staging / tag)
        for tag in tags:
            sync(self.staging / tag)
            if (self.exp_dir / tag).exists():  # what is there is no complete checkpoint
                (self.exp_dir / tag).rename(self.staging / f"replaced-{tag}")
            (self.staging / tag).rename(self.exp_dir / tag)
        shutil.copyfile(zero_to_fp32.__file__, self.staging / "zero_to_fp32.py")
        (self.staging / "zero_to_fp32.py").replace(self.exp_dir / "zero_to_fp32.py")
        write_whole(self.exp_dir / "latest", tags[-1])
        sync(self.exp_dir)
        for path in (
            list(list_checkpoints(self.exp_dir).values())[: -self.keep] if self.keep else []
        ):
            path.rename(
                self.staging / path.name
            )  # from here on it is no checkpoint any more, whatever happens to the rest
        shutil.rmtree(self.staging, ignore_errors=True)

    def _on_first_rank(self, action: Callable[[], None], tags: Sequence[str]) -> None:
        error = None
        if distributed.rank() == 0:
            try:
                action()
            except OSError as failure:
                error = str(failure)
        self._agree(error, tags)

    def _agree(self, mine: str | None, tags: Sequence[str]) -> None:
        """All ranks know of a failure of one."""
        errors = {
            rank: error for rank, error in enumerate(distributed.gather_objects(mine)) if error
        }
        if not errors:
            return
        if distributed.rank() == 0:
            shutil.rmtree(self.staging, ignore_errors=True)
        rank, error = min(errors.items())
        free = shutil.disk_usage(self.exp_dir).free / 1e6
        last = newest_checkpoint(self.exp_dir)
        raise UserError(
            f"rank {rank} could not write {tags[-1]} to exp_dir={str(self.exp_dir)!r} ({error}; {free:.0f} MB are free there): make room; "
            f"the same command goes on from {last.name if last else 'the beginning'}"
        )


@contextlib.contextmanager
def _written_by(engine: deepspeed.DeepSpeedEngine, writer: CheckpointWriter) -> Iterator[None]:
    """DeepSpeed's own writing would fail on one rank, and leave the others waiting.

    What shares its weights is not noted: from such a note zero_to_fp32.py makes a second tensor of a tied head, which is no key of the
    model and which safetensors refuses.
    """
    before = engine.checkpoint_engine
    engine.checkpoint_engine, engine._copy_recovery_script, engine._get_shared_params = (
        writer,
        lambda _: None,
        dict,
    )
    try:
        yield
    finally:
        engine.checkpoint_engine = before
        del engine._copy_recovery_script, engine._get_shared_params


def _link_files(source: Path, target: Path) -> None:
    """The same files under another directory's name; copied where the file system has no links."""
    target.mkdir()
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except OSError:
            shutil.copyfile(file, target / file.name)
            sync(target / file.name)


def make_manifest(
    engine: deepspeed.DeepSpeedEngine,
    settings: dict[str, Any],
    *,
    step: int,
    position: Position,
    averaged: bool,
) -> dict[str, Any]:
    """What the checkpoint holds and what it belongs to. settings: what a run that goes on from it must have in common."""
    description: AsrLlmConfig = engine.module.config
    trainable = trained_parameters(engine.module)
    return {
        "format": 2,
        "asrllm": asrllm.__version__,
        "step": step,
        "position": position.as_dict(),
        "zero_stage": engine.zero_optimization_stage(),
        "world_size": distributed.world_size(),
        "trainable": trainable,
        "param_groups": parameter_names(engine),
        "running_average": averaged,
        "inherited": list(engine.module.inherited),
        "base_models": description.base_models,
        "settings": settings,
        "prompts": description.prompts,
    }


def trained_parameters(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Shape and dtype by name."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {
        name: {"shape": full_shape(p), "dtype": str(p.dtype).removeprefix("torch.")}
        for name, p in trained.items()
    }


def write_inherited(model: nn.Module, exp_dir: Path, checkpoint: Path | None = None) -> None:
    """Write exp_dir/inherited_weights.pt, if there is anything to carry, called on all ranks. checkpoint: that the run goes on from."""
    if checkpoint is not None and checkpoint.parent.resolve() == exp_dir.resolve():
        return  # the file is there, and the manifests of exp_dir name its digest
    parameters, state = dict(model.named_parameters()), {}
    for name in model.inherited:
        with gathered(parameters[name]):
            if distributed.rank() == 0:
                state[name] = parameters[name].detach().cpu().clone()
    if model.inherited:
        distributed.first_rank_does(lambda: _write_weights(state, exp_dir / INHERITED))


def _write_weights(state: dict[str, Tensor], path: Path) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        torch.save(state, partial)
    except RuntimeError as error:  # so torch says that the disk is full
        partial.unlink()
        raise UserError(
            f"{str(path)!r} was cut short ({' '.join(str(error).split())[:100]}): make room on its disk"
        ) from error
    sync(partial)
    partial.replace(path)


def read_inherited(checkpoint: Path, manifest: dict[str, Any]) -> dict[str, StoredTensor]:
    """The frozen weights that belong to a checkpoint and lie beside it. Raises UserError where they are others than it was written with."""
    names = manifest.get("inherited", [])
    path = checkpoint.parent / INHERITED
    state = read_stored(path) if names else {}
    if missing := sorted(set(names) - state.keys()):
        raise UserError(
            f"{str(path)!r} lacks {missing[0]!r}, which its checkpoints need: it is of another run"
        )
    written = manifest.get("inherited_file")  # an older version has not written it
    if names and written and file_digest(path) != written:
        raise UserError(
            f"{str(path)!r} is not the file that {checkpoint.name} was written with: a run that went on here from a checkpoint of another "
            "exp_dir has replaced it, or it was copied from another run; copy the right one again, or remove the checkpoint"
        )
    return {name: state[name] for name in names}


def load_checkpoint(
    engine: deepspeed.DeepSpeedEngine, checkpoint: Path, manifest: dict[str, Any]
) -> None:
    """Weights and optimizer, on as many ranks as wrote it; pickles may build nothing but what DeepSpeed's checkpoints hold."""
    check_files(checkpoint, manifest)
    with trusted_unpickling():
        loaded, _ = engine.load_checkpoint(
            str(checkpoint.parent), tag=checkpoint.name, load_module_strict=False
        )
        if loaded is None:
            raise ValueError("DeepSpeed found no file")


@contextlib.contextmanager
def explain_damage(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except (
        OSError,
        EOFError,
        RuntimeError,
        AssertionError,
        KeyError,
        ValueError,
        struct.error,
        pickle.UnpicklingError,
    ) as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"the checkpoint {str(checkpoint)!r} is damaged: remove it to go on from the one before ({said})"
        ) from error
