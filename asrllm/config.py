"""Read configuration files and overrides, and explain errors of Hydra and OmegaConf."""

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError

from asrllm.config_keys import dotted_keys, unknown_key
from asrllm.errors import UserError, error_chain, nearest
from asrllm.text_files import JsonObject, read_yaml, yaml_problem

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SWEEP_PLUGINS = ("hydra/sweeper/optuna", "hydra/launcher/submitit_")  # of the extra `sweep`
PACKAGED = Path(__file__).parent / "conf"


def quoted_override(text: str) -> str:
    """Return an override that Hydra's grammar accepts: it requires quotes around `<|AUDIO|>`.

    Raises:
        UserError: the text is not key=value or ~key.
    """
    key, equals, value = text.partition("=")
    if not key or not (equals or key.startswith("~")):
        raise UserError(f"{text!r} is not an override. Write key=value.")
    try:
        OverridesParser.create().parse_override(text)
    except HydraException:
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"{key}='{escaped}'"
    return text


def composition_error(
    error: Exception,
    overrides: Sequence[str],
    known: Collection[str],
    config_dir: str | None = None,
) -> UserError:
    """Convert an error of Hydra or OmegaConf into one that names the cause and the fix.

    Args:
        error: the error.
        overrides: overrides of the command line, one of which may have an unknown key.
        known: the keys of the configuration.
        config_dir: the user's directory of configuration files.
    """
    *_, cause = error_chain(error)
    found = _file_error(cause, config_dir) or _override_error(error, cause, overrides, known)
    if found:
        return found
    if isinstance(cause, ConfigKeyError) and cause.full_key:
        if f"~{cause.full_key}" in overrides:
            return UserError(
                f"~{cause.full_key} deletes a group that another override changes. Leave it out."
            )
        return unknown_key(str(cause.full_key), known)
    problem = " ".join(str(cause).partition("full_key:")[0].split())  # OmegaConf appends internals
    return UserError(
        f"the configuration cannot be composed: {problem.rstrip('.')}. "
        "Correct the overrides or the configuration files."
    )


def _file_error(cause: BaseException, config_dir: str | None) -> UserError | None:
    """Return the error of a configuration file, if that is the cause."""
    if isinstance(cause, yaml.YAMLError):
        return UserError(f"{yaml_problem(cause)}. Correct it.")
    if isinstance(cause, RecursionError):
        return UserError(
            "a configuration file includes itself in its defaults list. Rename it, or list "
            "'model: default', 'data: default' and 'trainer: default' instead."
        )
    if isinstance(cause, MissingConfigException) and cause.missing_cfg_file:
        if str(cause.missing_cfg_file).startswith(SWEEP_PLUGINS):
            return UserError(
                f"{cause.missing_cfg_file} is not installed. Run: pip install 'asrllm[sweep]'"
            )
        options = ", ".join(cause.options or ()) or "none"
        return UserError(
            f"the configuration file {str(cause.missing_cfg_file) + '.yaml'!r} does not exist. "
            f"Name another one, or its directory with --config-dir. Available: {options}."
        )
    if isinstance(cause, UnicodeDecodeError):
        for path in sorted(Path(config_dir or ".").rglob("*.yaml")):
            if path.read_bytes().startswith(cause.object[: cause.end]):
                return UserError(
                    f"the configuration file {str(path)!r} is not UTF-8 text. Convert it to UTF-8."
                )
    return None


def _override_error(
    error: Exception, cause: BaseException, overrides: Sequence[str], known: Collection[str]
) -> UserError | None:
    """Return the error of one of the overrides, if that is the cause."""
    for text in overrides:
        key, _, value = text.partition("=")
        key = key.lstrip("+~")
        names = known
        if key.startswith("hydra."):
            names = hydra_keys()
        if key not in names and repr(key) in str(error):
            return unknown_key(key, names)
        if text.startswith("~") and "Could not delete" in str(cause):
            return UserError(f"{key} has no value to delete. Leave out {text}.")
        if "Ambiguous value for argument" in str(cause) and repr(text) in str(cause):
            return UserError(
                f"{text} has several values. Write {key}=[{value}] for a list, or add --multirun "
                "for a job with each of them."
            )
        if text.startswith("+") and (f"'{key}'" in str(error) or str(error).startswith(key)):
            return UserError(f"{text} adds a key that exists. Write {text.lstrip('+')}.")
        is_group = any(name.startswith(f"{key}.") for name in known)
        if is_group and "Config group override" in str(cause):
            return UserError(
                f"{key}={value} is not possible, because {key} has keys of its own. "
                f"Set those, for example {key}.KEY=VALUE."
            )
    return None


def hydra_keys() -> list[str]:
    """Return the keys of Hydra's own configuration as dotted paths."""
    return dotted_keys(OmegaConf.to_container(OmegaConf.structured(HydraConf)), "hydra.")


def read_config_file(config_dir: str | None, config_name: str | None) -> JsonObject:
    """Return the content of the file that --config-name chooses, without its defaults list.

    It is empty if there is none.

    Raises:
        UserError: one of them does not exist, or the primary one cannot be read.
    """
    folders = [PACKAGED]
    if config_dir is not None:
        folder = Path(config_dir)
        if not folder.is_dir():
            problem = "is not a directory" if folder.exists() else "does not exist"
            raise UserError(f"--config-dir {config_dir!r} {problem}. Give a directory.")
        folders.insert(0, folder)
    if config_name is not None:
        name = config_name.removesuffix(".yaml")
        found = [folder / f"{name}.yaml" for folder in folders]
        path = next((path for path in found if path.exists()), None)
        if path is None:
            names = sorted(path.stem for folder in folders for path in folder.glob("*.yaml"))
            raise UserError(
                f"--config-name {config_name!r} was not found in {', '.join(map(str, folders))}. "
                f"{nearest(name, names)}"
            )
        fields = read_yaml(path, "the configuration file")
        if not isinstance(fields, dict):
            raise UserError(
                f"the configuration file {str(path)!r} has no keys. Write lines of KEY: VALUE."
            )
        return fields
    return {}


def as_yaml(config: "DataclassInstance") -> str:
    """Return a configuration as YAML text."""
    values = dataclasses.asdict(config)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
