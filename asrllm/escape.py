"""Make text of unknown origin safe for terminals and for files with one entry per line.

Keys, file names and transcripts come from other people's data. Control characters in them would
move the cursor or rename the window, and a line break would fake a line of output.
"""

import logging
import re

# C0 and C1 controls, line and paragraph separators, bidirectional overrides, and lone surrogates,
# by which Python represents bytes of file names that are not UTF-8
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escape(text: str, *, keep: str = "") -> str:
    r"""Replace unsafe characters by Python escapes, for example `\x1b` or `\n`.

    Args:
        text: any text.
        keep: unsafe characters to leave unchanged.
    """

    def escaped(found: re.Match[str]) -> str:
        character = found.group()
        if character in keep:
            return character
        return ascii(character)[1:-1]

    return UNSAFE.sub(escaped, text)


class EscapingFormatter(logging.Formatter):
    """Escapes unsafe characters in log records. A traceback keeps its lines."""

    def format(self, record: logging.LogRecord) -> str:
        return escape(super().format(record), keep="\n\t")
