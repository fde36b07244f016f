"""The end of an answer: its maximum length, its stop tokens, and loops."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

MAX_LOOP_TOKENS = 16  # the longest sequence of tokens whose repetition counts as a loop
MIN_LOOP_COPIES = 5  # how often it must be repeated
EXTRA_TOKENS = 10  # added to the limit by duration, so that a short audio can have an answer


def token_limit(seconds: float, max_new_tokens: int, max_tokens_per_second: float | None) -> int:
    """Return the maximum number of tokens in the answer to some seconds of audio."""
    if max_tokens_per_second is None:
        return max_new_tokens
    return min(max_new_tokens, round(seconds * max_tokens_per_second) + EXTRA_TOKENS)


class RowStopping(StoppingCriteria):
    """Stop each row at its own limit, or when it has begun to loop.

    A batch ends with the last of its rows.

    Attributes:
        limits: maximum number of new tokens of each row.
        guard: as in `first_loop`. It is None with beam search, where a looping hypothesis that
            was stopped would win over correct ones that continue.
        prompt: number of tokens of the prompt, which precede the new tokens.
    """

    def __init__(self, limits: Sequence[int], guard: int | None, prompt: int = 0) -> None:
        self.limits = torch.tensor(limits)
        self.guard = guard
        self.prompt = prompt

    def keep(self, rows: Tensor) -> None:
        """Continue with some of the rows, given by their indices."""
        self.limits = self.limits[rows]

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **_: Any) -> Tensor:
        """Return which rows are done.

        Args:
            input_ids: (rows, prompt and new tokens). Beam search has several rows for each answer.
            scores: not used.

        Returns:
            (rows,) bool.
        """
        input_ids = input_ids[:, self.prompt :]
        length = input_ids.shape[1]
        self.limits = self.limits.to(input_ids.device)
        rows_per_answer = len(input_ids) // len(self.limits)
        done = (self.limits <= length).repeat_interleave(rows_per_answer)
        if not self.guard:
            return done
        for n in range(1, MAX_LOOP_TOKENS + 1):
            start = length - n * copies_of_loop(n, self.guard)
            if start >= 0:
                # In a loop every token equals the one n tokens before it.
                is_loop = input_ids[:, start + n :] == input_ids[:, start : length - n]
                done |= is_loop.all(1)
        return done


def copies_of_loop(n: int, guard: int) -> int:
    """Return how many consecutive copies of n tokens are a loop.

    They must have more than `guard` tokens together, and be at least MIN_LOOP_COPIES.
    """
    return max(MIN_LOOP_COPIES, guard // n + 1)


def first_loop(row: Sequence[Hashable], guard: int) -> int | None:
    """Return where the second copy of the first loop begins, or None if there is no loop.

    A loop is the same 1 to MAX_LOOP_TOKENS tokens at least MIN_LOOP_COPIES times in a row, with
    more than `guard` tokens together. For guard=32 it is one token 33 times, two tokens 17 times,
    or seven or more tokens 5 times. Laughter, "no no no" and rows of digits are shorter.
    """
    found: list[tuple[int, int]] = []  # (where the loop is complete, where its second copy begins)
    for n in range(1, MAX_LOOP_TOKENS + 1):
        needed = n * (copies_of_loop(n, guard) - 1)
        run = 0
        for i in range(n, len(row)):
            run = run + 1 if row[i] == row[i - n] else 0
            if run >= needed:
                found.append((i, i - run + 1))
                break
    return min(found)[1] if found else None


def first_stop(row: Sequence[int], stop_ids: Sequence[int]) -> int:
    """Return the position of the first stop token, or the length of the row if it has none."""
    for i, token in enumerate(row):
        if token in stop_ids:
            return i
    return len(row)


def answer_tokens(row: list[int], stop_ids: Sequence[int], guard: int | None) -> list[int]:
    """Return the tokens of an answer: those before the first stop token and before a loop.

    The first copy of a loop is part of the answer. What follows a loop is not reliable either.
    """
    row = row[: first_stop(row, stop_ids)]
    if not guard:
        return row
    return row[: first_loop(row, guard)]
