"""The DeepSpeed JSON of a run: read, checked, and completed from the run's own settings."""

import contextlib
import copy
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hjson
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys

from asrllm.errors import UserError
from asrllm.text_files import read_text
from asrllm.training.ds_keys import NUMBER, SWITCH, Kinds, check_keys, check_type, correction
from asrllm.training.run_config import TrainerConfig

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
BATCHES = "data.sampler sets the size of batches"
EPSILON = 1e-8  # of every AdamW that a run can choose
# DeepSpeed's schedulers: the schedule of a run that is most alike
SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
SCHEDULER_KEYS = {
    "warmup_max_lr": "trainer.lr",
    "warmup_num_steps": "trainer.warmup_steps",
    "total_num_steps": "trainer.num_steps",
    "cos_min_ratio": "trainer.min_lr_ratio",
}
OPTIMIZER_PARAMS: dict[str, Kinds] = {
    "lr": NUMBER,
    "betas": (list,),
    "eps": NUMBER,
    "weight_decay": NUMBER,
    "bias_correction": SWITCH,
    "amsgrad": SWITCH,
    "adam_w_mode": SWITCH,
    "torch_adam": SWITCH,
    "fp32_optimizer_states": SWITCH,
}


def read_ds_config(config: TrainerConfig, *, world_size: int) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a run, with every "auto" replaced.

    The optimizer is the run's own, so the result has no `optimizer` block: what the file says of it
    must agree with `trainer.*`.

    Args:
        config: the `trainer` part of the run's configuration.
        world_size: the number of processes.

    Raises:
        UserError: the file is missing or broken, its stage is not the one that its name says, a key
            or a value is wrong, or it contradicts the run.
    """
    path = find_ds_config(config.deepspeed_config)
    ds = read_hjson(path)
    check_keys(ds, path)
    refuse_scheduler(ds, path)
    zero = ds.setdefault("zero_optimization", {})
    zero["stage"] = check_stage(path, ds)
    check_offload(zero, path)
    accumulation = config.gradient_accumulation_steps
    # batches have a budget of tokens; DeepSpeed only multiplies the first of these
    _fill(ds, "train_micro_batch_size_per_gpu", 1, BATCHES, path)
    _fill(
        ds, "gradient_accumulation_steps", accumulation, "trainer.gradient_accumulation_steps", path
    )
    _fill(ds, "train_batch_size", accumulation * world_size, BATCHES, path)
    _fill(ds, "gradient_clipping", config.gradient_clipping, "trainer.gradient_clipping", path)
    for precision in ("bf16", "fp16"):
        block = ds.setdefault(precision, {"enabled": "auto"})
        enabled = config.precision == precision
        _fill(
            block,
            "enabled",
            enabled,
            f"trainer.precision={config.precision}",
            path,
            place=precision,
        )
    check_optimizer(ds.pop("optimizer", None), config, path)
    choose_optimizer_checks(ds, config, path)
    for key, value in SIZES.items():
        if zero.get(key) == "auto":
            zero[key] = value
    check_layout(ds, path)
    check_device(ds, config, path)
    ds.setdefault("steps_per_print", 1 << 60)  # the run logs itself
    if left := next(_autos(ds), None):
        raise UserError(
            f'{path}: {left}="auto" is not filled in from the run. Give its value, or remove it.'
        )
    check_as_deepspeed(ds, path)
    return ds


def read_hjson(path: Path) -> dict[str, Any]:
    """Return the content of a DeepSpeed JSON, read as DeepSpeed reads it.

    Comments and trailing commas are allowed. A key that occurs twice is an error.
    """
    text = read_text(path, "trainer.deepspeed_config")
    try:
        content = hjson.loads(text, object_pairs_hook=_unique_keys)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid JSON: {' '.join(str(error).split())}. Correct the file."
        ) from error
    if not isinstance(content, dict) or not text.strip():
        raise UserError(
            f"{path} does not hold a JSON object. Give a DeepSpeed JSON, such as ds_configs/zero3.json."
        )
    return dict(content)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    try:
        return dict_raise_error_on_duplicate_keys(pairs)
    except ValueError as error:
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"{repeated!r} occurs twice in one object. Remove one of them.") from error


def refuse_scheduler(ds: dict[str, Any], path: Path) -> None:
    """Raise UserError for a `scheduler` block, with the settings of a run that are most alike."""
    if "scheduler" not in ds:
        return
    block = ds["scheduler"]
    schedule = SCHEDULES.get(block.get("type", ""))
    settings = [f"trainer.schedule.name={schedule}"] if schedule else ["trainer.schedule.name"]
    for key, ours in SCHEDULER_KEYS.items():
        value = block.get("params", {}).get(key)
        if value is not None:
            settings.append(ours if value == "auto" else f"{ours}={value}")
    raise UserError(
        f"{path}: 'scheduler' is not used, because a run has its own learning-rate schedule. "
        f"Remove the block, and set {' '.join(settings)}."
    )


def check_optimizer(block: dict[str, Any] | None, config: TrainerConfig, path: Path) -> None:
    """Raise UserError for an `optimizer` block that contradicts the run's optimizer."""
    if block is None:
        return
    name, kind, params = config.optimizer.name, block.get("type"), block.get("params", {})
    if kind is None:
        raise UserError(
            f'{path}: optimizer.type is missing. Write "type": "AdamW", or remove the block.'
        )
    if kind.lower() not in ("adam", "adamw", "auto"):
        raise UserError(
            f"{path}: optimizer.type={kind!r} contradicts trainer.optimizer.name={name}. "
            "Remove the block, and set trainer.optimizer.name=adamw, deepspeed_adamw or scaled_adam."
        )
    if name == "scaled_adam":
        raise UserError(
            f"{path}: optimizer.type={kind!r} contradicts trainer.optimizer.name={name}. "
            "Remove the block, or set trainer.optimizer.name=adamw."
        )
    if "max_grad_norm" in params:
        raise UserError(
            f"{path}: optimizer.params.max_grad_norm is not supported. Remove it, and set trainer.gradient_clipping."
        )
    for key, value in params.items():
        place = f"optimizer.params.{key}"
        if key not in OPTIMIZER_PARAMS:
            raise UserError(
                f"{path}: {place} is not an option of AdamW here. {correction(key, OPTIMIZER_PARAMS)}"
            )
        check_type(value, OPTIMIZER_PARAMS[key], place, path)
    fixed = {
        "eps": EPSILON,
        "bias_correction": True,
        "amsgrad": False,
        "fp32_optimizer_states": True,
    }
    for key, value in fixed.items():
        _fill(params, key, value, f"trainer.optimizer.name={name}", path, place="optimizer.params")
    if kind.lower() == "adam":  # an Adam without it adds the decay to the gradient
        _fill(
            params,
            "adam_w_mode",
            True,
            f"trainer.optimizer.name={name}",
            path,
            place="optimizer.params",
        )
    _fill(
        params,
        "torch_adam",
        name == "adamw",
        f"trainer.optimizer.name={name}",
        path,
        place="optimizer.params",
    )
    for key in ("lr", "betas", "weight_decay"):
        _fill(params, key, getattr(config, key), f"trainer.{key}", path, place="optimizer.params")


