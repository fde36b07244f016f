"""Arguments of `asrllm doctor`."""

import argparse
from collections.abc import Sequence

from asrllm.commands.arguments.values import not_empty


def add_doctor(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the arguments of `asrllm doctor`."""
    parser.epilog = (
        "Prints one line per finding with its fix: ok, warning, problem. The exit status is 0 "
        "without a problem, else 2. Nothing is written."
    )
    parser.add_argument(
        "--hostfile",
        type=not_empty,
        metavar="FILE",
        help="DeepSpeed hostfile; check that the name of each host resolves",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
