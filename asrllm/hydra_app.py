"""Hydra's command line for the verbs that are configured by `key=value`.

Hydra's features work as its users know them: the override syntax (+key, ++key, ~key),
--config-dir, --config-name, --cfg, --multirun and the hydra.* keys. Errors become UserErrors.
"""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from asrllm.config import (
    PACKAGED,
    composition_error,
    hydra_keys,
    quoted_override,
    read_config_file,
)
from asrllm.config_keys import unknown_key
from asrllm.errors import UserError
from asrllm.schema import all_keys, build
from asrllm.text_files import JsonObject

T = TypeVar("T")

BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"  # takes every value
# Without these Hydra writes a directory and a log file for each run. Ours are in exp_dir.
DEFAULTS = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)


def run_app(
    name: str,
    arguments: argparse.Namespace,
    cls: type[T],
    task: Callable[[T], object],
    *,
    own_exp_dirs: bool = False,
) -> None:
    """Compose the configuration and run the task with it; with --multirun, once per job.

    Args:
        name: name of the packaged configuration, asrllm/conf/NAME.yaml.
        arguments: arguments from a parser with `add_overrides`.
        cls: the component of the configuration.
        task: runs a configuration. Hydra's sweepers use the number that it returns.
        own_exp_dirs: whether the jobs of a sweep must have different exp_dirs, because they write
            files of the same names to them.

    Raises:
        UserError: a key is unknown, a value has the wrong type, or a file cannot be composed.
    """
    overrides = [quoted_override(text) for text in arguments.overrides]
    failures: list[BaseException] = []
    process = os.getpid()

    def run_job(config: DictConfig) -> object:
        if failures:  # an earlier job of the sweep failed
            return None
        try:
            if own_exp_dirs and HydraConfig.get().mode == RunMode.MULTIRUN:
                check_exp_dirs(config, overrides)
            values = resolved(config)
            check_not_of_training(values, cls, name)
            result = task(build(cls, values))
            check_result(result)
            return result
        except (Exception, SystemExit) as error:
            if os.getpid() != process:  # a process of a Hydra launcher, which reports the error
                raise
            # raised after Hydra has returned, because Hydra also prints a report of it
            failures.append(error)
            return None

    check_hydra_options(arguments)
    fields = read_config_file(arguments.config_dir, arguments.config_name)
    check_not_of_training(fields, cls, name)
    if arguments.config_name is not None:
        accepted = [forced(text, all_keys(cls)) for text in overrides]
    else:
        accepted = overrides
    given = [*hydra_options(arguments), *DEFAULTS, *accepted]
    app = hydra.main(version_base="1.3", config_path="pkg://asrllm.conf", config_name=name)(run_job)
    with explained_errors(arguments, overrides, all_keys(cls), failures):
        if own_exp_dirs and arguments.multirun:
            check_given_exp_dir(overrides)
        with command_line([sys.argv[0], *given]), replaced_message(arguments.package):
            app()


@contextlib.contextmanager
def explained_errors(
    arguments: argparse.Namespace,
    overrides: Sequence[str],
    known: Collection[str],
    failures: list[BaseException],
) -> Iterator[None]:
    """Explain errors of Hydra, OmegaConf and PyYAML in the block, and raise the task's own.

    Args:
        arguments: arguments from a parser with `add_overrides`.
        overrides: overrides of the command line.
        known: the keys of the configuration.
        failures: the errors of the task, which are added inside the block.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not failures:  # otherwise a sweeper had no result to report
            raise composition_error(error, overrides, known, arguments.config_dir) from error
    except SystemExit as exit_:
        if arguments.package is None:
            raise
        # Hydra exits if the package has no value
        raise package_error(arguments.package, known) from exit_
    if failures:
        # removed from the list, which would keep the frames of the task and their objects alive
        raise failures.pop()


def check_result(result: object) -> None:
    """Raise UserError if a job of a sweep has no number, from which the sweeper would choose."""
    config = HydraConfig.get()
    chooses = config.mode == RunMode.MULTIRUN and config.sweeper["_target_"] != BASIC_SWEEPER
    if chooses and result is None:
        raise UserError(
            f"hydra/sweeper={config.runtime.choices['hydra/sweeper']} needs a "
            "validation loss of every job, and this one has none. Set data.valid_data_config, and "
            "trainer.valid_every to at most trainer.num_steps."
        )


def check_hydra_options(arguments: argparse.Namespace) -> None:
    """Raise UserError for options of Hydra that exclude one another or have no effect."""
    if arguments.cfg and arguments.multirun:
        raise UserError(
            "--cfg prints one configuration, and --multirun has several. Use one of both."
        )
    if arguments.package and not arguments.cfg:
        raise UserError("--package has no effect without --cfg. Add --cfg job, or leave it out.")


@contextlib.contextmanager
def replaced_message(package: str | None) -> Iterator[None]:
    """Drop the line that Hydra prints before it exits because --package has no value."""
    if package is None:
        yield
        return
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        yield
    sys.stderr.write(printed.getvalue())


def package_error(package: str, known: Collection[str]) -> UserError:
    """Return the error for a --package that has no value."""
    if package in known:
        return UserError(f"--package {package}: its value is null. Leave out --package.")
    if package.startswith("hydra."):
        known = hydra_keys()
    return unknown_key(package, known, "--package: ")


def resolved(config: DictConfig) -> dict[str, Any]:
    """Return a configuration as plain containers with its ${...} replaced.

    Raises:
        UserError: a key refers to something that does not exist.
    """
    try:
        values: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        problem = str(error).splitlines()[0]
        raise UserError(
            f"{error.full_key} cannot be resolved: {problem}. Set what it refers to, or write the "
            "value itself."
        ) from error
    return values


def check_not_of_training(config: JsonObject, cls: type, verb: str) -> None:
    """Raise UserError if a training's configuration was given to a verb with another one."""
    if "trainer" in config and "trainer" not in all_keys(cls):
        raise UserError(
            "--config-name names the configuration of a training. Write "
            f"'asrllm {verb} exp_dir={config.get('exp_dir')}'."
        )


