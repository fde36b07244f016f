"""Read the DeepSpeed JSON of a run, check it, and complete it from the run's settings."""

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
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError, DtypeEnum

from asrllm.errors import UserError
from asrllm.schema import shown
from asrllm.text_files import json_problem, object_with_unique_keys, read_text
from asrllm.training.ds_keys import (
    BOOLEAN,
    NUMBER,
    NVME,
    DsConfig,
    Kinds,
    check_keys,
    check_type,
    correction,
    has_type,
)
from asrllm.training.run_config import TrainerConfig

# Sizes that replace "auto", the same as in the files in ds_configs.
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
# a value that Python writes, although JSON does not have it, or a number that overflows
NOT_A_NUMBER = re.compile(r":\s*(-?(?:NaN|Infinity|\d+e\d{3,}))\b")
GIVE_DS_CONFIG = "Give a DeepSpeed JSON, for example ds_configs/zero3.json."
BATCHES = "data.sampler sets the size of batches"
EPSILON = 1e-8  # the epsilon of every AdamW that a run can choose
NO_PRINTS = 1 << 60  # steps between DeepSpeed's own log lines, because the run has its own log
# DeepSpeed's schedulers and the most similar schedule of a run.
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
    "bias_correction": BOOLEAN,
    "amsgrad": BOOLEAN,
    "adam_w_mode": BOOLEAN,
    "torch_adam": BOOLEAN,
    "fp32_optimizer_states": BOOLEAN,
}


def read_ds_config(config: TrainerConfig, *, world_size: int) -> DsConfig:
    """Return the DeepSpeed configuration of a run with every "auto" replaced.

    The run builds its own optimizer, so the result has no `optimizer` block. The block in the file
    must agree with `trainer.*`.

    Args:
        config: `trainer` part of the run's configuration.
        world_size: number of processes.

    Raises:
        UserError: the file is missing or not valid, its name and its stage differ, a key or a value
            is wrong, or it contradicts the run.
    """
    path = find_ds_config(config.deepspeed_config)
    ds = read_hjson(path)
    check_keys(ds, path)
    reject_scheduler(ds, path)
    zero = ds.setdefault("zero_optimization", {})
    zero["stage"] = check_stage(path, ds)
    check_offload(zero, path)
    fill_sizes(ds, config, world_size, path)
    for precision in ("bf16", "fp16"):
        block = ds.setdefault(precision, {"enabled": "auto"})
        enabled = config.precision == precision
        source = f"trainer.precision={config.precision}"
        _fill(block, "enabled", enabled, source, path, place=precision)
    check_ds_dtypes(ds, config, path)
    check_optimizer(ds.pop("optimizer", None), config, path)
    choose_optimizer_checks(ds, config, path)
    check_device(ds, config, path)
    ds.setdefault("steps_per_print", NO_PRINTS)
    unfilled = next(_autos(ds), None)
    if unfilled:
        raise UserError(
            f'{path}: {unfilled}="auto" is not filled in from the run. '
            "Give its value, or remove it."
        )
    check_as_deepspeed(ds, path)
    return ds


def fill_sizes(ds: DsConfig, config: TrainerConfig, world_size: int, path: Path) -> None:
    """Fill in batch sizes, clipping and bucket sizes.

    A batch is limited by its tokens. DeepSpeed only multiplies train_micro_batch_size_per_gpu, so
    it is 1.
    """
    accumulation = config.gradient_accumulation_steps
    accumulation_key = "trainer.gradient_accumulation_steps"
    _fill(ds, "train_micro_batch_size_per_gpu", 1, BATCHES, path)
    _fill(ds, "gradient_accumulation_steps", accumulation, accumulation_key, path)
    _fill(ds, "train_batch_size", accumulation * world_size, BATCHES, path)
    _fill(ds, "gradient_clipping", config.gradient_clipping, "trainer.gradient_clipping", path)
    zero = ds["zero_optimization"]
    for key, value in SIZES.items():
        if zero.get(key) == "auto":
            zero[key] = value


