"""Rejected utterances: the lines of `rejected.jsonl`, and examples for messages."""

import json
from typing import NamedTuple

from asrllm.escape import escape

SHOWN_EXAMPLES = 3  # rejected utterances in a message


class Rejected(NamedTuple):
    """A rejected utterance, a line of `rejected.jsonl`."""

    key: str
    reason: str
    detail: str


class RejectedExamples:
    """A few rejected utterances, of as many reasons as possible."""

    def __init__(self) -> None:
        self.first: dict[str, Rejected] = {}  # the first example of each reason
        self.others: list[Rejected] = []

    def add(self, row: Rejected) -> None:
        """Keep a row if it is the first of its reason, or if there are few others."""
        if row.reason not in self.first:
            self.first[row.reason] = row
        elif len(self.others) < SHOWN_EXAMPLES:
            self.others.append(row)

    def lines(self) -> list[str]:
        """Return a line for each example."""
        shown = [*self.first.values(), *self.others][:SHOWN_EXAMPLES]
        return [escape(f"  {row.key}: {row.reason}: {row.detail}") for row in shown]


def rejected_line(row: Rejected) -> str:
    """Return a line of rejected.jsonl."""
    return json.dumps(row._asdict(), ensure_ascii=False) + "\n"
