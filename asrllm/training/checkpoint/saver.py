"""Save and load checkpoints: DeepSpeed tags with a manifest, complete or invisible."""

import contextlib
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import deepspeed
import torch
from deepspeed.utils import zero_to_fp32
from torch import Tensor, nn

import asrllm
from asrllm import distributed
from asrllm.atomic import sync, write_whole
from asrllm.data.plan import Position
from asrllm.errors import UserError
from asrllm.integrity import BAD_ARCHIVE
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.partitioning import gathered
from asrllm.training.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    ParameterInfo,
    Settings,
    list_checkpoints,
    manifest_text,
    newest_checkpoint,
)
from asrllm.training.checkpoint.partitions import full_shape, parameter_names
from asrllm.training.checkpoint.writer import CheckpointWriter
from asrllm.training.checkpoint.zero_files import (
    check_files,
    file_digest,
    load_file,
    restricted_unpickling,
)

# Frozen weights that no base model has. All checkpoints of a run use the same file.
INHERITED = "inherited_weights.pt"
STAGING = ".incomplete"  # below exp_dir: checkpoints that are being written or removed


class Pending(NamedTuple):
    """A checkpoint that is being written: its tags and its manifest."""

    tags: Sequence[str]
    manifest: Manifest


class CheckpointSaver:
    """Writes checkpoints on all ranks. All ranks must call every method.

    The files are written to a staging directory, which is renamed when the files of every rank are
    on the disk. Then `latest` is updated. In the background training continues meanwhile, and
    `publish_if_written` publishes the files once they are written.

    If a rank cannot write, all ranks raise UserError, the incomplete files are removed, and earlier
    checkpoints remain.
    """

    def __init__(self, exp_dir: Path, *, background: bool, keep: int) -> None:
        """Prepare a saver.

        Args:
            exp_dir: directory of the run.
            background: write while training continues.
            keep: number of step checkpoints to keep, or 0 for all.
        """
        self.exp_dir = exp_dir
        self.staging = exp_dir / STAGING
        self.keep = keep
        self.writer = CheckpointWriter(background=background)
        self.pending: Pending | None = None

    def begin(
        self,
        engine: deepspeed.DeepSpeedEngine,
        tags: Sequence[str],
        manifest: Manifest,
        extra_files: Mapping[str, object] | None = None,
    ) -> None:
        """Copy the content of a checkpoint and start to write it.

        Args:
            engine: DeepSpeed engine.
            tags: one or several names of the checkpoint.
            manifest: manifest without the digests of the files.
            extra_files: contents of further files of this rank, by file name.
        """
        # The staging directory and the host copies serve one checkpoint at a time.
        self.finish()
        self._on_first_rank(self._clear, tags)
        with _written_by(engine, self.writer):
            engine.save_checkpoint(
                str(self.staging), tag=tags[0], save_latest=False, exclude_frozen_parameters=True
            )
        for name, state in (extra_files or {}).items():
            self.writer.save(state, str(self.staging / tags[0] / name))
        self.pending = Pending(tags, manifest)
        self.writer.start()
        if not self.writer.background:
            self.finish()

    def publish_if_written(self, device: torch.device) -> None:
        """Publish the pending checkpoint if all ranks have written it."""
        if self.pending is None:
            return
        # Publishing is collective, so the ranks must agree when to do it.
        busy = torch.tensor(float(self.writer.writing), device=device)
        if not distributed.sum_over_ranks(busy):
            self.finish()

    def finish(self) -> None:
        """Wait for the pending checkpoint and publish it."""
        if self.pending is None:
            return
        self.writer.wait()
        tags, manifest = self.pending
        self.pending = None
        self._raise_on_all(self.writer.error, tags)
        self._on_first_rank(lambda: self._publish(tags, manifest), tags)

    def _clear(self) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True)

    def _publish(self, tags: Sequence[str], manifest: Manifest) -> None:
        """Complete the manifest, rename the directories and update `latest`."""
        first = self.staging / tags[0]
        more: Manifest = {
            "files": {path.name: file_digest(path) for path in sorted(first.glob("*.pt"))}
        }
        if manifest["inherited"]:
            more["inherited_file"] = file_digest(self.exp_dir / INHERITED)
        write_whole(first / MANIFEST, manifest_text(manifest | more))
        for tag in tags[1:]:
            _link_files(first, self.staging / tag)
        for tag in tags:
            target = self.exp_dir / tag
            # On the disk before the rename: under its final name a directory is complete.
            sync(self.staging / tag)
            if target.exists():  # it is not a complete checkpoint
                target.rename(self.staging / f"replaced-{tag}")
            (self.staging / tag).rename(target)
        # Not copied in place, where another process could run half of the script.
        shutil.copyfile(zero_to_fp32.__file__, self.staging / "zero_to_fp32.py")
        (self.staging / "zero_to_fp32.py").replace(self.exp_dir / "zero_to_fp32.py")
        # after the renames, so that `latest` never names a directory that does not exist
        write_whole(self.exp_dir / "latest", tags[-1])
        sync(self.exp_dir)
        if self.keep:
            self._discard_oldest(self.keep)
        shutil.rmtree(self.staging, ignore_errors=True)

    def _discard_oldest(self, keep: int) -> None:
        """Move all but the newest `keep` checkpoints to the directory that is removed."""
        for path in list(list_checkpoints(self.exp_dir).values())[:-keep]:
            # from here on it does not count as a checkpoint, even if it is not removed
            path.rename(self.staging / path.name)

    def _on_first_rank(self, action: Callable[[], None], tags: Sequence[str]) -> None:
        """Run an action on the first rank. If it fails, raise UserError on all ranks."""
        error = None
        if distributed.rank() == 0:
            try:
                action()
            except OSError as failure:
                error = str(failure)
        self._raise_on_all(error, tags)

    def _raise_on_all(self, own_error: str | None, tags: Sequence[str]) -> None:
        """Raise UserError on all ranks if one of them has an error."""
        if own_error:  # here, because all ranks must raise the same message
            free = shutil.disk_usage(self.exp_dir).free / 1e6
            own_error = f"{own_error}; {free:.0f} MB are free there"
        errors = {}
        for rank, error in enumerate(distributed.gather_objects(own_error)):
            if error:
                errors[rank] = error
        if not errors:
            return
        if distributed.rank() == 0:
            shutil.rmtree(self.staging, ignore_errors=True)
        rank, error = min(errors.items())
        last = newest_checkpoint(self.exp_dir)
        resumed = f"resumes from {last.name}" if last else "starts again"
        raise UserError(
            f"rank {rank} could not write {tags[-1]} to exp_dir={str(self.exp_dir)!r} "
            f"({error}). "
            f"Free some space. Then the same command {resumed}."
        )


