"""Arguments of the verbs with a configuration: `key=value`, and the options of Hydra."""

import argparse
from collections.abc import Sequence

from asrllm.config_keys import help_text
from asrllm.errors import nearest

COMPARE = "compare"  # the only action of `asrllm evaluate` without key=value arguments
KEYS_TITLE = "keys, defaults and meanings:"  # precedes the keys of a configuration in the help
HYDRA_TITLE = "Hydra's options, see https://hydra.cc"
CONFIGURATION_PARTS = ("job", "hydra", "all")  # of the configuration, for --cfg
OTHER_OPTIONS = {  # of Hydra, and what to use instead
    "--config-path": "--config-dir DIR",
    "-cp": "--config-dir DIR",
    "--info": "--cfg all",
    "-i": "--cfg all",
    "--hydra-help": "--help",
}
COMPARE_HELP = f"""
asrllm evaluate {COMPARE} A B: compare two results on the same utterances, with a paired bootstrap
interval and a permutation test. A and B are exp_dir/greedy_search directories, or files
generations-*.jsonl or recogs-*.txt (icefall's too).
"""


def add_train(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the arguments of `asrllm train`."""
    add_overrides(parser, "train")


def add_warm_start(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the arguments of `asrllm warm-start`."""
    add_overrides(parser, "train")


def add_plan(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the arguments of `asrllm plan`."""
    add_overrides(parser, "plan")


def add_evaluate(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the arguments of `asrllm evaluate`."""
    add_overrides(parser, "evaluate")
    parser.epilog = f"{COMPARE_HELP}\n{parser.epilog}"


def add_overrides(parser: argparse.ArgumentParser, config: str) -> None:
    """Add the `key=value` arguments, and describe the keys of `asrllm/conf/CONFIG.yaml`."""
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="a configuration key and its new value"
    )
    parser.set_defaults(configuration=config)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"{KEYS_TITLE}\n\n{help_text(config)}"
    add_hydra_options(parser)


def add_hydra_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of Hydra that have an effect in asrllm."""
    options = parser.add_argument_group(HYDRA_TITLE)
    options.add_argument(
        "-cd", "--config-dir", metavar="DIR", help="a directory with your own YAML files and groups"
    )
    options.add_argument(
        "-cn",
        "--config-name",
        metavar="NAME",
        help="read NAME.yaml instead; for a run's config.yaml use --config-dir EXP "
        "--config-name config",
    )
    options.add_argument(
        "-c",
        "--cfg",
        type=configuration_part,
        metavar="{" + ",".join(CONFIGURATION_PARTS) + "}",
        help="print the configuration and exit",
    )
    options.add_argument("-p", "--package", metavar="KEY", help="with --cfg: print this part only")
    options.add_argument("--resolve", action="store_true", help="with --cfg: resolve ${...}")
    options.add_argument(
        "-m", "--multirun", action="store_true", help="run a job for each of key=value1,value2,..."
    )
    for option, ours in OTHER_OPTIONS.items():
        options.add_argument(
            option, action=UseAnother, nargs="?", const=ours, help=argparse.SUPPRESS
        )


def configuration_part(text: str) -> str:
    """Return the argument of --cfg.

    Raises:
        argparse.ArgumentTypeError: it is not one of CONFIGURATION_PARTS.
    """
    if text not in CONFIGURATION_PARTS:
        fix = nearest(text, CONFIGURATION_PARTS)
        raise argparse.ArgumentTypeError(f"{text!r} is unknown. {fix}")
    return text


class UseAnother(argparse.Action):
    """An option of Hydra that has another name here."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        """Print which option to use, and exit with status 2."""
        parser.error(f"{option_string} is not supported. Use {self.const}.")