def forced(override: str, keys: Collection[str]) -> str:
    """Return an override that also sets a key which a user's configuration leaves out.

    Hydra rejects keys that the configuration does not have.

    Args:
        override: an override of the command line.
        keys: all keys of the configuration.
    """
    key = override.partition("=")[0]
    is_group = any(name.startswith(f"{key}.") for name in keys)
    return f"++{override}" if key in keys and not is_group else override


def hydra_options(arguments: argparse.Namespace) -> list[str]:
    """Return the options of the command line as words for Hydra's parser."""
    words = [f"--{name}" for name in ("resolve", "multirun") if getattr(arguments, name)]
    options = {
        "config-dir": arguments.config_dir,
        "config-name": arguments.config_name,
        "cfg": arguments.cfg,
        "package": arguments.package,
    }
    if has_packaged_name(arguments.config_dir, arguments.config_name):
        # Hydra reads the first file of this name. The one in asrllm/conf would come first.
        options["config-path"] = os.path.abspath(arguments.config_dir)
        options["config-dir"] = str(PACKAGED)
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}", value]
    return words


def has_packaged_name(config_dir: str | None, config_name: str | None) -> bool:
    """Return whether a configuration of the user has the name of one in asrllm/conf."""
    if config_dir is None or config_name is None:
        return False
    file = f"{config_name.removesuffix('.yaml')}.yaml"
    return (PACKAGED / file).is_file() and os.path.isfile(os.path.join(config_dir, file))


@contextlib.contextmanager
def command_line(words: Sequence[str]) -> Iterator[None]:
    """Make Hydra read these words in the block, and raise its errors instead of printing them."""
    arguments = sys.argv
    environment = dict(os.environ)
    sys.argv = list(words)
    os.environ["HYDRA_FULL_ERROR"] = "1"
    os.environ["OC_CAUSE"] = "0"  # under a debugger OmegaConf's errors would have other causes
    try:
        yield
    finally:
        sys.argv = arguments
        os.environ.clear()
        os.environ.update(environment)


def check_given_exp_dir(overrides: Sequence[str]) -> None:
    """Check the exp_dir of a sweep's command line, before Hydra writes its directories.

    Raises:
        UserError: exp_dir is the same for all jobs.
    """
    given = [text for text in overrides if text.startswith("exp_dir=")]
    if given:
        check_exp_dirs(OmegaConf.create({"exp_dir": given[-1].partition("=")[2]}), overrides)


def check_exp_dirs(config: DictConfig, overrides: Sequence[str]) -> None:
    """Check that the jobs of a sweep write to different directories.

    Args:
        config: configuration of one job.
        overrides: overrides of the command line.

    Raises:
        UserError: exp_dir is the same for all jobs.
    """
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.key_or_group == "exp_dir" and override.is_sweep_override():
            return
    unresolved = OmegaConf.to_container(config, resolve=False)
    assert isinstance(unresolved, dict)
    exp_dir = unresolved.get("exp_dir")
    if "${" not in str(exp_dir):
        raise UserError(
            f"exp_dir={exp_dir} is the same for all jobs of --multirun. "
            "Use a directory for each, for example exp_dir='exp/NAME/${hydra:job.num}'."
        )