def read_hjson(path: Path) -> DsConfig:
    """Return the content of a DeepSpeed JSON, read in the same way as DeepSpeed reads it.

    Comments and trailing commas are allowed. A repeated key is an error.

    Raises:
        UserError: the file is missing or is not a valid JSON object.
    """
    name = f"trainer.deepspeed_config={str(path)!r}"
    text = read_text(path, "trainer.deepspeed_config")
    try:
        content = hjson.loads(text, object_pairs_hook=_unique_keys)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except (ValueError, RecursionError, OverflowError) as error:
        problem = json_problem(error, path)
        if found := _not_a_number(text):
            problem = f"{str(path)!r} is not valid JSON: {found} is not a number"
        raise UserError(f"trainer.deepspeed_config {problem}. Correct the file.") from error
    if not isinstance(content, dict) or not text.strip():
        raise UserError(f"{name} is not a JSON object. {GIVE_DS_CONFIG}")
    return dict(content)


def _not_a_number(text: str) -> str:
    """Return the value that makes a file invalid JSON, or "" if there is another problem."""
    found = NOT_A_NUMBER.search(text)
    try:
        hjson.loads(NOT_A_NUMBER.sub(": 0", text))
    except (ValueError, RecursionError, OverflowError):
        return ""
    return found[1] if found else ""


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object of the file, or raise UserError if a key is repeated."""
    try:
        return object_with_unique_keys(pairs)
    except ValueError as error:
        raise UserError(f"{error}. Remove one of them.") from error


def reject_scheduler(ds: DsConfig, path: Path) -> None:
    """Raise UserError for a `scheduler` block. The message names the run's equivalent settings."""
    if "scheduler" not in ds:
        return
    block = ds["scheduler"]
    schedule = SCHEDULES.get(block.get("type", ""))
    settings = [f"trainer.schedule.name={schedule}"] if schedule else ["trainer.schedule.name"]
    for key, run_key in SCHEDULER_KEYS.items():
        value = block.get("params", {}).get(key)
        if value is not None:
            settings.append(run_key if value == "auto" else f"{run_key}={value}")
    raise UserError(
        f"{path}: 'scheduler' is not used, because a run has its own learning-rate schedule. "
        f"Remove the block, and set {' '.join(settings)}."
    )


def check_optimizer(block: DsConfig | None, config: TrainerConfig, path: Path) -> None:
    """Raise UserError for an `optimizer` block that contradicts the run's optimizer."""
    if block is None:
        return
    name = config.optimizer.name
    kind = block.get("type")
    if kind is None:
        raise UserError(
            f'{path}: optimizer.type is missing. Write "type": "AdamW", or remove the block.'
        )
    contradiction = f"{path}: optimizer.type={kind!r} contradicts trainer.optimizer.name={name}."
    if kind.lower() not in ("adam", "adamw", "auto"):
        raise UserError(
            f"{contradiction} Remove the block, and set trainer.optimizer.name=adamw, "
            "deepspeed_adamw or scaled_adam."
        )
    if name == "scaled_adam":
        raise UserError(f"{contradiction} Remove the block, or set trainer.optimizer.name=adamw.")
    params = block.get("params", {})
    check_optimizer_keys(params, path)
    fixed: dict[str, object] = {
        "eps": EPSILON,
        "bias_correction": True,
        "amsgrad": False,
        "fp32_optimizer_states": True,
    }
    if kind.lower() == "adam":  # an Adam without it adds the decay to the gradient
        fixed["adam_w_mode"] = True
    fixed["torch_adam"] = name == "adamw"
    for key, value in fixed.items():
        source = f"trainer.optimizer.name={name}"
        _fill(params, key, value, source, path, place="optimizer.params")
    for key in ("lr", "betas", "weight_decay"):
        value = getattr(config, key)
        _fill(params, key, value, f"trainer.{key}", path, place="optimizer.params")


