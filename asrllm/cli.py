"""The command line: `asrllm <verb> ...`, and the same verbs as scripts in launch/."""

import argparse
import atexit
import contextlib
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
from asrllm.writing import MENDED, Terminated, sigterm_raises

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
RANKS = (["train"], ["evaluate"])  # as one process or as many
WRITE_MUCH = ("consolidate", "average", "merge-lora", "export", "import-icefall")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, or asked to end and saved; 2 a user's mistake; 75 training hung (Watchdog); 130, 141, 143 ended
    by SIGINT, SIGPIPE, SIGTERM; 1 anything else (a traceback)."""
    argv = forget_launcher_argument(sys.argv[1:] if argv is None else argv)
    if argv[:1] in RANKS:
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
        with sigterm_raises() if arguments.verb in WRITE_MUCH else contextlib.nullcontext():
            arguments.run(arguments)
            sys.stdout.flush()
    except UserError as error:
        # before the ranks have met they all find the same mistake, after it perhaps one alone
        if int(os.environ.get("LOCAL_RANK", "0")) == 0 or torch.distributed.is_initialized():
            print(f"asrllm {arguments.verb}: {error}", file=sys.stderr, flush=True)
        return 2
    except BrokenPipeError:  # `| head` wants no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno == errno.ENOSPC:
            said = f"no space is left on the disk ({error}): make room, and give the same command again"
        elif error.errno in MENDED and error.filename:
            said = f"{error.filename!r} cannot be read or written ({error.strerror}): {MENDED[error.errno]}"
        else:
            raise
        print(f"asrllm {arguments.verb}: {said}", file=sys.stderr)
        return 2
    except Terminated as ended:
        print(f"asrllm {arguments.verb}: ended by SIGTERM: give the same command again", file=sys.stderr)
        return int(ended.code or 0)
    except KeyboardInterrupt:
        print(f"asrllm {arguments.verb}: interrupted", file=sys.stderr)
        return 130
    return 0


def forget_launcher_argument(argv: list[str]) -> list[str]:
    """DeepSpeed's launcher appends --local_rank=N, which it also puts into the environment."""
    return [argument for argument in argv if not argument.startswith("--local_rank=")]


def console(*verb: str) -> None:
    """Ends the process. verb: what a script of launch/ leaves out of its command line."""
    status = main([*verb, *sys.argv[1:]])
    # the interpreter's own end is left out: it takes a second for all that was imported, and aborts the process where a thread of gloo's
    # lets go of its last tensors only then
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    console()