def choose_optimizer_checks(ds: dict[str, Any], config: TrainerConfig, path: Path) -> None:
    """Let DeepSpeed accept the run's optimizer.

    With offload it accepts its own CPU Adam alone unless zero_force_ds_cpu_optimizer is false.
    """
    name, offloads = config.optimizer.name, "offload_optimizer" in ds["zero_optimization"]
    if name == "deepspeed_adamw" or not (offloads or name == "scaled_adam"):
        return
    if ds.get("zero_force_ds_cpu_optimizer") is True and offloads:
        raise UserError(
            f"{path}: zero_force_ds_cpu_optimizer=True contradicts trainer.optimizer.name={name}. "
            "Set trainer.optimizer.name=deepspeed_adamw, or remove the key."
        )
    ds["zero_force_ds_cpu_optimizer"] = False
    ds["zero_allow_untested_optimizer"] = True


def check_offload(zero: dict[str, Any], path: Path) -> None:
    """Drop offloading to nowhere, and raise UserError for offloading that the stage does not have."""
    for key, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        device = (zero.get(key) or {}).get("device", "none")
        if device in (None, "none"):
            zero.pop(key, None)
        elif zero["stage"] < lowest:
            raise UserError(
                f"{path}: zero_optimization.{key} has no effect at stage {zero['stage']}. "
                f"Remove it, or set the stage to {'3' if lowest == 3 else '1, 2 or 3'}."
            )


def check_run(config: TrainerConfig, ds: dict[str, Any]) -> None:
    """Raise UserError for settings of a run that its ZeRO stage does not allow."""
    stage = ds["zero_optimization"]["stage"]
    if config.optimizer.name == "deepspeed_adamw" and stage == 0:
        raise UserError(
            "trainer.optimizer.name=deepspeed_adamw has no checkpoints at ZeRO stage 0: choose adamw, or ds_configs/zero1.json"
        )
    if config.compile and stage == 3:
        raise UserError(
            "trainer.compile=true does not go with ZeRO-3, which gathers a layer's weights as it is run: take stage 0, 1 or 2"
        )


