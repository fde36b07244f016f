"""asrllm evaluate compare: compare two results on the same utterances."""

import argparse
from pathlib import Path

from asrllm.commands.arguments.configured import COMPARE
from asrllm.errors import UserError
from asrllm.evaluation.compare import compare_results, comparison_text


def run(arguments: argparse.Namespace) -> None:
    """Print the comparison of two results on every test set that they have in common.

    Raises:
        UserError: the command line does not name exactly two results.
    """
    places = arguments.overrides[1:]
    if len(places) != 2:
        raise UserError(
            f"'{COMPARE}' needs two results, not {len(places)}. "
            f"Use 'asrllm evaluate {COMPARE} A B'."
        )
    first, second = map(Path, places)
    for name, comparison in compare_results(first, second).items():
        print(comparison_text(name, comparison))
