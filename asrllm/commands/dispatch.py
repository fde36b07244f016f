"""Run the verb that a command line names, and turn its errors into an exit status."""

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
from asrllm.atomic import PATH_FIXES, Terminated, sigterm_raises
from asrllm.commands.arguments.base_models import split_base_models
from asrllm.commands.arguments.configured import COMPARE
from asrllm.commands.arguments.verbs import VERBS
from asrllm.commands.libraries import import_transformers, without_collections
from asrllm.config_keys import check_override, meanings, unknown_option
from asrllm.errors import UserError, error_chain
from asrllm.escape import EscapingFormatter
from asrllm.interrupts import INTERRUPTED, RaiseOnInterrupt
from asrllm.launchers import adopt_launcher
from asrllm.progress import waiting

# modules that import torch late or never: doctor reports it if that fails, init checks data first
WITHOUT_TORCH = ("shards", "doctor", "init", "compare")
CONFIGURED = ("train", "plan", "evaluate", "warm_start")  # modules with key=value arguments
WITH_RANKS = ("train", "evaluate", "warm-start")  # verbs that run as one process or as several
WITH_BASE_MODELS = (
    "transcribe",
    "serve",
    "average",
    "merge-lora",
    "export",
)  # evaluate has its own keys
WRITE_LARGE_FILES = ("consolidate", "average", "merge-lora", "export", "import-icefall")
# Regular expressions of modules and of their FutureWarnings about calls in DeepSpeed and
# transformers. With ZeRO-3 the first one comes hundreds of times in each step.
DEPRECATIONS = {
    r"torch\.distributed\.c10d_logger": r"`torch\.distributed\.\w+` is deprecated",
    r"transformers\.modeling_utils": r"`\w*gradient_checkpointing\w*` is deprecated",
}
GLOO_CONNECTION = "gloo/transport/tcp/"  # part of gloo's message when a connection closes
FAILING_STORAGE = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EREMOTEIO, errno.EUCLEAN)
TOO_MANY_FILES = (
    "too many files are open. Raise the limit with 'ulimit -n 4096', then run the same command "
    "again."
)
KILLED_WORKER = (
    "a reading process was killed. If memory ran out, lower data.num_workers. Run the same command "
    "again."
)


