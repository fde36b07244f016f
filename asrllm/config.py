"""Compose the Hydra configuration in `asrllm/conf` with overrides, and validate it as dataclasses.

The YAML files have the default values and their explanations. Types and checks are in one dataclass
per component, in the component's package.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from asrllm.errors import UserError, nearest
from asrllm.text_files import JsonObject

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
BATCH_BUDGET = (
    "data.sampler.max_tokens",
    "audio and text tokens in a micro-batch of one rank, for any number of utterances",
)
ACCUMULATION = ("trainer.gradient_accumulation_steps", "micro-batches of an optimizer step")
# keys of Hugging Face, NeMo, icefall and SLAM-LLM, with our key and its meaning
ALIASES = {
    "learning_rate": ("trainer.lr", "the peak learning rate"),
    "base_lr": ("trainer.lr", "the peak learning rate"),
    "num_train_epochs": ("trainer.num_epochs", "passes over the data"),
    "max_epochs": ("trainer.num_epochs", "passes over the data"),
    "epochs": ("trainer.num_epochs", "passes over the data"),
    "max_steps": ("trainer.num_steps", "optimizer steps"),
    "total_steps": ("trainer.num_steps", "optimizer steps"),
    "batch_size": BATCH_BUDGET,
    "per_device_train_batch_size": BATCH_BUDGET,
    "train_micro_batch_size_per_gpu": BATCH_BUDGET,
    "batch_size_training": BATCH_BUDGET,
    "max_duration": ("data.sampler.max_duration", "seconds of audio in a micro-batch of one rank"),
    "batch_duration": (
        "data.sampler.max_duration",
        "seconds of audio in a micro-batch of one rank",
    ),
    "gradient_accumulation": ACCUMULATION,
    "gradient_accumulation_steps": ACCUMULATION,
    "accumulate_grad_batches": ACCUMULATION,
    "accum_grad": ACCUMULATION,
    "max_grad_norm": ("trainer.gradient_clipping", "the largest norm of a step's gradient"),
    "grad_clip": ("trainer.gradient_clipping", "the largest norm of a step's gradient"),
    "gradient_clip_val": ("trainer.gradient_clipping", "the largest norm of a step's gradient"),
    "warmup_ratio": ("trainer.warmup_steps", "steps of linear warm-up, as a number"),
    "lr_scheduler_type": ("trainer.schedule.name", "constant, linear, cosine, wsd or eden"),
    "optim": ("trainer.optimizer.name", "adamw, deepspeed_adamw or scaled_adam"),
    "bf16": ("trainer.precision", "bf16, fp16 or fp32"),
    "fp16": ("trainer.precision", "bf16, fp16 or fp32"),
    "use_fp16": ("trainer.precision", "bf16, fp16 or fp32"),
    "deepspeed": (
        "trainer.deepspeed_config",
        "a DeepSpeed JSON, for example ds_configs/zero2.json",
    ),
    "output_dir": ("exp_dir", "the directory that the run writes to"),
    "save_steps": ("trainer.save_every", "steps between checkpoints"),
    "save_every_n": ("trainer.save_every", "steps between checkpoints"),
    "save_total_limit": ("trainer.keep_last_k", "checkpoints to keep"),
    "keep_last_k": ("trainer.keep_last_k", "checkpoints to keep"),
    "logging_steps": ("trainer.log_every", "steps between log records"),
    "eval_steps": ("trainer.valid_every", "steps between validations"),
    "resume_from_checkpoint": ("trainer.resume", "auto, never or the path of a checkpoint"),
    "dataloader_num_workers": ("data.num_workers", "reading processes of each rank"),
    "lora_r": ("model.llm.lora.r", "the rank of the LLM's adapters"),
    "lora_rank": ("model.llm.lora.r", "the rank of the LLM's adapters"),
    "lora_alpha": ("model.llm.lora.lora_alpha", "the scale of the LLM's adapters times their rank"),
    "lora_dropout": ("model.llm.lora.lora_dropout", "the dropout before the LLM's adapters"),
    "freeze_encoder": ("model.audio_encoder.frozen", "true: train only its adapters, if any"),
    "freeze_llm": ("model.llm.frozen", "true: train only its adapters, if any"),
    "encoder_name": ("model.audio_encoder.model_type", "whisper or zipformer"),
    "llm_path": ("model.llm.pretrained_model", "a directory or hub id"),
    "model_name_or_path": ("model.llm.pretrained_model", "a directory or hub id"),
    "train_data_path": ("data.train_data_config", "a YAML list of corpora"),
    "beam_size": ("num_beams", "hypotheses of beam search"),
    "ckpt_path": ("checkpoint.model.filename", "a state dict file"),
}


def load_config(name: str, overrides: Sequence[str], cls: type[T]) -> T:
    """Compose `asrllm/conf/NAME.yaml` with overrides and build a dataclass from it.

    Args:
        name: of the configuration.
        overrides: in Hydra's syntax, for example key=value.
        cls: the dataclass.

    Raises:
        UserError: a key is unknown, a value has the wrong type, or an override is not key=value.
    """
    return build(cls, compose_config(name, [quoted_override(text) for text in overrides]))


def compose_config(name: str, overrides: Sequence[str]) -> JsonObject:
    """Return the composed configuration as plain containers.

    Args:
        name: of the configuration.
        overrides: in Hydra's syntax.

    Raises:
        UserError: the configuration cannot be composed.
    """
    with initialize_config_module("asrllm.conf", version_base="1.3"):
        try:
            config = compose(name, overrides=list(overrides))
            return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            failure = error  # ValueError if a group is set to a number
    raise composition_error(failure, overrides, known_keys(name)) from failure


def known_keys(name: str) -> set[str]:
    """Return all keys of `asrllm/conf/NAME.yaml` and its groups, as dotted paths."""
    return _keys_of(compose_config(name, []))


def _keys_of(tree: Mapping[str, object], prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for key, value in tree.items():
        keys.add(prefix + key)
        if isinstance(value, Mapping):
            keys |= _keys_of(value, f"{prefix}{key}.")
    return keys


def quoted_override(text: str) -> str:
    """Return an override that Hydra's grammar accepts: it requires quotes around `<|AUDIO|>`.

    Raises:
        UserError: the text is not key=value or ~key.
    """
    key, equals, value = text.partition("=")
    if not equals and not key.startswith("~"):
        raise UserError(f"{text!r} is not an override. Write key=value.")
    try:
        OverridesParser.create().parse_override(text)
    except HydraException:
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"{key}='{escaped}'"
    return text


def composition_error(
    error: Exception, overrides: Sequence[str], known: Collection[str]
) -> UserError:
    """Convert an error of Hydra or OmegaConf into one that names the cause and the fix.

    Args:
        error: the error.
        overrides: of the command line, one of which may have an unknown key.
        known: the keys of the configuration.
    """
    for text in overrides:
        key = text.partition("=")[0].lstrip("+~")
        if key not in known and repr(key) in str(error):
            return unknown_key(key, known)
    problem = " ".join(str(root_cause(error)).split())
    return UserError(f"the configuration cannot be composed: {problem}")


def root_cause(error: BaseException) -> BaseException:
    """Return the first exception in the chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def unknown_key(key: str, known: Collection[str]) -> UserError:
    """Return an error for an unknown key, which hints at the right one.

    The hint is our key for another framework's key, the nearest key, or the keys of the same group.

    Args:
        key: the unknown key.
        known: the keys of the configuration.
    """
    name = key.rpartition(".")[2]
    ours, meaning = ALIASES.get(name, ("", ""))
    if ours in known:
        return UserError(f"unknown key {key!r}. Use {ours}: {meaning}.")
    if difflib.get_close_matches(key, known, n=1, cutoff=0.8):
        return UserError(f"unknown key {key!r}: {nearest(key, known)}")
    group = key.rpartition(".")[0]
    candidates = _keys_in(group, known) or _keys_in("", known)
    return UserError(f"unknown key {key!r}: {nearest(key, candidates)}")


