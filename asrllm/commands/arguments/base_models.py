"""Base models that moved after training, anywhere on a command line."""

import argparse
import re
from collections.abc import Sequence

from asrllm.defaults import BASE_MODEL_KEYS
from asrllm.errors import UserError, nearest

MODEL_KEY = re.compile(r"(model\.[a-z_.]*)=(.*)", re.DOTALL)


def split_base_models(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separate the paths of base models from the rest of a command line.

    They may appear anywhere, which argparse does not support together with a list of files.

    Returns:
        The other words, and the given paths by the part of the model.

    Raises:
        UserError: another key of the model is given.
    """
    parts = {key: part for part, key in BASE_MODEL_KEYS.items()}
    others: list[str] = []
    paths: dict[str, str] = {}
    for word in argv:
        match = MODEL_KEY.fullmatch(word)
        if match is None:
            others.append(word)
            continue
        key, path = match.groups()
        if key not in parts:
            raise UserError(f"unknown key {key!r} in {word!r}. {nearest(key, parts)}")
        if path != "null":
            paths[parts[key]] = path
    return others, paths


def add_base_models(parser: argparse.ArgumentParser) -> None:
    """Describe in the help what `split_base_models` takes from the command line."""
    words = " and ".join(f"{key}=PATH" for key in BASE_MODEL_KEYS.values())
    parser.add_argument_group(
        "base models that moved after training",
        f"{words}: where the base models are now; their weights must match those of training",
    )