@contextlib.contextmanager
def _written_by(engine: deepspeed.DeepSpeedEngine, writer: CheckpointWriter) -> Iterator[None]:
    """Let a writer save what DeepSpeed saves in the block.

    If DeepSpeed's own writing failed on one rank, the others would wait for it.

    Shared parameters are not recorded: from such a record zero_to_fp32.py makes a second tensor of
    a tied head, which is not a key of the model and which safetensors rejects.
    https://github.com/deepspeedai/DeepSpeed/pull/8376
    """
    engine_before = engine.checkpoint_engine
    engine.checkpoint_engine = writer
    # `_publish` writes zero_to_fp32.py, to exp_dir and not to the staging directory.
    engine._copy_recovery_script = lambda save_path: None
    engine._get_shared_params = dict
    try:
        yield
    finally:
        engine.checkpoint_engine = engine_before
        del engine._copy_recovery_script
        del engine._get_shared_params


def _link_files(source: Path, target: Path) -> None:
    """Link the files of a directory into a new one, or copy them if links are not supported."""
    target.mkdir()
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except OSError:
            shutil.copyfile(file, target / file.name)
            sync(target / file.name)


def make_manifest(
    engine: deepspeed.DeepSpeedEngine,
    settings: Settings,
    *,
    step: int,
    position: Position,
    averaged: bool,
) -> Manifest:
    """Return the manifest of a checkpoint without the digests of its files.

    Args:
        engine: DeepSpeed engine.
        settings: settings that a resumed run must have in common with the checkpoint.
        step: optimizer steps done.
        position: position in the data from which a resumed run continues.
        averaged: whether the checkpoint has a running average.
    """
    description: AsrLlmConfig = engine.module.config
    return {
        "format": 2,
        "asrllm": asrllm.__version__,
        "step": step,
        "position": position.as_dict(),
        "zero_stage": engine.zero_optimization_stage(),
        "world_size": distributed.world_size(),
        "trainable": trained_parameters(engine.module),
        "param_groups": parameter_names(engine),
        "running_average": averaged,
        "inherited": list(engine.module.inherited),
        "base_models": description.base_models,
        "warm_start": engine.module.warm_start,
        "settings": settings,
        "prompts": description.prompts,
    }


