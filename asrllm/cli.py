"""The command line: `asrllm <verb> ...`, and the same verbs as scripts in launch/."""

import argparse
import errno
import importlib
import logging
import os
import sys
import warnings

import torch
import torch.distributed

import asrllm
from asrllm.errors import UserError
from asrllm.training.launchers import adopt_launcher

VERBS = {
    "shards": "make, index, verify and describe WebDataset shards",
    "plan": "what a run will take: steps, padding, memory by ZeRO stage",
    "train": "train a model",
    "evaluate": "average checkpoints, decode test sets, score them",
    "transcribe": "text for audio files",
    "consolidate": "one ZeRO checkpoint -> a plain state dict",
    "average": "the mean of several checkpoints",
    "merge-lora": "the LLM with its adapters in it, as a plain Hugging Face directory",
    "import-icefall": "weights of icefall's ASR_LLM -> a directory as a run leaves it",
    "export": "a run -> a self-contained Hugging Face directory",
}


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, or asked to end and saved; 2 a user's mistake; 75 training hung (Watchdog); 1 anything else (a traceback)."""
    argv = forget_launcher_argument(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["train"], ["evaluate"]):
        try:
            adopt_launcher()
        except UserError as error:
            print(f"asrllm {argv[0]}: {error}", file=sys.stderr, flush=True)
            return 2
    warnings.simplefilter("ignore", FutureWarning)  # what libraries will change one day is for our tests, not for users
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns, when imported, that it found none
    level = logging.WARNING if os.environ.get("RANK", "0") == "0" else logging.ERROR  # what one rank warns of, the others would repeat
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s")
    parser = argparse.ArgumentParser(prog="asrllm", description="Train a large language model to hear.")
    parser.add_argument("--version", action="version", version=asrllm.__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, what in VERBS.items():
        subparser = verbs.add_parser(verb, help=what, description=what)
        if verb in argv[:1]:  # only the verb that is asked for is imported
            module = importlib.import_module(f"asrllm.commands.{verb.replace('-', '_')}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except UserError as error:
        # before the ranks have met they all find the same mistake, after it perhaps one alone
        if int(os.environ.get("LOCAL_RANK", "0")) == 0 or torch.distributed.is_initialized():
            print(f"asrllm {arguments.verb}: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(
            f"asrllm {arguments.verb}: no space is left on the disk ({error}): make room, and give the same command again", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print(f"asrllm {arguments.verb}: interrupted", file=sys.stderr)
        return 130
    return 0


def forget_launcher_argument(argv: list[str]) -> list[str]:
    """DeepSpeed's launcher appends --local_rank=N, which it also puts into the environment."""
    return [argument for argument in argv if not argument.startswith("--local_rank=")]


def console() -> None:
    sys.exit(main())


if __name__ == "__main__":
    console()
