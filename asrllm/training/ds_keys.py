"""Keys of a DeepSpeed JSON: which ones DeepSpeed knows, and which types their values have."""

import difflib
import enum
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.runtime.config as ds_runtime
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from deepspeed.utils.logging import log_levels
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from asrllm.errors import UserError
from asrllm.schema import JSON_TYPES, bound_fix, shown

DsConfig = dict[str, Any]  # content of a DeepSpeed JSON
Block = Mapping[str, Any]  # an object in a DeepSpeed JSON
Kinds = tuple[type, ...]  # types that a value may have
INTEGER: Kinds = (int,)
NUMBER: Kinds = (int, float)
BOOLEAN: Kinds = (bool,)
STRING: Kinds = (str,)
OBJECT: Kinds = (dict,)

# DeepSpeed reads these keys with dict.get, so it detects neither a typing error nor a wrong type.
SCALARS: dict[str, Kinds] = {
    "train_batch_size": INTEGER,
    "train_micro_batch_size_per_gpu": INTEGER,
    "gradient_accumulation_steps": INTEGER,
    "managed_gradient_accumulation": BOOLEAN,
    "gradient_clipping": NUMBER,
    "gradient_predivide_factor": NUMBER,
    "gradient_allreduce_op": STRING,
    "prescale_gradients": BOOLEAN,
    "communication_data_type": (str, type(None)),
    "seq_parallel_communication_data_type": (str, type(None)),
    "disable_allgather": BOOLEAN,
    "zero_allow_untested_optimizer": BOOLEAN,
    "zero_force_ds_cpu_optimizer": BOOLEAN,
    "steps_per_print": (int, type(None)),
    "wall_clock_breakdown": BOOLEAN,
    "memory_breakdown": BOOLEAN,
    "dump_state": BOOLEAN,
    "disable_python_gc": BOOLEAN,
    "dataloader_drop_last": BOOLEAN,
    "log_level": (str, type(None)),
    "vocabulary_size": (int, type(None)),
    "use_data_before_expert_parallelism": BOOLEAN,
}
PLAIN_BLOCKS: dict[str, dict[str, Kinds]] = {
    "optimizer": {"type": STRING, "params": OBJECT, "legacy_fusion": BOOLEAN},
    "scheduler": {"type": STRING, "params": OBJECT},
    "activation_checkpointing": {
        "partition_activations": BOOLEAN,
        "number_checkpoints": (int, type(None)),
        "contiguous_memory_optimization": BOOLEAN,
        "synchronize_checkpoint_boundary": BOOLEAN,
        "profile": BOOLEAN,
        "cpu_checkpointing": BOOLEAN,
    },
    "checkpoint": {
        "tag_validation": STRING,
        "checkpoint_serialization": BOOLEAN,
        "load_universal": BOOLEAN,
        "use_node_local_storage": BOOLEAN,
        "parallel_write": OBJECT,
        "writer": OBJECT,
    },
    "data_types": {
        "grad_accum_dtype": (str, type(None)),
        "param_dtype": (str, type(None)),
        "buffer_dtype": (str, type(None)),
        "keep_in_fp32_modules": (str, list),
    },
    "flops_profiler": {
        "enabled": BOOLEAN,
        "recompute_fwd_factor": NUMBER,
        "profile_step": INTEGER,
        "module_depth": INTEGER,
        "top_modules": INTEGER,
        "detailed": BOOLEAN,
        "output_file": (str, type(None)),
    },
    "timers": {"throughput": OBJECT},
}
MODELS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "comms_logger": CommsLoggerConfig,
    "tensorboard": TensorBoardConfig,
    "wandb": WandbConfig,
    "csv_monitor": CSVConfig,
    "comet": CometConfig,
}
# of blocks within those for which DeepSpeed has no pydantic model
NESTED_MODELS: dict[str, type[BaseModel]] = {"timers.throughput": DeepSpeedThroughputTimerConfig}
NVME = "nvme"  # device of an offload, see check_offload in ds_config.py
NO_NVME = "Remove it: offload to NVMe is not supported."
MASTER_WEIGHTS = "Remove it: checkpoints have master weights and optimizer states in float32."
NOT_READ_AGAIN = "Remove it: its checkpoints could not be read again."
IN_BACKGROUND = "Remove it, and set trainer.background_checkpoints=true."
ANY_PROCESSES = "Remove it: a run resumes on any number of processes without it."
SET_PRECISION = "Remove it, and set trainer.precision."
# Features of DeepSpeed that runs do not support, and what to do instead.
UNSUPPORTED = {
    "activation_checkpointing": "Remove it, and set trainer.gradient_checkpointing=true.",
    "aio": NO_NVME,
    "autotuning": "Remove it, and run 'asrllm plan' for sizes that fit.",
    "bf16.bf16_master_weights_and_grads": MASTER_WEIGHTS,
    "bf16.bf16_optimizer_states": MASTER_WEIGHTS,
    "bfloat16": "Rename it to 'bf16'.",
    "checkpoint.load_universal": ANY_PROCESSES,
    "checkpoint.parallel_write": IN_BACKGROUND,
    "checkpoint.use_node_local_storage": "Remove it: exp_dir is on a disk that all nodes share.",
    "checkpoint.writer": IN_BACKGROUND,
    "comet": "Remove it, and set trainer.sinks.",
    "compile": "Remove it, and set trainer.compile=true.",
    "csv_monitor": "Remove it: metrics are in exp_dir/metrics.jsonl.",
    "data_efficiency": "Remove it, and set data.sampler and data.filter.",
    "datastates_ckpt": IN_BACKGROUND,
    "expert_parallel": "Remove it.",
    "flops_profiler": "Remove it, and set trainer.profile_steps.",
    "fp16.fp16_master_weights_and_grads": MASTER_WEIGHTS,
    "gradient_accumulation_dtype": "Remove it, and set data_types.grad_accum_dtype.",
    "hybrid_engine": "Remove it.",
    "load_universal_checkpoint": ANY_PROCESSES,
    "pipeline": "Remove it.",
    "sequence_parallel_size": "Remove it.",
    "tensorboard": "Remove it, and add tensorboard to trainer.sinks.",
    "tensor_parallel": "Remove it, and choose ZeRO stage 3 for models that do not fit.",
    "torch_autocast": SET_PRECISION,
    "wandb": "Remove it, and set trainer.wandb.mode=online.",
    "weight_quantization": "Remove it.",
    "zero_optimization.elastic_checkpoint": ANY_PROCESSES,
    "zero_optimization.leaf_module": "Remove it.",
    "zero_optimization.offload_optimizer.nvme_path": NO_NVME,
    "zero_optimization.offload_param.nvme_path": NO_NVME,
    "zero_optimization.legacy_stage1": "Remove it.",
    "zero_optimization.module_granularity_threshold": "Remove it.",
    "zero_optimization.offload_optimizer.super_offload": "Remove it.",
    "zero_optimization.parameter_alignment": NOT_READ_AGAIN,
    "zero_optimization.round_robin_gradients": NOT_READ_AGAIN,
    "zero_optimization.stage3_module_granularity_threshold": "Remove it.",
    "zero_optimization.zenflow": "Remove it.",
    # options of ZeRO++, which no run of this project has used yet
    "zero_optimization.zero_quantized_gradients": "Remove it.",
    "zero_optimization.zero_quantized_nontrainable_weights": "Remove it.",
    "zero_optimization.zero_quantized_weights": "Remove it.",
}
DTYPE_NAMES = ("fp32", "float32", "bf16", "bfloat16", "fp16", "float16")
# Values that would change what a step computes.
FIXED: dict[str, tuple[object, str]] = {
    "gradient_allreduce_op": (
        "mean",
        "Remove it: the loss is divided by the supervised tokens of all ranks.",
    ),
    "managed_gradient_accumulation": (
        True,
        "Remove it, and set trainer.gradient_accumulation_steps.",
    ),
}
# Keys for the division of gradients by the number of ranks, before or after the sum. ZeRO asserts
# that they have these values.
ONLY_WITHOUT_ZERO = {"prescale_gradients": False, "gradient_predivide_factor": 1.0}
KNOWN_KEYS = frozenset(
    {*SCALARS, *PLAIN_BLOCKS, *MODELS} | {key for key in UNSUPPORTED if "." not in key}
)


