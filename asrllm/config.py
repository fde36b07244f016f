"""From the Hydra tree in `asrllm/conf` and `key=value` overrides to checked dataclasses.

Values and their explanations live in the YAML files; types and checks live in one dataclass per component, in the component's package.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import yaml
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from asrllm.errors import UserError, nearest

T = TypeVar("T")


def load_config(name: str, overrides: Sequence[str], cls: type[T]) -> T:
    """Compose `asrllm/conf/NAME.yaml` with the overrides and build the dataclass `cls` from it.

    Raises UserError for an unknown key (naming the nearest known one), a wrong type or an override that is not `key=value`.
    """
    known = _leaf_keys(compose_config(name, []))
    quoted = [_checked_override(text, known) for text in overrides]
    return build(cls, compose_config(name, quoted))


def compose_config(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The composed tree as plain containers."""
    with initialize_config_module("asrllm.conf", version_base="1.3"):
        try:
            config = compose(name, overrides=list(overrides))
            return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
        except (
            HydraException,
            OmegaConfBaseException,
            ValueError,
        ) as error:  # ValueError: a group set to a number
            raise UserError(
                f"the configuration cannot be composed: {' '.join(str(error).split())}"
            ) from error


def _leaf_keys(tree: Mapping[str, Any], prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for key, value in tree.items():
        keys.add(prefix + key)
        if isinstance(value, Mapping):
            keys |= _leaf_keys(value, f"{prefix}{key}.")
    return keys


def _checked_override(text: str, known: set[str]) -> str:
    """The override with a key that exists and a value that Hydra's grammar accepts: `<|AUDIO|>` and the like are quoted for the user."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{text!r} is not an override: write key=value")
    if key not in known:
        raise UserError(f"unknown key {key!r} in {text!r}: {_nearest_key(key, known)}")
    try:
        OverridesParser.create().parse_override(text)
    except HydraException:
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"{key}='{escaped}'"
    return text


def _nearest_key(key: str, known: set[str]) -> str:
    """A hint: the known key most alike, or what there is beside it."""
    if difflib.get_close_matches(key, known, n=1, cutoff=0.8):
        return nearest(key, known)
    group = key.rpartition(".")[0]
    beside = {k for k in known if k.rpartition(".")[0] == group}
    return nearest(key, beside or {k for k in known if "." not in k})


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """The dataclass `cls` from nested mappings: every field given, no other key, every value of its type."""
    hints = typing.get_type_hints(cls)
    fields = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UserError(f"unknown key {where + str(key)!r}: {nearest(str(key), fields)}")
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
