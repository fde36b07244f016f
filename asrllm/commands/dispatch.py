"""From a command line to the verb that runs it, and from its errors to an exit status."""

import argparse
import contextlib
import errno
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable

import asrllm
from asrllm.cli import INTERRUPTED, RaiseOnInterrupt
from asrllm.commands.parsers import VERBS
from asrllm.errors import UserError
from asrllm.escape import EscapingFormatter, escape
from asrllm.training.launchers import adopt_launcher
from asrllm.writing import MENDED, Terminated, sigterm_raises

WITHOUT_TORCH = ("shards",)
WITH_RANKS = ("train", "evaluate")  # verbs that run as one process or as several
WRITE_MUCH = ("consolidate", "average", "merge-lora", "export", "import-icefall")


def main(argv: list[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: the arguments without the program's name; default: those of the process.

    Returns:
        The exit status: 0 done, or interrupted by a signal and saved; 2 an error of the user's;
        75 training hung (see Watchdog); 130, 141, 143 ended by SIGINT, SIGPIPE, SIGTERM.
        A bug ends in a traceback, with status 1.
    """
    argv = without_launcher_arguments(sys.argv[1:] if argv is None else argv)
    verb = argv[0] if argv else None
    arguments = build_parser(argv).parse_args(argv)
    try:
        if verb in WITH_RANKS:
            adopt_launcher()
        # FutureWarnings concern developers, not users
        warnings.simplefilter("ignore", FutureWarning)
        level = logging.WARNING if os.environ.get("RANK", "0") == "0" else logging.ERROR
        handler = logging.StreamHandler()
        handler.setFormatter(EscapingFormatter("%(levelname)s: %(message)s"))
        logging.basicConfig(level=level, handlers=[handler])
        run = load_verb(arguments.verb)
        cleaning = sigterm_raises() if verb in WRITE_MUCH else contextlib.nullcontext()
        with RaiseOnInterrupt(), cleaning:
            run(arguments)
            sys.stdout.flush()
    except BrokenPipeError:  # `| head` wants no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        if is_first_to_report():
            report(arguments.verb, "interrupted")
        return INTERRUPTED
    except Terminated as ended:
        report(arguments.verb, "interrupted by SIGTERM. Run the same command again.")
        return int(ended.code or 0)
    except UserError as error:
        if is_first_to_report():
            report(arguments.verb, str(error))
        return 2
    except OSError as error:
        report(arguments.verb, explain(error))
        return 2
    return 0


def without_launcher_arguments(argv: list[str]) -> list[str]:
    """Drop --local_rank=N of DeepSpeed's and --local-rank=N of torch's launcher, which are in LOCAL_RANK too."""
    return [word for word in argv if not word.startswith(("--local_rank=", "--local-rank="))]


def build_parser(argv: list[str]) -> argparse.ArgumentParser:
    """Return the parser of a command line: all verbs, and the arguments of the one in `argv`."""
    parser = argparse.ArgumentParser(prog="asrllm", description="Train a large language model to hear.")
    parser.add_argument("--version", action="version", version=asrllm.__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        subparser = verbs.add_parser(name, help=verb.help, description=verb.help)
        if name in argv[:1]:
            verb.add_arguments(subparser, argv[1:])
    return parser


def load_verb(verb: str) -> Callable[[argparse.Namespace], None]:
    """Import the implementation of a verb, which takes seconds where torch is needed."""
    if verb not in WITHOUT_TORCH:
        import torch

        if not torch.accelerator.is_available():  # DeepSpeed would warn that it found none
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
    module = importlib.import_module(f"asrllm.commands.{verb.replace('-', '_')}")
    run: Callable[[argparse.Namespace], None] = module.run
    return run


def report(verb: str, message: str) -> None:
    """Print a message to standard error, which may be gone."""
    with contextlib.suppress(OSError):
        print(escape(f"asrllm {verb}: {message}", keep="\n"), file=sys.stderr, flush=True)


def is_first_to_report() -> bool:
    """Whether this rank reports an error of the user's: before the ranks join, all of them find the same."""
    distributed = sys.modules.get("torch.distributed")
    joined = distributed is not None and distributed.is_initialized()
    return joined or os.environ.get("LOCAL_RANK", "0") == "0"


def explain(error: OSError) -> str:
    """Return what the user can do about an operating-system error, or raise it again."""
    if error.errno == errno.ENOSPC:
        return f"no space is left on the disk ({error}): make room, and give the same command again"
    if error.errno in MENDED and error.filename:
        return f"{error.filename!r} cannot be read or written ({error.strerror}): {MENDED[error.errno]}"
    raise error
