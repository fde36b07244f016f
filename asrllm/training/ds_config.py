"""DeepSpeed's JSON: read, checked, its "auto" values filled from the run."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from asrllm.errors import UserError
from asrllm.text_files import read_json_object
from asrllm.training.config import TrainerConfig

# what "auto" is for sizes: as in the files in ds_configs
SIZES = {
    "reduce_bucket_size": 50_000_000,
    "allgather_bucket_size": 50_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "sub_group_size": 1_000_000_000,
}
STAGE_IN_NAME = re.compile(r"(?:zero|stage)[-_]?([0-3])")


def read_ds_config(config: TrainerConfig, *, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration of this run.

    Raises UserError where the file is missing or broken, where its stage is not what its name says, and where it contradicts the run.
    """
    path = find_ds_config(config.deepspeed_config)
    ds = read_json_object(path, "trainer.deepspeed_config")
    for key in ("zero_optimization", "bf16", "fp16"):
        if not isinstance(ds.get(key, {}), dict):
            raise UserError(f"{path}: {key}={ds[key]!r} must be an object")
    ds.setdefault("zero_optimization", {})["stage"] = check_stage(path, ds)
    accumulation = config.gradient_accumulation_steps
    _fill(ds, "train_micro_batch_size_per_gpu", 1, path)  # batches have a budget of tokens; DeepSpeed only multiplies this
    _fill(ds, "gradient_accumulation_steps", accumulation, path)
    _fill(ds, "train_batch_size", accumulation * world_size, path)
    _fill(ds, "gradient_clipping", config.gradient_clipping, path)
    for precision in ("bf16", "fp16"):
        _fill(ds.setdefault(precision, {"enabled": "auto"}), "enabled", config.precision == precision, path, prefix=f"{precision}.")
    _fill_optimizer(ds, config, path)
    for key, value in SIZES.items():
        if ds["zero_optimization"].get(key) == "auto":
            ds["zero_optimization"][key] = value
    check_layout(ds, path)
    check_device(ds, config, path)
    ds.setdefault("steps_per_print", 1 << 60)  # the run logs itself
    if left := next(_autos(ds), None):
        raise UserError(f'{path}: {left}="auto" is not filled from the run: give its value, or leave it out')
    return ds


def _fill_optimizer(ds: dict[str, Any], config: TrainerConfig, path: Path) -> None:
    """The optimizer of a user's own file takes its numbers from the run."""
    values = {"lr": config.lr, "betas": list(config.betas), "eps": 1e-8, "weight_decay": config.weight_decay}
    params = ds.get("optimizer", {}).setdefault("params", {}) if "optimizer" in ds else {}
    for key in values.keys() & params.keys():
        _fill(params, key, values[key], path, prefix="optimizer.params.")


def _autos(value: Any, name: str = "") -> Iterator[str]:
    """The names of what is still "auto"."""
    if value == "auto":
        yield name
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _autos(item, f"{name}.{key}" if name else key)


def check_layout(ds: dict[str, Any], path: Path) -> None:
    """Raises UserError for options under which weights lie elsewhere in checkpoints than they are looked for."""
    for key in ("round_robin_gradients", "parameter_alignment"):
        if ds["zero_optimization"].get(key):
            raise UserError(f"{path}: zero_optimization.{key} writes checkpoints that could not be read again: leave it out")


def check_device(ds: dict[str, Any], config: TrainerConfig, path: Path) -> None:
    """Raises UserError for what the machine cannot do; it would be a traceback when the model is loaded."""
    accelerator = get_accelerator()
    if config.precision == "fp16" and torch.float16 not in accelerator.supported_dtypes():
        raise UserError(f"trainer.precision=fp16 cannot run on this device ({accelerator.device_name()}): take bf16 or fp32")
    for part in ("offload_optimizer", "offload_param"):
        offload = ds["zero_optimization"].get(part) or {}
        if offload.get("device") != "nvme":
            continue
        if offload.get("nvme_path", "auto") == "auto":
            if not config.nvme_path:
                raise UserError(f"{path}: {part} is on a disk: give its directory, trainer.nvme_path=/local/disk")
            offload["nvme_path"] = config.nvme_path
        if part == "offload_optimizer" and (config.optimizer.name != "deepspeed_adamw" or config.use_averaged_model):
            raise UserError(f"{path}: an optimizer on a disk is trainer.optimizer.name=deepspeed_adamw, and has no use_averaged_model")
        if not disks_work():
            raise UserError(
                f"{path}: {part} on a disk needs DeepSpeed's async_io, which needs libaio: install libaio-dev, or take zero3_offload"
            )


def disks_work() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible(verbose=False))


def find_ds_config(name: str) -> Path:
    """The path as given, or one of the shipped files where the package is installed without its repository."""
    here = Path(__file__).resolve().parents[1]
    for path in (Path(name), here / name, here.parent / name):
        if path.is_file():
            return path
    raise UserError(f"trainer.deepspeed_config={name!r} does not exist: give a DeepSpeed JSON such as ds_configs/zero3.json")


def check_stage(path: Path, ds: dict[str, Any]) -> int:
    """The stage of the file; DeepSpeed takes a missing one for 0, so a name that promises another is an error."""
    stage = ds.get("zero_optimization", {}).get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage={stage!r} must be 0, 1, 2 or 3")
    if (named := STAGE_IN_NAME.search(path.stem)) and int(named.group(1)) != stage:
        raise UserError(
            f"{path} is named for ZeRO stage {named.group(1)}, but its zero_optimization.stage is {stage}: correct the stage or the name"
        )
    return stage


def _fill(ds: dict[str, Any], key: str, value: Any, path: Path, prefix: str = "") -> None:
    found = ds.get(key, "auto")
    if found not in ("auto", value):
        raise UserError(f'{path}: {prefix}{key}={found!r} contradicts the run, which has {value!r}: write "auto" there')
    ds[key] = value
