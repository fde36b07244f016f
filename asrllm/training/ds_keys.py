"""The keys of a DeepSpeed JSON: which ones DeepSpeed knows, and which types their values have."""

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
from pydantic import BaseModel, ValidationError

from asrllm.errors import UserError

Kinds = tuple[type, ...]
WHOLE: Kinds = (int,)
NUMBER: Kinds = (int, float)
SWITCH: Kinds = (bool,)
TEXT: Kinds = (str,)
OBJECT: Kinds = (dict,)
KIND_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "an object",
    list: "a list",
}

# Keys that DeepSpeed reads with dict.get, so that it notices neither a typing error nor a wrong type.
SCALARS: dict[str, Kinds] = {
    "train_batch_size": WHOLE,
    "train_micro_batch_size_per_gpu": WHOLE,
    "gradient_accumulation_steps": WHOLE,
    "managed_gradient_accumulation": SWITCH,
    "gradient_clipping": NUMBER,
    "gradient_predivide_factor": NUMBER,
    "gradient_allreduce_op": TEXT,
    "prescale_gradients": SWITCH,
    "communication_data_type": (str, type(None)),
    "seq_parallel_communication_data_type": (str, type(None)),
    "disable_allgather": SWITCH,
    "zero_allow_untested_optimizer": SWITCH,
    "zero_force_ds_cpu_optimizer": SWITCH,
    "steps_per_print": (int, float, type(None)),
    "wall_clock_breakdown": SWITCH,
    "memory_breakdown": SWITCH,
    "dump_state": SWITCH,
    "disable_python_gc": SWITCH,
    "dataloader_drop_last": SWITCH,
    "log_level": (str, type(None)),
    "vocabulary_size": (int, type(None)),
    "use_data_before_expert_parallelism": SWITCH,
}
PLAIN_BLOCKS: dict[str, dict[str, Kinds]] = {
    "optimizer": {"type": TEXT, "params": OBJECT, "legacy_fusion": SWITCH},
    "scheduler": {"type": TEXT, "params": OBJECT},
    "activation_checkpointing": {
        "partition_activations": SWITCH,
        "number_checkpoints": (int, type(None)),
        "contiguous_memory_optimization": SWITCH,
        "synchronize_checkpoint_boundary": SWITCH,
        "profile": SWITCH,
        "cpu_checkpointing": SWITCH,
    },
    "aio": {
        "block_size": WHOLE,
        "queue_depth": WHOLE,
        "intra_op_parallelism": WHOLE,
        "single_submit": SWITCH,
        "overlap_events": SWITCH,
        "use_gds": SWITCH,
    },
    "checkpoint": {
        "tag_validation": TEXT,
        "checkpoint_serialization": SWITCH,
        "load_universal": SWITCH,
        "use_node_local_storage": SWITCH,
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
        "enabled": SWITCH,
        "recompute_fwd_factor": NUMBER,
        "profile_step": WHOLE,
        "module_depth": WHOLE,
        "top_modules": WHOLE,
        "detailed": SWITCH,
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
# Features of DeepSpeed that a run does not have, and what to do instead.
UNSUPPORTED = {
    "activation_checkpointing": "Remove it, and set trainer.gradient_checkpointing=true.",
    "autotuning": "Remove it, and run 'asrllm plan' for sizes that fit.",
    "bfloat16": "Rename it to 'bf16'.",
    "checkpoint.load_universal": "Remove it: a run resumes on any number of processes without it.",
    "compile": "Remove it, and set trainer.compile=true.",
    "data_efficiency": "Remove it, and set data.sampler and data.filter.",
    "datastates_ckpt": "Remove it, and set trainer.background_checkpoints=true.",
    "expert_parallel": "Remove it.",
    "hybrid_engine": "Remove it.",
    "pipeline": "Remove it.",
    "sequence_parallel_size": "Remove it.",
    "tensor_parallel": "Remove it, and choose ZeRO stage 3 for models that do not fit.",
    "torch_autocast": "Remove it, and set trainer.precision.",
    "weight_quantization": "Remove it.",
}
# Values that would change what a step computes.
FIXED = {
    "gradient_allreduce_op": (
        "mean",
        "Remove it: the loss is divided by the supervised tokens of all ranks.",
    ),
    "managed_gradient_accumulation": (
        True,
        "Remove it, and set trainer.gradient_accumulation_steps.",
    ),
}
KNOWN_KEYS = frozenset(
    [*SCALARS, *PLAIN_BLOCKS, *MODELS, *(key for key in UNSUPPORTED if "." not in key)]
)


def check_keys(ds: dict[str, Any], path: Path) -> None:
    """Check every key and the type of every value, and drop blocks that are switched off.

    Args:
        ds: the content of the file.
        path: the file, for the messages.

    Raises:
        UserError: a key is unknown or was removed, a value has the wrong type, or a feature is not supported.
    """
    check_removed(ds, path)
    for key in list(ds):
        if key not in KNOWN_KEYS:
            raise UserError(
                f"{path}: {key!r} is not a key of DeepSpeed {deepspeed.__version__}. {correction(key, KNOWN_KEYS)}"
            )
        value = ds[key]
        if key in SCALARS:
            check_type(value, SCALARS[key], key, path)
        elif key in MODELS:
            check_type(value, OBJECT, key, path)
            check_model(MODELS[key], value, key, path)
        elif key in PLAIN_BLOCKS:
            check_type(value, OBJECT, key, path)
            check_plain(PLAIN_BLOCKS[key], value, key, path)
        if key in UNSUPPORTED and is_off(value):
            del ds[key]
    check_supported(ds, path)


def check_removed(ds: Mapping[str, Any], path: Path) -> None:
    """Raise UserError for a key that earlier versions of DeepSpeed had."""
    zero = ds.get("zero_optimization")
    removed = {key: getattr(ds_runtime, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {}) for key in ds}
    if isinstance(zero, dict):
        removed |= {
            f"zero_optimization.{key}": getattr(ds_runtime, "_REMOVED_ZERO_CONFIG_KEYS", {})
            for key in zero
        }
    for place, known in removed.items():
        if place.rpartition(".")[2] in known:
            fix = "Remove it, and set trainer.precision." if place == "amp" else "Remove it."
            raise UserError(
                f"{path}: {place} was removed from DeepSpeed, which {deepspeed.__version__} is. {fix}"
            )


def check_supported(ds: Mapping[str, Any], path: Path) -> None:
    """Raise UserError for a feature that a run does not have."""
    checkpoint = ds.get("checkpoint", {})
    used = [*ds, *(f"checkpoint.{key}" for key, value in checkpoint.items() if value)]
    for place in used:
        if place in UNSUPPORTED:
            raise UserError(f"{path}: {place!r} is not supported. {UNSUPPORTED[place]}")
    for key, (value, fix) in FIXED.items():
        if ds.get(key, value) != value:
            raise UserError(f"{path}: {key}={ds[key]!r} is not supported. {fix}")


def is_off(value: Any) -> bool:
    """Return whether a block of the file asks for nothing."""
    if not isinstance(value, dict):
        return not value
    return value.get("enabled") is False or not any(value.values())


def check_plain(
    known: Mapping[str, Kinds], block: Mapping[str, Any], place: str, path: Path
) -> None:
    """Check a block for which DeepSpeed has no model."""
    for key, value in block.items():
        if key not in known:
            raise unknown_key(f"{place}.{key}", known, path)
        check_type(value, known[key], f"{place}.{key}", path)


def check_model(model: type[BaseModel], block: Mapping[str, Any], place: str, path: Path) -> None:
    """Check a block by DeepSpeed's own pydantic model of it; "auto" is accepted everywhere."""
    fields = {
        name: field
        for key, field in model.model_fields.items()
        for name in (key, field.alias)
        if name
    }
    shown = {
        field.alias or key for key, field in model.model_fields.items() if not replacement_of(field)
    }
    for key, value in block.items():
        if key not in fields:
            raise unknown_key(f"{place}.{key}", shown, path)
        if new := replacement_of(fields[key]):
            raise UserError(f"{path}: {place}.{key} is an old name. Use {place}.{new} instead.")
        kinds = list(annotated_types(fields[key].annotation))
        nested = next((kind for kind in kinds if issubclass(kind, BaseModel)), None)
        if nested and isinstance(value, dict):
            check_model(nested, value, f"{place}.{key}", path)
        elif plain := plain_kinds(kinds):
            check_type(value, plain, f"{place}.{key}", path)
            check_choice(value, kinds, f"{place}.{key}", path)
    try:
        model(**without_autos(block))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([place, *map(str, first["loc"])])
        value = "" if isinstance(first["input"], dict) else f"={first['input']!r}"
        reason = (
            first["msg"]
            .removeprefix("Value error, ")
            .removeprefix("Assertion failed, ")
            .rstrip(".")
        )
        raise UserError(
            f"{path}: {where}{value} is refused by DeepSpeed: {reason}. Correct the value."
        ) from error


def replacement_of(field: Any) -> str | None:
    """Return the new name of a deprecated field, or None if it is not deprecated."""
    extra = field.json_schema_extra or {}
    return str(extra.get("new_param")) if extra.get("deprecated") else None


def annotated_types(annotation: Any) -> Iterator[type]:
    """Yield the classes that an annotation names: of `int | None`, int and NoneType."""
    if isinstance(annotation, type):
        yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from annotated_types(argument)


def plain_kinds(kinds: Iterable[type]) -> Kinds | None:
    """Return the JSON types of a field of numbers, switches or text, or None for any other field.

    pydantic itself would accept numbers and switches as text, such as "stage": "2".
    """
    found: list[type] = []
    for kind in kinds:
        if issubclass(kind, enum.Enum):
            kind = int if issubclass(kind, int) else str
        if kind not in (int, float, bool, str, type(None)):
            return None
        found.append(kind)
    return tuple(found) or None


def check_type(value: Any, kinds: Kinds, place: str, path: Path) -> None:
    """Raise UserError for a value that is of none of the types. "auto" is checked where it is filled in."""
    is_whole = isinstance(value, float) and value.is_integer()  # sizes are often written as 5e8
    fits = (
        isinstance(value, bool)
        if kinds == SWITCH
        else isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    )
    if (
        fits
        or value == "auto"
        or (int in kinds and is_whole)
        or (float in kinds and type(value) is int)
    ):
        return
    expected = " or ".join(
        "null" if kind is type(None) else KIND_NAMES[kind]
        for kind in kinds
        if (kind, kinds) != (int, NUMBER)
    )
    fix = (
        "Remove the quotes."
        if isinstance(value, str) and looks_unquoted(value)
        else f"Give {expected}, or remove the key."
    )
    raise UserError(f"{path}: {place}={value!r} is not {expected}. {fix}")


def check_choice(value: Any, kinds: Iterable[type], place: str, path: Path) -> None:
    """Raise UserError for a value that is no member of the enumeration among the types of its field."""
    for kind in kinds:
        if issubclass(kind, enum.Enum):
            choices = [member.value for member in kind]
            if value not in (*choices, "auto", None):
                raise UserError(
                    f"{path}: {place}={value!r} is not a choice. Use one of {', '.join(map(str, choices))}."
                )


def looks_unquoted(text: str) -> bool:
    """Return whether text would be a number or a switch without its quotes."""
    try:
        float(text)
    except ValueError:
        return text in ("true", "false")
    return True


def without_autos(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a block without the values "auto", at any depth."""
    kept = {key: value for key, value in block.items() if value != "auto"}
    return {
        key: without_autos(value) if isinstance(value, dict) else value
        for key, value in kept.items()
    }


def unknown_key(place: str, known: Iterable[str], path: Path) -> UserError:
    key = place.rpartition(".")[2]
    return UserError(
        f"{path}: {place} is not a key of DeepSpeed {deepspeed.__version__}. {correction(key, known)}"
    )


def correction(word: str, known: Iterable[str]) -> str:
    """Return what to do about an unknown word, with the known word nearest to it."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"Rename it to {close[0]!r}, or remove it." if close else "Remove it."
