"""What a check finds."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]
LEVELS: tuple[Level, ...] = ("ok", "warning", "problem")  # in the order of the report


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: "problem" if training cannot start or would hang, "warning" if it is slower than
            necessary or only some features are missing, else "ok".
        check: a short name of what was checked, for scripts.
        text: what was found, as one sentence without a full stop.
        fix: what the user can do about it, as a sentence; empty if `level` is "ok", or if `text` is
            the message of an error, which ends with the fix.
    """

    level: Level
    check: str
    text: str
    fix: str = ""

    def line(self) -> str:
        """Return the finding as one line."""
        return f"{self.level}: {self.text.rstrip('.')}. {self.fix}".rstrip()


def ok(check: str, text: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding("ok", check, text)


def warning(check: str, text: str, fix: str) -> Finding:
    """Return a finding that does not prevent training."""
    return Finding("warning", check, text, fix)


def problem(check: str, text: str, fix: str) -> Finding:
    """Return a finding that prevents training."""
    return Finding("problem", check, text, fix)
