"""What a user can mend is said in one sentence."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A user's mistake: one sentence that says what, where and how to mend it. The command line ends with status 2."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that names the known word nearest to `word`, or all of them when none is near."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(sorted(known))}"
