"""Compose the Hydra configuration of a verb from `asrllm/conf` and overrides."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import yaml
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from asrllm.config_keys import unknown_key
from asrllm.errors import UserError
from asrllm.schema import build
from asrllm.text_files import JsonObject

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")


def load_config(name: str, overrides: Sequence[str], cls: type[T]) -> T:
    """Compose `asrllm/conf/NAME.yaml` with overrides and build a component from it.

    Args:
        name: of the configuration.
        overrides: in Hydra's syntax, for example key=value.
        cls: the component.

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


def as_yaml(config: "DataclassInstance") -> str:
    """Return a configuration as YAML text."""
    values = dataclasses.asdict(config)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
