"""Arguments of `asrllm doctor`, `asrllm init` and `asrllm dashboard`."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from asrllm.commands.arguments.configured import add_overrides
from asrllm.commands.arguments.values import not_empty, positive

DOCTOR_HELP = """
Prints one line per finding with its fix: ok, warning, problem. The exit status is 0 without a
problem, else 2. With the arguments of 'asrllm train', the planned run is checked too, on the CPU.
Nothing is written.
"""


class Flag(NamedTuple):
    """A flag of `asrllm init`. If it is missing, its value is asked for at the terminal.

    Attributes:
        option: its name on the command line.
        metavar: placeholder of its value.
        help: its line in the help, and the question.
        type: parses its value.
        required: whether a value must be given.
    """

    option: str
    metavar: str
    help: str
    type: Callable[[str], Any] = not_empty
    required: bool = True


# by the name of the parsed value, in the order of the questions
INIT_FLAGS = {
    "data": Flag(
        "--data",
        "PATH",
        "training data: a folder of audio files, a Kaldi directory, or a manifest of Lhotse, NeMo, "
        "wenet, SLAM-LLM or swift",
    ),
    "valid_data": Flag(
        "--valid-data", "PATH", "validation data, of any of these kinds", required=False
    ),
    "lang": Flag("--lang", "LANG", "language of the data, for example en"),
    "encoder": Flag("--encoder", "PATH", "encoder: a directory with config.json, or a hub id"),
    "llm": Flag("--llm", "PATH", "LLM: a directory with config.json, or a hub id"),
    "gpus": Flag("--gpus", "N", "number of GPUs of this machine to train on", positive),
}


def add_init(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the arguments of `asrllm init`."""
    parser.epilog = (
        "Writes experiment.yaml, train_data.yaml, valid_data.yaml and prompts.txt, and prints the "
        "commands that use them. The first utterances and the files of both models are checked "
        "before anything is written. At a terminal, flags that are not given are asked for."
    )
    parser.add_argument("dir", type=not_empty, metavar="DIR", help="new or empty directory")
    for flag in INIT_FLAGS.values():
        parser.add_argument(flag.option, type=flag.type, metavar=flag.metavar, help=flag.help)


def add_doctor(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the arguments of `asrllm doctor`."""
    parser.add_argument(
        "--hostfile",
        type=not_empty,
        metavar="FILE",
        help="DeepSpeed hostfile; check that the name of each host resolves",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    add_overrides(parser, "train")
    parser.epilog = f"{DOCTOR_HELP}\n{parser.epilog}"


def add_dashboard(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the arguments of `asrllm dashboard`."""
    parser.epilog = (
        "Saves a new view of the project, with sections for training, data, speed, validation, "
        "evaluation and the comparison of runs. Every logged value has a panel with its unit. "
        "Prints the address of the view."
    )
    parser.add_argument("project", type=not_empty, metavar="PROJECT", help="trainer.wandb.project")
    parser.add_argument(
        "--entity",
        type=not_empty,
        metavar="NAME",
        help="user or team of the project; default: that of the login",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the view as JSON instead, which needs no network and no login",
    )
