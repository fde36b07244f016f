"""The end of an answer: its maximum length, its stop tokens, and loops."""

from collections.abc import Hashable, Iterable, Sequence
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
        guard: as in `LoopDetector`. It is None with beam search, where a looping hypothesis that
            was stopped would win over correct ones that continue.
        prompt: number of tokens of the prompt, which precede the new tokens.
    """

    def __init__(self, limits: Sequence[int], guard: int | None, prompt: int = 0) -> None:
        self.limits = torch.tensor(limits)
        self.guard = guard
        self.prompt = prompt

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


class LoopDetector:
    """Notices the first loop in a row whose tokens arrive one by one.

    A loop is the same 1 to MAX_LOOP_TOKENS tokens at least MIN_LOOP_COPIES times in a row, with
    more than `guard` tokens together. For guard=32 it is one token 33 times, two tokens 17 times,
    or seven or more tokens 5 times. Laughter, "no no no" and rows of digits are shorter.
    """

    def __init__(self, guard: int) -> None:
        self.row: list[Hashable] = []
        self.runs = [0] * (MAX_LOOP_TOKENS + 1)  # how long each token equals the one n before it
        self.needed = [n * (copies_of_loop(n, guard) - 1) for n in range(1, MAX_LOOP_TOKENS + 1)]

    def add(self, token: Hashable) -> int | None:
        """Append a token.

        Returns:
            Where the second copy of a loop begins if this token completes it, otherwise None.
        """
        self.row.append(token)
        last = len(self.row) - 1
        starts: list[int] = []
        for n, needed in enumerate(self.needed, 1):
            is_repeated = last >= n and self.row[last - n] == token
            self.runs[n] = self.runs[n] + 1 if is_repeated else 0
            if self.runs[n] >= needed:
                starts.append(last - self.runs[n] + 1)
        return min(starts, default=None)


def first_loop(row: Iterable[Hashable], guard: int) -> int | None:
    """Return where the second copy within the first loop begins, None without a loop."""
    detector = LoopDetector(guard)
    for token in row:
        start = detector.add(token)
        if start is not None:
            return start
    return None


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