def main(argv: list[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: the arguments without the program's name; default: those of the process.

    Returns:
        The exit status. 0: done, or interrupted by a signal and saved. 2: the user's mistake.
        75: a rank hung, or it or its reading process was killed, and the same command may succeed
        (see Watchdog, Siblings).
        130, 141, 143: ended by SIGINT, SIGPIPE, SIGTERM. A bug exits with a traceback and status 1.
    """
    if argv is None:
        argv = sys.argv[1:]
    argv = drop_launcher_arguments(argv)
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
    """Run a verb, and announce its exit status to the other ranks on the node."""
    try:
        status = run_verb(arguments, ranks)
    except SystemExit as exit_:
        ranks.announce(exit_.code if isinstance(exit_.code, int) else 0)
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
    elif status == INTERRUPTED:  # all ranks are interrupted at once, so the others exit soon
        ranks.end(status, siblings.WAIT_TO_LEAVE)
    else:
        ranks.end(status)
    return status


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether a collective failed because another rank has exited."""
    is_network_error = type(error).__name__ == "DistNetworkError"
    return is_network_error or GLOO_CONNECTION in str(error)


def exit_after_lost_connection(error: RuntimeError, ranks: siblings.Siblings) -> NoReturn:
    """Exit without a traceback, because the rank that exited first prints the cause.

    If that rank is on this node, the thread that watches it ends this process.
    """
    if ranks.wait_for_failure(siblings.AFTER_ERROR):
        time.sleep(siblings.AFTER_HANG + siblings.CHECK_INTERVAL)
    address = re.search(r"\[([^\]]+)\]:\d+", str(error))
    where = f" at {address[1]}" if address else ""
    ranks.leave(f"asrllm: the connection to another rank{where} was lost. {siblings.RUN_AGAIN}")


def report_interruption(arguments: argparse.Namespace, ranks: siblings.Siblings) -> None:
    """Report Ctrl-C once per node."""
    if INTERRUPTED not in ranks.statuses.values():  # otherwise another rank has reported it
        ranks.report(f"asrllm {arguments.verb}: interrupted")


def run_verb(arguments: argparse.Namespace, ranks: siblings.Siblings) -> int:
    """Run a verb and return its exit status. The user's mistakes are reported once per node."""

    def leave() -> None:
        report_interruption(arguments, ranks)
        ranks.end(INTERRUPTED, siblings.WAIT_TO_LEAVE)

    try:
        set_up_logging()
        name = module_name(arguments)
        # without that number each rank would print, because it ends before the others start
        if name in CONFIGURED and (ranks.rank < 0 or ranks.on_node is not None):
            check_overrides(arguments)
        run = load_module(name)
        cleanup: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if arguments.verb in WRITE_LARGE_FILES:
            cleanup = sigterm_raises()
        with RaiseOnInterrupt(leave), cleanup:
            run(arguments)
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of standard output, for example `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        report_interruption(arguments, ranks)
        return INTERRUPTED
    except Terminated as exit_:
        text = f"asrllm {arguments.verb}: interrupted by SIGTERM. Run the same command again."
        ranks.report(text)
        return int(exit_.code or 0)
    except UserError as error:
        ranks.report(f"asrllm {arguments.verb}: {error}")
        return 2
    except OSError as error:
        ranks.report(f"asrllm {arguments.verb}: {explain(error)}")
        return 2
    except Exception as error:
        if lacks_descriptors(error):
            ranks.report(f"asrllm {arguments.verb}: {TOO_MANY_FILES}")
            return 2
        if not lost_a_worker(error):
            raise
        ranks.report(f"asrllm {arguments.verb}: {KILLED_WORKER}")
        return siblings.MAY_SUCCEED
    return 0


def check_overrides(arguments: argparse.Namespace) -> None:
    """Raise UserError for an unknown key before libraries are imported, which takes seconds."""
    known = meanings(arguments.configuration)
    for override in arguments.overrides:
        check_override(override, known)


def set_up_logging() -> None:
    """Log warnings on the first rank and errors on all ranks to standard error."""
    for module, message in DEPRECATIONS.items():
        warnings.filterwarnings("ignore", message, FutureWarning, module)
    level = logging.WARNING if os.environ.get("RANK", "0") == "0" else logging.ERROR
    handler = logging.StreamHandler()
    handler.setFormatter(EscapingFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


def lacks_descriptors(error: BaseException) -> bool:
    """Return whether an error, or one that caused it, comes from the limit of open files."""
    return any(os.strerror(errno.EMFILE) in str(link) for link in error_chain(error, contexts=True))


def lost_a_worker(error: BaseException) -> bool:
    """Return whether an error, or one that caused it, is torch's for a reading process that ended.

    torch raises it in a handler of SIGCHLD, within whatever runs at the moment.
    """
    return any("DataLoader worker (pid" in str(link) for link in error_chain(error, contexts=True))


def drop_launcher_arguments(argv: list[str]) -> list[str]:
    """Drop --local_rank=N of DeepSpeed's launcher and --local-rank=N of torch's.

    The launchers set the environment variable LOCAL_RANK to the same number.
    """
    return [word for word in argv if not word.startswith(("--local_rank=", "--local-rank="))]


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse a command line, where key=value may also follow an option."""
    arguments, rest = build_parser(argv).parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        problem = f"unknown option {unknown[0]}"
        if hasattr(arguments, "overrides"):
            problem = unknown_option(unknown[0], meanings(arguments.configuration))
        arguments.parser.error(problem)
    if rest and not hasattr(arguments, "overrides"):
        arguments.parser.error(f"unexpected argument {rest[0]!r}")
    if rest:
        arguments.overrides += rest
    return arguments


def build_parser(argv: list[str]) -> argparse.ArgumentParser:
    """Return a parser that knows all verbs, and the arguments of the verb in `argv`."""
    parser = argparse.ArgumentParser(
        prog="asrllm", description="Train a large language model to hear."
    )
    parser.add_argument("--version", action="version", version=asrllm.__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        subparser = verbs.add_parser(name, help=verb.help, description=verb.help)
        if name in argv[:1]:
            verb.add_arguments(subparser, argv[1:])
            subparser.set_defaults(parser=subparser)
    return parser


def module_name(arguments: argparse.Namespace) -> str:
    """Return which module of asrllm.commands implements a command line."""
    if arguments.verb == "evaluate" and arguments.overrides[:1] == [COMPARE]:
        return "compare"
    return str(arguments.verb).replace("-", "_")


def load_module(name: str) -> Callable[[argparse.Namespace], None]:
    """Import a module of asrllm.commands, which takes seconds if it needs torch."""
    with waiting("importing libraries"), without_collections():
        if name not in WITHOUT_TORCH:
            import_transformers()
        module = importlib.import_module(f"asrllm.commands.{name}")
    run: Callable[[argparse.Namespace], None] = module.run
    return run


def explain(error: OSError) -> str:
    """Return what the user can do about an operating-system error, or raise it again."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space is left on the disk ({error}). Free space and run the same command again."
    if lacks_descriptors(error) or error.errno == errno.ENFILE:
        return TOO_MANY_FILES
    if error.errno == errno.ENOLCK:
        return f"a file cannot be locked ({error}). Use directories on a file system with locks."
    if error.errno in (errno.EAGAIN, errno.ENOMEM) and not error.filename:
        return (
            f"the system denies another process or more memory ({error}). Use fewer processes "
            "(data.num_workers, --workers), or raise 'ulimit -u' and the limit of memory."
        )
    if error.errno in FAILING_STORAGE:
        return (
            f"a file system fails ({error}). Check the disk or the network mount, then run the "
            "same command again."
        )
    fixes = {errno.ENOENT: "Check its path.", **PATH_FIXES}
    if error.errno in fixes and error.filename:
        fix = fixes[error.errno]
        return f"{error.filename!r} cannot be read or written ({error.strerror}). {fix}"
    raise error
