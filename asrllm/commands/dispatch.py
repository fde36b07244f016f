"""From a command line to the verb that runs it, and from its errors to an exit status."""

import argparse
import contextlib
import errno
import importlib
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from typing import NoReturn

import asrllm
from asrllm import siblings
from asrllm.atomic import MENDED, Terminated, sigterm_raises
from asrllm.cli import INTERRUPTED, RaiseOnInterrupt
from asrllm.commands.parsers import VERBS, split_base_models
from asrllm.errors import UserError
from asrllm.escape import EscapingFormatter
from asrllm.launchers import adopt_launcher

WITHOUT_TORCH = ("shards",)
WITH_RANKS = ("train", "evaluate")  # verbs that run as one process or as several
GLOO_CONNECTION = "gloo/transport/tcp/"  # in what gloo raises when a connection closes
TOO_MANY_FILES = "too many files are open. Raise the limit with 'ulimit -n 4096', then run the same command again."
WITH_BASE_MODELS = ("transcribe", "average", "merge-lora", "export")  # evaluate has its own keys
WRITE_MUCH = ("consolidate", "average", "merge-lora", "export", "import-icefall")


def main(argv: list[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: the arguments without the program's name; default: those of the process.

    Returns:
        The exit status: 0 done, or interrupted by a signal and saved; 2 an error of the user's;
        75 a rank hung or was killed, and the same command may succeed (see Watchdog, Siblings);
        130, 141, 143 ended by SIGINT, SIGPIPE, SIGTERM.
        A bug ends in a traceback, with status 1.
    """
    argv = without_launcher_arguments(sys.argv[1:] if argv is None else argv)
    verb = argv[0] if argv else None
    base_models: dict[str, str] = {}
    if verb in WITH_BASE_MODELS:
        try:
            argv, base_models = split_base_models(argv)
        except UserError as error:
            siblings.mine().report(f"asrllm {verb}: {error}")
            return 2
    arguments = parse(argv)
    arguments.base_models = base_models
    if verb not in WITH_RANKS:
        return run_verb(arguments, siblings.mine())
    try:
        adopt_launcher()
        with siblings.watched() as ranks:
            return run_as_rank(arguments, ranks)
    except UserError as error:
        siblings.mine().report(f"asrllm {verb}: {error}")
        return 2
    except OSError as error:
        siblings.mine().report(f"asrllm {verb}: {explain(error)}")
        return 2


def run_as_rank(arguments: argparse.Namespace, ranks: siblings.Siblings) -> int:
    """Run a verb, and tell the other ranks on the node how it ends."""
    try:
        status = run_verb(arguments, ranks)
    except SystemExit as ended:
        ranks.announce(ended.code if isinstance(ended.code, int) else 0)
        raise
    except RuntimeError as error:
        if not is_lost_connection(error):
            ranks.announce(1)
            raise
        exit_after_lost_connection(error, ranks)
    except BaseException:
        ranks.announce(1)
        raise
    if status == 0:
        ranks.announce(status)
    elif status == INTERRUPTED:  # of all ranks at once, so that no one need wait for long
        ranks.end(status, siblings.WAIT_TO_LEAVE)
    else:
        ranks.end(status)
    return status


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether a collective failed because another rank has ended."""
    is_network_error = type(error).__name__ == "DistNetworkError"
    return is_network_error or GLOO_CONNECTION in str(error)


def exit_after_lost_connection(error: RuntimeError, ranks: siblings.Siblings) -> NoReturn:
    """End this process without the traceback: the rank that ended first prints what is wrong.

    If that rank is on this node, the thread that watches it ends this process.
    """
    if ranks.wait_for_failure(siblings.AFTER_ERROR):
        time.sleep(siblings.AFTER_HANG + siblings.CHECK_INTERVAL)
    address = re.search(r"\[([^\]]+)\]:\d+", str(error))
    where = f" at {address[1]}" if address else ""
    ranks.leave(f"asrllm: the connection to another rank{where} was lost. {siblings.RUN_AGAIN}")


def run_verb(arguments: argparse.Namespace, ranks: siblings.Siblings) -> int:
    """Run a verb and return its exit status; report errors of the user's once on a node."""
    try:
        # FutureWarnings concern developers, not users
        warnings.simplefilter("ignore", FutureWarning)
        level = logging.WARNING if os.environ.get("RANK", "0") == "0" else logging.ERROR
        handler = logging.StreamHandler()
        handler.setFormatter(EscapingFormatter("%(levelname)s: %(message)s"))
        logging.basicConfig(level=level, handlers=[handler])
        run = load_verb(arguments.verb)
        cleaning = sigterm_raises() if arguments.verb in WRITE_MUCH else contextlib.nullcontext()
        with RaiseOnInterrupt(), cleaning:
            run(arguments)
            sys.stdout.flush()
    except BrokenPipeError:  # `| head` wants no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        ranks.report(f"asrllm {arguments.verb}: interrupted")
        return INTERRUPTED
    except Terminated as ended:
        text = f"asrllm {arguments.verb}: interrupted by SIGTERM. Run the same command again."
        ranks.report(text)
        return int(ended.code or 0)
    except UserError as error:
        ranks.report(f"asrllm {arguments.verb}: {error}")
        return 2
    except OSError as error:
        ranks.report(f"asrllm {arguments.verb}: {explain(error)}")
        return 2
    except Exception as error:
        if not lacks_descriptors(error):
            raise
        ranks.report(f"asrllm {arguments.verb}: {TOO_MANY_FILES}")
        return 2
    return 0


def lacks_descriptors(error: BaseException | None) -> bool:
    """Return whether an error comes from the limit of open files, whatever a library made of it."""
    while error is not None:
        if os.strerror(errno.EMFILE) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def without_launcher_arguments(argv: list[str]) -> list[str]:
    """Drop --local_rank=N of DeepSpeed's and --local-rank=N of torch's launcher, which are in LOCAL_RANK too."""
    return [word for word in argv if not word.startswith(("--local_rank=", "--local-rank="))]


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse a command line, on which key=value may also follow an option."""
    parser = build_parser(argv)
    arguments, rest = parser.parse_known_args(argv)
    if not hasattr(arguments, "overrides") or any(word.startswith("-") for word in rest):
        return parser.parse_args(argv)
    arguments.overrides += rest
    return arguments


def build_parser(argv: list[str]) -> argparse.ArgumentParser:
    """Return the parser of a command line: all verbs, and the arguments of the one in `argv`."""
    parser = argparse.ArgumentParser(
        prog="asrllm", description="Train a large language model to hear."
    )
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
        import transformers

        transformers.utils.logging.disable_progress_bar()  # the verbs have their own
    module = importlib.import_module(f"asrllm.commands.{verb.replace('-', '_')}")
    run: Callable[[argparse.Namespace], None] = module.run
    return run


def explain(error: OSError) -> str:
    """Return what the user can do about an operating-system error, or raise it again."""
    if error.errno == errno.ENOSPC:
        return f"no space is left on the disk ({error}): make room, and give the same command again"
    if lacks_descriptors(error) or error.errno == errno.ENFILE:
        return TOO_MANY_FILES
    if error.errno == errno.ENOLCK:
        return f"a file cannot be locked ({error}). Use directories on a file system with locks."
    if error.errno in MENDED and error.filename:
        return f"{error.filename!r} cannot be read or written ({error.strerror}): {MENDED[error.errno]}"
    raise error