def _keys_in(group: str, known: Collection[str]) -> set[str]:
    return {key for key in known if key.rpartition(".")[0] == group}


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build a dataclass from nested mappings.

    Args:
        cls: the dataclass, whose fields may be dataclasses.
        values: a value for every field.
        where: prefix of the keys in messages.

    Raises:
        UserError: a key is unknown or missing, or a value has the wrong type.
    """
    hints = typing.get_type_hints(cls)
    fields = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise unknown_key(f"{where}{key}", [where + field for field in fields])
    for name in fields:
        if name not in values:
            raise UserError(f"missing key {where + name!r}")
    return cls(**{name: _convert(hints[name], values[name], where + name) for name in fields})


def _convert(hint: Any, value: Any, key: str) -> Any:
    """Return a value as the type of a field.

    Args:
        hint: the type.
        value: a plain value or container.
        key: of the value, for messages.

    Raises:
        UserError: the value has another type.
    """
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(hint, value, key + ".")  # type: ignore[arg-type]
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [option for option in args if option is not type(None)]
        if len(options) == 1:
            return _convert(options[0], value, key)
        for option in options:
            if _is_instance(option, value):
                return _convert(option, value, key)
    elif origin is list and isinstance(value, list):
        return [_convert(args[0], item, f"{key}[{i}]") for i, item in enumerate(value)]
    elif origin is Literal:
        if value in args:
            return value
        raise UserError(
            f"{key}={value!r} is not a valid choice: {nearest(str(value), map(str, args))}"
        )
    elif hint is float and _is_instance(float, value):
        return float(value)
    elif _is_instance(hint, value):
        return value
    raise UserError(f"{key}={value!r} has the wrong type. Expected: {_type_name(hint)}.")


def _is_instance(hint: Any, value: object) -> bool:
    """Return whether a value fits a type. An int is a float; a bool is neither."""
    hint = typing.get_origin(hint) or hint
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, (int, float))
    return isinstance(value, hint)


def _type_name(hint: object) -> str:
    """Return the name of a type for messages."""
    if dataclasses.is_dataclass(hint):
        return "a group of keys"
    text = str(hint)
    if isinstance(hint, type) and not typing.get_args(hint):
        text = hint.__name__
    return text.replace("NoneType", "null").replace("None", "null")


def as_yaml(config: "DataclassInstance") -> str:
    """Return a configuration as YAML text."""
    values = dataclasses.asdict(config)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