def check_keys(ds: DsConfig, path: Path) -> None:
    """Check every key and the type of every value, and remove blocks that are switched off.

    Args:
        ds: content of the file.
        path: path of the file, for the messages.

    Raises:
        UserError: a key is unknown or was removed from DeepSpeed, a value has the wrong type, or a
            feature is not supported.
    """
    check_removed(ds, path)
    for key in list(ds):
        if key not in KNOWN_KEYS:
            raise unknown_ds_key(repr(key), key, KNOWN_KEYS, path)
        value = ds[key]
        _check_value(key, value, path)
        if key in UNSUPPORTED and is_off(value):
            del ds[key]
    check_supported(ds, path)


def _check_value(key: str, value: Any, path: Path) -> None:
    """Raise UserError if the value of a top-level key has the wrong type or content."""
    if key in SCALARS:
        check_type(value, SCALARS[key], key, path)
        if key == "steps_per_print" and isinstance(value, int) and value < 1:
            raise UserError(f"{path}: steps_per_print={value} is less than 1. Remove it.")
    elif key in MODELS:
        check_type(value, OBJECT, key, path)
        check_model(MODELS[key], value, key, path)
    elif key in PLAIN_BLOCKS:
        check_type(value, OBJECT, key, path)
        check_block(PLAIN_BLOCKS[key], value, key, path)