def check_optimizer_keys(params: DsConfig, path: Path) -> None:
    """Raise UserError for an unknown key or a wrong type in optimizer.params."""
    if "max_grad_norm" in params:
        raise UserError(
            f"{path}: optimizer.params.max_grad_norm is not supported. "
            "Remove it, and set trainer.gradient_clipping."
        )
    for key, value in params.items():
        place = f"optimizer.params.{key}"
        if key not in OPTIMIZER_PARAMS:
            raise UserError(
                f"{path}: {place} is not a supported option of AdamW. "
                f"{correction(key, OPTIMIZER_PARAMS)}"
            )
        check_type(value, OPTIMIZER_PARAMS[key], place, path)
    betas = params.get("betas", "auto")
    if betas != "auto" and not _are_betas(betas):
        raise UserError(
            f"{path}: optimizer.params.betas={shown(betas)} is not a list of two numbers of at "
            "least 0 and below 1. Correct it, or remove the key."
        )


def _are_betas(values: list[Any]) -> bool:
    if not all(has_type(value, NUMBER) for value in values):
        return False
    return len(values) == 2 and all(0 <= value < 1 for value in values)


def choose_optimizer_checks(ds: DsConfig, config: TrainerConfig, path: Path) -> None:
    """Let DeepSpeed accept the run's optimizer.

    With offload DeepSpeed only accepts its own CPU Adam, unless zero_force_ds_cpu_optimizer is
    false.

    Raises:
        UserError: the file sets that key to true.
    """
    name = config.optimizer.name
    offloads = "offload_optimizer" in ds["zero_optimization"]
    if name == "deepspeed_adamw" or not (offloads or name == "scaled_adam"):
        return
    if ds.get("zero_force_ds_cpu_optimizer") is True and offloads:
        raise UserError(
            f"{path}: zero_force_ds_cpu_optimizer=true contradicts trainer.optimizer.name={name}. "
            "Set trainer.optimizer.name=deepspeed_adamw, or remove the key."
        )
    ds["zero_force_ds_cpu_optimizer"] = False
    ds["zero_allow_untested_optimizer"] = True


def check_ds_dtypes(ds: DsConfig, config: TrainerConfig, path: Path) -> None:
    """Raise UserError for dtypes with which DeepSpeed could not train at the run's precision."""
    fixed = ["param_dtype"]
    if ds["zero_optimization"]["stage"] == 0:
        fixed.append("grad_accum_dtype")
    for key in fixed:
        name = ds.get("data_types", {}).get(key)
        if name is not None and DtypeEnum(name) != DtypeEnum(config.precision):
            raise UserError(
                f"{path}: data_types.{key}={name!r} contradicts "
                f"trainer.precision={config.precision}. Remove it."
            )


def check_offload(zero: DsConfig, path: Path) -> None:
    """Remove offload blocks whose device is "none".

    Raises:
        UserError: the ZeRO stage does not support an offload, only a part would be offloaded, or
            the device is NVMe: DeepSpeed's checkpoints lack what is on the disk, so that a resumed
            run had other losses (DeepSpeed 0.19).
    """
    for key, lowest_stage in (("offload_optimizer", 1), ("offload_param", 3)):
        device = (zero.get(key) or {}).get("device", "none")
        if device in (None, "none"):
            zero.pop(key, None)
        elif device == NVME:
            raise UserError(
                f"{path}: zero_optimization.{key}.device='nvme' is not supported, because "
                "checkpoints would be incomplete. Use 'cpu', as in ds_configs/zero3_offload.json."
            )
        elif zero["stage"] < lowest_stage:
            stages = "3" if lowest_stage == 3 else "1, 2 or 3"
            raise UserError(
                f"{path}: zero_optimization.{key} has no effect at stage {zero['stage']}. "
                f"Remove it, or set the stage to {stages}."
            )
    ratio = zero.get("offload_optimizer", {}).get("ratio", 1)
    if ratio != 1:
        raise UserError(
            f"{path}: zero_optimization.offload_optimizer.ratio={ratio} is not supported. "
            "Remove it."
        )


def check_settings(config: TrainerConfig, ds: DsConfig) -> None:
    """Raise UserError for settings of a run that its ZeRO stage does not support."""
    stage = ds["zero_optimization"]["stage"]
    if config.optimizer.name == "deepspeed_adamw" and stage == 0:
        raise UserError(
            "trainer.optimizer.name=deepspeed_adamw cannot save checkpoints at ZeRO stage 0. "
            "Set trainer.optimizer.name=adamw, or trainer.deepspeed_config=ds_configs/zero1.json."
        )
    if config.compile and stage == 3:
        raise UserError(
            "trainer.compile=true does not work at ZeRO stage 3, which gathers the weights of a "
            "layer when it runs. Use stage 0, 1 or 2."
        )


