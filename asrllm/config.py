"""From the Hydra tree in `asrllm/conf` and `key=value` overrides to checked dataclasses.

Values and their explanations live in the YAML files; types and checks live in one dataclass per component, in the component's package.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, TypeVar

import yaml
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from asrllm.errors import UserError, nearest

T = TypeVar("T")
BATCH_BUDGET = (
    "data.sampler.max_tokens",
    "audio and text tokens in a micro-batch of one rank, whatever the number of utterances",
)
ACCUMULATION = ("trainer.gradient_accumulation_steps", "micro-batches of an optimizer step")
# keys of Hugging Face, NeMo, icefall and SLAM-LLM: ours, and what it means
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
    "freeze_encoder": ("model.audio_encoder.frozen", "true keeps the audio encoder as it is"),
    "freeze_llm": ("model.llm.frozen", "true keeps the LLM as it is, adapters apart"),
    "encoder_name": ("model.audio_encoder.model_type", "whisper or zipformer"),
    "llm_path": ("model.llm.pretrained_model", "a directory or hub id"),
    "model_name_or_path": ("model.llm.pretrained_model", "a directory or hub id"),
    "train_data_path": ("data.train_data_config", "a YAML list of corpora"),
    "beam_size": ("num_beams", "hypotheses of beam search"),
    "ckpt_path": ("checkpoint.model.filename", "a state dict file"),
}


def load_config(name: str, overrides: Sequence[str], cls: type[T]) -> T:
    """Compose `asrllm/conf/NAME.yaml` with overrides and build the dataclass `cls` from it.

    Raises:
        UserError: a key is unknown, a value has the wrong type, or an override is not key=value.
    """
    return build(cls, compose_config(name, [quoted_override(text) for text in overrides]))


def compose_config(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the composed configuration as plain containers."""
    with initialize_config_module("asrllm.conf", version_base="1.3"):
        try:
            config = compose(name, overrides=list(overrides))
            return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            failure = error  # ValueError: a group is set to a number
    raise composition_error(failure, overrides, known_keys(name)) from failure


def known_keys(name: str) -> set[str]:
    """Return all keys of `asrllm/conf/NAME.yaml` and its groups, with dots."""
    return _keys_of(compose_config(name, []))


def _keys_of(tree: Mapping[str, Any], prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for key, value in tree.items():
        keys.add(prefix + key)
        if isinstance(value, Mapping):
            keys |= _keys_of(value, f"{prefix}{key}.")
    return keys


def quoted_override(text: str) -> str:
    """Return an override that Hydra's grammar accepts. Values like `<|AUDIO|>` need quotes there.

    Raises:
        UserError: it is not key=value or ~key.
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
    """Return what a user can do about an error of Hydra.

    Args:
        error: of Hydra or OmegaConf.
        overrides: of the command line, one of which may have an unknown key.
        known: the keys of the configuration.
    """
    for text in overrides:
        key = text.partition("=")[0].lstrip("+~")
        if key not in known and repr(key) in str(error):
            return unknown_key(key, known)
    what = " ".join(str(root_cause(error)).split())
    return UserError(f"the configuration cannot be composed: {what}")


def root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def unknown_key(key: str, known: Collection[str]) -> UserError:
    """Return an error that names the key of another framework's name, the nearest key, or its neighbours."""
    name = key.rpartition(".")[2]
    ours, meaning = ALIASES.get(name, ("", ""))
    if ours in known:
        return UserError(f"unknown key {key!r}. Use {ours}: {meaning}.")
    if difflib.get_close_matches(key, known, n=1, cutoff=0.8):
        return UserError(f"unknown key {key!r}: {nearest(key, known)}")
    group = key.rpartition(".")[0]
    neighbours = {k for k in known if k.rpartition(".")[0] == group}
    return UserError(
        f"unknown key {key!r}: {nearest(key, neighbours or {k for k in known if '.' not in k})}"
    )


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """The dataclass `cls` from nested mappings: every field given, no other key, every value of its type."""
    hints = typing.get_type_hints(cls)
    fields = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise unknown_key(f"{where}{key}", [where + field for field in fields])
    if missing := [name for name in fields if name not in values]:
        raise UserError(f"missing key {where + missing[0]!r}")
    return cls(**{name: _convert(hints[name], values[name], where + name) for name in fields})


def _convert(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(hint, value, key + ".")  # type: ignore[arg-type]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        if len(options) == 1:
            return _convert(options[0], value, key)
        fitting = [a for a in options if _is_instance(a, value)]
        if fitting:
            return _convert(fitting[0], value, key)
    elif origin is list and isinstance(value, list):
        return [_convert(args[0], item, f"{key}[{i}]") for i, item in enumerate(value)]
    elif origin is Literal:
        if value in args:
            return value
        raise UserError(f"{key}={value!r} is not a choice: {nearest(str(value), map(str, args))}")
    elif hint is float and _is_instance(float, value):
        return float(value)
    elif _is_instance(hint, value):
        return value
    raise UserError(f"{key}={value!r} has the wrong type: expected {_type_name(hint)}")


def _is_instance(hint: Any, value: Any) -> bool:
    hint = typing.get_origin(hint) or hint
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _type_name(hint: Any) -> str:
    text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    return (
        "a group of keys"
        if dataclasses.is_dataclass(hint)
        else text.replace("NoneType", "null").replace("None", "null")
    )


def as_yaml(config: Any) -> str:
    """The configuration as YAML text, to be kept with the run."""
    return yaml.safe_dump(
        dataclasses.asdict(config), sort_keys=False, allow_unicode=True, width=120
    )