def check_removed(ds: Block, path: Path) -> None:
    """Raise UserError for a key of earlier versions of DeepSpeed."""
    removed = {key: getattr(ds_runtime, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {}) for key in ds}
    zero = ds.get("zero_optimization")
    if isinstance(zero, dict):
        removed_zero = getattr(ds_runtime, "_REMOVED_ZERO_CONFIG_KEYS", {})
        for key in zero:
            removed[f"zero_optimization.{key}"] = removed_zero
    for place, known in removed.items():
        if place.rpartition(".")[2] in known:
            fix = SET_PRECISION if place == "amp" else "Remove it."
            raise UserError(
                f"{path}: {place} was removed from DeepSpeed. "
                f"The installed version is {deepspeed.__version__}. {fix}"
            )


def check_supported(ds: Block, path: Path) -> None:
    """Raise UserError for a feature that runs do not support."""
    used = list(ds)
    zero = ds.get("zero_optimization", {})
    blocks = {
        "bf16": ds.get("bf16"),
        "checkpoint": ds.get("checkpoint"),
        "fp16": ds.get("fp16"),
        "zero_optimization": zero,
        "zero_optimization.offload_optimizer": zero.get("offload_optimizer"),
    }
    for block, content in blocks.items():
        used += [f"{block}.{key}" for key, value in (content or {}).items() if value]
    for place in used:
        if place in UNSUPPORTED:
            raise UserError(f"{path}: {place!r} is not supported. {UNSUPPORTED[place]}")
    partition_size = zero.get("zero_hpz_partition_size", 1)
    if partition_size != 1:  # of ZeRO++
        raise UserError(
            f"{path}: zero_optimization.zero_hpz_partition_size={partition_size!r} is not "
            "supported. Remove it."
        )
    for key, name in ds.get("data_types", {}).items():
        if key.endswith("_dtype") and name is not None and name not in DTYPE_NAMES:
            raise UserError(
                f"{path}: data_types.{key}={name!r} is unknown. "
                f"Available: {', '.join(DTYPE_NAMES)}."
            )
    level = ds.get("log_level")
    if level is not None and level.lower() not in log_levels:
        raise UserError(
            f"{path}: log_level={level!r} is unknown. Available: {', '.join(log_levels)}."
        )
    for key, (value, fix) in FIXED.items():
        if ds.get(key, value) not in (value, "auto"):
            raise UserError(f"{path}: {key}={ds[key]!r} is not supported. {fix}")
    if ds.get("gradient_predivide_factor") == 0:
        raise UserError(f"{path}: gradient_predivide_factor=0 divides by zero. Remove it.")
    for key, value in ONLY_WITHOUT_ZERO.items():
        if zero.get("stage", 0) and ds.get(key, value) not in (value, "auto"):
            raise UserError(
                f"{path}: {key}={ds[key]!r} does not work with ZeRO stage {zero['stage']}. "
                "Remove it."
            )


