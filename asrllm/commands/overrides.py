"""What the verbs that take `key=value` share."""

import argparse

from asrllm.config import help_text


def add_override_arguments(parser: argparse.ArgumentParser, config: str) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a key of the configuration below and its new value")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"keys, their defaults and what they do:\n\n{help_text(config)}"
