"""Errors caused by user input."""

import difflib
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """A user's mistake. The message says what is wrong and how to fix it.

    The command line prints the message and exits with status 2.
    """


class CorruptedError(UserError):
    """The bytes of a file are not those that were written."""


def error_chain(error: BaseException, *, contexts: bool = False) -> Iterator[BaseException]:
    """Yield an error, its cause, the cause of that, ..., each once.

    OmegaConf makes errors their own causes under a debugger.

    Args:
        error: the error.
        contexts: whether the error that was handled counts as the cause of one without a cause.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (link.__context__ if contexts else None)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a sentence with the known word nearest to `word`, or with all known words."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Available: {', '.join(sorted(known)) or 'none'}."


def reject_unknown(function: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Check the keyword arguments of a function.

    Args:
        function: name of the function.
        given: names of the given arguments.
        known: names of its arguments.

    Raises:
        UserError: an argument is unknown.
    """
    known = list(known)
    for name in given:
        if name not in known:
            raise UserError(f"{function} has no argument {name!r}. {nearest(name, known)}")