def is_off(value: object) -> bool:
    """Return whether a block of the file switches nothing on."""
    if not isinstance(value, dict):
        return not value
    return value.get("enabled") is False or not any(value.values())


def check_block(known: Mapping[str, Kinds], block: Block, place: str, path: Path) -> None:
    """Check a block for which DeepSpeed has no pydantic model.

    Args:
        known: types of the values by key.
        block: the block.
        place: name of the block, for the messages.
        path: path of the file, for the messages.

    Raises:
        UserError: a key is unknown or a value has the wrong type.
    """
    for key, value in block.items():
        name = f"{place}.{key}"
        if key not in known:
            raise unknown_ds_key(name, key, known, path)
        check_type(value, known[key], name, path)
        if name in NESTED_MODELS and isinstance(value, dict):
            check_model(NESTED_MODELS[name], value, name, path)


def _fields_by_key(model: type[BaseModel]) -> tuple[dict[str, FieldInfo], set[str]]:
    """Return the fields by their names and aliases, and the keys that are not deprecated."""
    fields: dict[str, FieldInfo] = {}
    current: set[str] = set()
    for name, field in model.model_fields.items():
        fields[name] = field
        if field.alias:
            fields[field.alias] = field
        if not replacement_of(field):
            current.add(field.alias or name)
    return fields, current


def check_model(model: type[BaseModel], block: Block, place: str, path: Path) -> None:
    """Check a block with DeepSpeed's pydantic model. "auto" is accepted everywhere.

    Args:
        model: DeepSpeed's model of the block.
        block: the block.
        place: name of the block, for the messages.
        path: path of the file, for the messages.

    Raises:
        UserError: a key is unknown or renamed, or a value is not valid.
    """
    fields, suggestions = _fields_by_key(model)
    for key, value in block.items():
        if key not in fields:
            raise unknown_ds_key(f"{place}.{key}", key, suggestions, path)
        check_field(fields[key], value, f"{place}.{key}", path)
    try:
        model(**without_autos(block))
    except ValidationError as error:
        raise invalid_value(error, place, path) from error
    except TypeError as error:  # of DeepSpeed's own checks
        raise UserError(
            f"{path}: {place} is rejected by DeepSpeed: {error}. Correct the value."
        ) from error


def check_field(field: FieldInfo, value: object, name: str, path: Path) -> None:
    """Check the value of one field of a pydantic model.

    Args:
        field: the field.
        value: value in the file.
        name: full name of the key, for the messages.
        path: path of the file, for the messages.

    Raises:
        UserError: the key was renamed, or the value is not valid.
    """
    new = replacement_of(field)
    if new:
        block = name.rpartition(".")[0]
        raise UserError(f"{path}: {name} is an old name. Use {block}.{new} instead.")
    kinds = list(annotated_types(field.annotation))
    nested = next((kind for kind in kinds if issubclass(kind, BaseModel)), None)
    if nested and isinstance(value, dict):
        check_model(nested, value, name, path)
        return
    plain = plain_kinds(kinds)
    if plain:
        check_type(value, plain, name, path)
        check_choice(value, kinds, name, path)


def invalid_value(error: ValidationError, place: str, path: Path) -> UserError:
    """Return the error for a value that DeepSpeed's pydantic model rejects."""
    first = error.errors()[0]
    name = ".".join([place, *map(str, first["loc"])])
    is_plain = isinstance(first["input"], (str, int, float, list, type(None)))
    value = f"={shown(first['input'])}" if is_plain else ""  # else a whole block
    kind = first["type"]
    fix = bound_fix(first)
    if fix is not None:
        return UserError(f"{path}: {name}{value} is out of range. {fix}")
    if kind in ("enum", "literal_error"):
        return UserError(f"{path}: {name}{value} is unknown. Choose {first['ctx']['expected']}.")
    if kind == "missing":
        return UserError(f"{path}: {name} is missing. Add it.")
    expected = JSON_TYPES.get(kind.partition("_")[0])
    if expected:
        return UserError(
            f"{path}: {name}{value} is not {expected}. Give {expected}, or remove the key."
        )
    reason = first["msg"]
    for prefix in ("Value error, ", "Assertion failed, "):
        reason = reason.removeprefix(prefix)
    reason = reason.rstrip(".")
    return UserError(
        f"{path}: {name}{value} is rejected by DeepSpeed: {reason}. Correct the value."
    )