def trained_parameters(model: nn.Module) -> dict[str, ParameterInfo]:
    """Return the shapes and dtypes of the trained parameters by name."""
    trained = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            dtype = str(parameter.dtype).removeprefix("torch.")
            trained[name] = {"shape": full_shape(parameter), "dtype": dtype}
    return trained


def write_inherited(model: nn.Module, exp_dir: Path, checkpoint: Path | None = None) -> None:
    """Write exp_dir/inherited_weights.pt if the model has inherited weights.

    All ranks must call this.

    Args:
        model: model, whose attribute `inherited` names the weights.
        exp_dir: directory of the run.
        checkpoint: checkpoint from which the run resumes.
    """
    if checkpoint is not None and checkpoint.parent.resolve() == exp_dir.resolve():
        return  # the file exists, and the manifests in exp_dir have its digest
    parameters = dict(model.named_parameters())
    state = {}
    for name in model.inherited:
        with gathered(parameters[name]):
            if distributed.rank() == 0:
                # `gathered` releases the whole weight at the end of the block.
                state[name] = parameters[name].detach().cpu().clone()
    if model.inherited:
        distributed.first_rank_does(lambda: _write_weights(state, exp_dir / INHERITED))


def _write_weights(state: dict[str, Tensor], path: Path) -> None:
    """Write a weight file atomically."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        torch.save(state, partial)
    except RuntimeError as error:  # torch's error for a full disk
        partial.unlink()
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"{str(path)!r} could not be written completely ({reason}). "
            "Free some space on its disk."
        ) from error
    sync(partial)
    partial.replace(path)


def read_inherited(checkpoint: Path, manifest: Manifest) -> dict[str, Tensor]:
    """Return the inherited frozen weights of a checkpoint, from the file in its parent directory.

    Raises:
        UserError: the file is not the one that the checkpoint was written with.
    """
    names = manifest.get("inherited", [])
    if not names:
        return {}
    path = checkpoint.parent / INHERITED
    state = load_file(path)
    missing = sorted(set(names) - state.keys())
    if missing:
        raise UserError(
            f"{str(path)!r} does not match its checkpoints, because it lacks {missing[0]!r}. "
            "Copy the file of the same run."
        )
    if file_digest(path) != manifest.get("inherited_file"):
        raise UserError(
            f"{str(path)!r} is not the file that {checkpoint.name} was written with. It was copied "
            "from another run, or replaced by a run that resumed here from another exp_dir. "
            "Copy the right file again, or remove the checkpoint."
        )
    return {name: state[name] for name in names}


def load_checkpoint(
    engine: deepspeed.DeepSpeedEngine, checkpoint: Path, manifest: Manifest
) -> None:
    """Load weights and optimizer on as many ranks as wrote them.

    Pickles can only build the objects that DeepSpeed's checkpoints hold.
    """
    check_files(checkpoint, manifest)
    # DeepSpeed looks for the file by a pattern, in which [1] of a directory's name means 1
    engine._get_all_ckpt_names = lambda folder, tag: [engine._get_ckpt_name(folder, tag)]
    with restricted_unpickling():
        # not strict, because the checkpoint does not contain the frozen weights
        loaded, _ = engine.load_checkpoint(
            str(checkpoint.parent), tag=checkpoint.name, load_module_strict=False
        )
        if loaded is None:
            raise ValueError("DeepSpeed found no file")


@contextlib.contextmanager
def explain_corruption(checkpoint: Path) -> Iterator[None]:
    """Raise UserError for the errors that a corrupted checkpoint causes in the block."""
    try:
        yield
    except (*BAD_ARCHIVE, OSError, AssertionError, pickle.UnpicklingError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"the checkpoint {str(checkpoint)!r} is corrupted ({reason}). "
            "Remove it to resume from the one before."
        ) from error
