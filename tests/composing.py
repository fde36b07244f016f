"""Compose configurations without a command line."""

from collections.abc import Collection, Sequence
from typing import TypeVar

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from asrllm.config import composition_error, quoted_override
from asrllm.schema import all_keys, build
from asrllm.text_files import JsonObject

T = TypeVar("T")


def load_config(name: str, overrides: Sequence[str], cls: type[T]) -> T:
    """Compose `asrllm/conf/NAME.yaml` with overrides and build a component from it.

    Args:
        name: name of the configuration.
        overrides: overrides in Hydra's syntax, for example key=value.
        cls: the component.

    Raises:
        UserError: a key is unknown, a value has the wrong type, or an override is not key=value.
    """
    quoted = [quoted_override(text) for text in overrides]
    return build(cls, compose_config(name, quoted, known=all_keys(cls)))


def compose_config(
    name: str, overrides: Sequence[str], *, known: Collection[str] = ()
) -> JsonObject:
    """Return the composed configuration as plain containers.

    Args:
        name: name of the configuration.
        overrides: overrides in Hydra's syntax.
        known: the keys that a message about an unknown one may name.

    Raises:
        UserError: the configuration cannot be composed.
    """
    with initialize_config_module("asrllm.conf", version_base="1.3"):
        try:
            config = compose(name, overrides=list(overrides))
            return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            failure = error  # ValueError if a group is set to a number
    raise composition_error(failure, overrides, known) from failure