def replacement_of(field: FieldInfo) -> str | None:
    """Return the new name of a deprecated field, or None if it is not deprecated."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and extra.get("deprecated"):
        return str(extra.get("new_param"))
    return None


def annotated_types(annotation: object) -> Iterator[type]:
    """Yield the classes in an annotation, for example int and NoneType in `int | None`."""
    if typing.get_origin(annotation) is list:
        yield list
        return
    if isinstance(annotation, type):
        yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from annotated_types(argument)


def plain_kinds(kinds: Iterable[type]) -> Kinds | None:
    """Return the JSON types of a field of numbers, switches or text, or None for other fields.

    pydantic itself would accept numbers and switches as text, for example "stage": "2".
    """
    found: list[type] = []
    for kind in kinds:
        if issubclass(kind, enum.Enum):
            kind = int if issubclass(kind, int) else str
        if kind not in (int, float, bool, str, type(None)):
            return None
        found.append(kind)
    return tuple(found) or None


def check_type(value: object, kinds: Kinds, place: str, path: Path) -> None:
    """Raise UserError for a value that has none of the types.

    "auto" is accepted here and checked when it is replaced.
    """
    if value == "auto" or has_type(value, kinds):
        return
    expected = " or ".join(type_names(kinds))
    fix = f"Give {expected}, or remove the key."
    if isinstance(value, str) and looks_unquoted(value):
        fix = "Remove the quotes."
    raise UserError(f"{path}: {place}={shown(value)} is not {expected}. {fix}")


def has_type(value: object, kinds: Kinds) -> bool:
    """Return whether a JSON value has one of the types."""
    if isinstance(value, bool):  # which Python counts as an integer
        return bool in kinds
    if isinstance(value, kinds):
        return True
    if isinstance(value, float) and int in kinds:
        return value.is_integer()  # sizes are often written as 5e8
    return isinstance(value, int) and float in kinds


def type_names(kinds: Kinds) -> list[str]:
    """Return the names of JSON types for a message."""
    names = []
    for kind in kinds:
        if kind is type(None):
            names.append("null")
        elif kind is not int or kinds != NUMBER:  # "a number" includes integers
            names.append(JSON_TYPES[kind.__name__])
    return names


def check_choice(value: object, kinds: Iterable[type], place: str, path: Path) -> None:
    """Raise UserError for a value that is not a member of a field's enumeration."""
    for kind in kinds:
        if issubclass(kind, enum.Enum):
            choices = [member.value for member in kind]
            if value not in (*choices, "auto", None):
                raise UserError(
                    f"{path}: {place}={shown(value)} is not a choice. "
                    f"Available: {', '.join(str(name) for name in choices if name != NVME)}."
                )


def looks_unquoted(text: str) -> bool:
    """Return whether a text would be a number or a switch without its quotes."""
    try:
        float(text)
    except ValueError:
        return text in ("true", "false")
    return True


def without_autos(block: Block) -> dict[str, Any]:
    """Return a copy of a block without the values "auto", at any depth."""
    result = {}
    for key, value in block.items():
        if isinstance(value, dict):
            result[key] = without_autos(value)
        elif value != "auto":
            result[key] = value
    return result


def unknown_ds_key(name: str, key: str, known: Iterable[str], path: Path) -> UserError:
    """Return the error for a key that DeepSpeed does not know.

    Args:
        name: full name of the key.
        key: the key in its block.
        known: keys of the block.
        path: path of the file.
    """
    return UserError(
        f"{path}: {name} is not a key of DeepSpeed {deepspeed.__version__}. "
        f"{correction(key, known)}"
    )


def correction(word: str, known: Iterable[str]) -> str:
    """Return what to do about an unknown word, with the most similar known word."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.75)
    return f"Rename it to {close[0]!r}, or remove it." if close else "Remove it."
