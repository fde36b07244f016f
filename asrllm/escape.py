"""Text of unknown origin, made safe for terminals and for files of one entry per line.

Keys, file names and transcripts come from other people's data. Printed as they are, control
characters move the cursor or rename the window, and a line break fakes a line of its own.
"""

import logging
import re

# C0 and C1 controls, line and paragraph separators, bidirectional overrides, lone surrogates (which
# stand for bytes of file names that are not UTF-8)
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escape(text: str, *, keep: str = "") -> str:
    r"""Write unsafe characters as Python escapes, such as `\x1b` and `\n`.

    Args:
        text: any text.
        keep: unsafe characters to leave as they are.
    """

    def escaped(found: re.Match[str]) -> str:
        character = found.group()
        return character if character in keep else ascii(character)[1:-1]

    return UNSAFE.sub(escaped, text)


class EscapingFormatter(logging.Formatter):
    """Log records whose text is safe to print. A traceback keeps its lines."""

    def format(self, record: logging.LogRecord) -> str:
        return escape(super().format(record), keep="\n\t")