def check_as_deepspeed(ds: dict[str, Any], path: Path) -> None:
    """Raise UserError for what DeepSpeed itself would refuse when the model is loaded."""
    alone = copy.deepcopy(ds) | {
        "train_batch_size": ds["gradient_accumulation_steps"]
    }  # no other process is known yet
    try:
        with quiet(logging.getLogger("DeepSpeed")):
            DeepSpeedConfig(alone)
    except (
        DeepSpeedConfigError,
        ValueError,
        AssertionError,
        TypeError,
        AttributeError,
        KeyError,
    ) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{path} is refused by DeepSpeed: {reason}. Correct the file.") from error


@contextlib.contextmanager
def quiet(logger: logging.Logger) -> Iterator[None]:
    """Let a logger pass errors alone."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _autos(value: Any, name: str = "") -> Iterator[str]:
    """The names of what is still "auto"."""
    if (
        value == "auto" and name != "data_types.keep_in_fp32_modules"
    ):  # there DeepSpeed has an "auto" of its own
        yield name
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _autos(item, f"{name}.{key}" if name else key)


def check_layout(ds: dict[str, Any], path: Path) -> None:
    """Raises UserError for options under which weights lie elsewhere in checkpoints than they are looked for."""
    for key in ("round_robin_gradients", "parameter_alignment"):
        if ds["zero_optimization"].get(key):
            raise UserError(
                f"{path}: zero_optimization.{key} writes checkpoints that could not be read again: leave it out"
            )


def check_device(ds: dict[str, Any], config: TrainerConfig, path: Path) -> None:
    """Raises UserError for what the machine cannot do; it would be a traceback when the model is loaded."""
    accelerator = get_accelerator()
    if config.precision == "fp16" and torch.float16 not in accelerator.supported_dtypes():
        raise UserError(
            f"trainer.precision=fp16 cannot run on this device ({accelerator.device_name()}): take bf16 or fp32"
        )
    for part in ("offload_optimizer", "offload_param"):
        offload = ds["zero_optimization"].get(part) or {}
        if offload.get("device") != "nvme":
            continue
        if offload.get("nvme_path", "auto") == "auto":
            if not config.nvme_path:
                raise UserError(
                    f"{path}: {part} is on a disk: give its directory, trainer.nvme_path=/local/disk"
                )
            offload["nvme_path"] = config.nvme_path
        if part == "offload_optimizer" and (
            config.optimizer.name != "deepspeed_adamw" or config.use_averaged_model
        ):
            raise UserError(
                f"{path}: an optimizer on a disk is trainer.optimizer.name=deepspeed_adamw, and has no use_averaged_model"
            )
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
    raise UserError(
        f"trainer.deepspeed_config={name!r} does not exist: give a DeepSpeed JSON such as ds_configs/zero3.json"
    )


def check_stage(path: Path, ds: dict[str, Any]) -> int:
    """The stage of the file; DeepSpeed takes a missing one for 0, so a name that promises another is an error."""
    stage = ds["zero_optimization"].get("stage", 0)
    if stage == "auto":
        raise UserError(
            f'{path}: zero_optimization.stage="auto" is not filled in from the run. Use one of 0, 1, 2, 3.'
        )
    stage = int(stage)
    if (named := STAGE_IN_NAME.search(path.stem)) and int(named.group(1)) != stage:
        raise UserError(
            f"{path} is named for ZeRO stage {named.group(1)}, but its zero_optimization.stage is {stage}: correct the stage or the name"
        )
    return stage


def _fill(
    ds: dict[str, Any], key: str, value: Any, ours: str, path: Path, *, place: str = ""
) -> None:
    """Set a key to the run's value.

    Args:
        ds: the block of the file.
        key: the key in the block.
        value: the run's value.
        ours: where the run's value comes from: its key, its key and value, or a sentence.
        path: the file, for the message.
        place: the name of the block.

    Raises:
        UserError: the file has another value.
    """
    found = ds.get(key, "auto")
    if found not in ("auto", value):
        name = f"{place}.{key}" if place else key
        is_key = ours.startswith("trainer.") and "=" not in ours
        reason = f"{ours}={value!r}" if is_key else f"the run's {value!r} ({ours})"
        fix = f" or set {ours}={str(found).replace(' ', '')}" if is_key else " or remove it"
        raise UserError(
            f'{path}: {name}={found!r} contradicts {reason}. Write "auto" in the file,{fix}.'
        )
    ds[key] = value
