"""DeepSpeed's JSON: read, checked, its "auto" values filled from the run."""

import re
from pathlib import Path
from typing import Any

from asrllm.config import read_json_object
from asrllm.errors import UserError
from asrllm.training.config import TrainerConfig

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
    ds.setdefault("steps_per_print", 1 << 60)  # the run logs itself
    return ds


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