def check_as_deepspeed(ds: DsConfig, path: Path) -> None:
    """Raise UserError for what DeepSpeed itself would reject when the model is loaded."""
    # DeepSpeed does not know of the other processes yet
    single_process = copy.deepcopy(ds)
    single_process["train_batch_size"] = ds["gradient_accumulation_steps"]
    try:
        with quiet(logging.getLogger("DeepSpeed")):
            DeepSpeedConfig(single_process)
    except (
        DeepSpeedConfigError,
        ValueError,
        AssertionError,
        TypeError,
        AttributeError,
        KeyError,
    ) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{path} is rejected by DeepSpeed: {reason}. Correct the file.") from error


@contextlib.contextmanager
def quiet(logger: logging.Logger) -> Iterator[None]:
    """Let a logger print nothing but errors in the block."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _autos(value: object, name: str = "") -> Iterator[str]:
    """Yield the names of keys whose value is still "auto"."""
    # the exception is a key in which DeepSpeed itself supports "auto"
    if value == "auto" and name != "data_types.keep_in_fp32_modules":
        yield name
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _autos(item, f"{name}.{key}" if name else key)


def check_device(ds: DsConfig, config: TrainerConfig, path: Path) -> None:
    """Raise UserError for what this machine does not support.

    Without this check DeepSpeed would fail with a traceback when the model is loaded.
    """
    accelerator = get_accelerator()
    if config.precision == "fp16" and torch.float16 not in accelerator.supported_dtypes():
        raise UserError(
            f"trainer.precision=fp16 is not supported on this device "
            f"({accelerator.device_name()}). Set trainer.precision to bf16 or fp32."
        )


def find_ds_config(name: str) -> Path:
    """Return a path as given, or that of a shipped file if only the package is installed."""
    package = Path(__file__).resolve().parents[1]
    for path in (Path(name), package / name, package.parent / name):
        if path.is_file():
            return path
    raise UserError(f"trainer.deepspeed_config={name!r} does not exist. {GIVE_DS_CONFIG}")


def check_stage(path: Path, ds: DsConfig) -> int:
    """Return the ZeRO stage of a file.

    Raises:
        UserError: the stage is "auto" or does not match the file's name. DeepSpeed would use stage
            0 if the key is missing.
    """
    stage = ds["zero_optimization"].get("stage", 0)
    if stage == "auto":
        raise UserError(
            f'{path}: zero_optimization.stage="auto" is not filled in from the run. '
            "Available: 0, 1, 2, 3."
        )
    stage = int(stage)
    named = STAGE_IN_NAME.search(path.stem)
    if named and int(named.group(1)) != stage:
        raise UserError(
            f"{path} is named for ZeRO stage {named.group(1)}, but its zero_optimization.stage is "
            f"{stage}. Correct the stage or the name."
        )
    return stage


def _fill(
    block: DsConfig, key: str, value: object, source: str, path: Path, *, place: str = ""
) -> None:
    """Set a key to the run's value.

    Args:
        block: a block of the file.
        key: key in the block.
        value: value of the run.
        source: where the run's value comes from: its key, its key and value, or a sentence.
        path: path of the file, for the message.
        place: name of the block.

    Raises:
        UserError: the file has another value.
    """
    current = block.get(key, "auto")
    if current not in ("auto", value):
        name = f"{place}.{key}" if place else key
        if source.startswith("trainer.") and "=" not in source:
            reason = f"{source}={shown(value)}"
            fix = f"or set {source}={shown(current).replace(' ', '')}"
            if isinstance(current, (int, float)) and current <= 0:
                fix = "or remove it"
        else:
            reason = f"the run's {shown(value)} ({source})"
            fix = "or remove it"
        raise UserError(
            f"{path}: {name}={shown(current)} contradicts {reason}. "
            f'Write "auto" in the file, {fix}.'
        )
    block[key] = value
