"""What a user can mend is said in one sentence."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class UserError(Exception):
    """A user's mistake: one sentence that says what, where and how to mend it. The command line ends with status 2."""


class CorruptedError(UserError):
    """A file does not hold the bytes that were written to it."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that names the known word nearest to `word`, or all of them when none is near."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(sorted(known))}"


def refuse_unknown(function: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises UserError for the first keyword that a function was given and does not know."""
    known = list(known)
    if unknown := [name for name in given if name not in known]:
        close = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(known) or 'none'}"
        raise UserError(f"{function} does not know the keyword {unknown[0]!r}: {hint}")
