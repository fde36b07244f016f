"""Segments that share a running batch: who joins, who leaves, and who fails."""

import queue

import numpy as np
import pytest
import torch

from asrllm.models.asr_llm.generation import Answer
from asrllm.serving.batcher import Batcher
from asrllm.serving.metrics import ServerMetrics
from tests.processes import wait_for

SECONDS = 20


class Row:
    def __init__(self, prompt):
        self.prompt = prompt
        self.is_done = False


class SteppedBatch:
    """A batch whose steps the test allows one by one; a row is done when its prompt is named."""

    def __init__(self, engine):
        self.engine = engine
        self.rows = []
        self.can_join = True

    def join(self, waves, prompts):
        self.engine.fail(prompts)
        rows = [Row(prompt) for prompt in prompts]
        self.rows += rows
        return rows

    def step(self):
        running = [row.prompt for row in self.rows if not row.is_done]
        self.engine.steps.put(running)
        done = self.engine.may_finish.get(timeout=SECONDS)
        self.engine.fail(running)
        finished = [row for row in self.rows if row.prompt in done and not row.is_done]
        for row in finished:
            row.is_done = True
        self.rows = [row for row in self.rows if not row.is_done]
        return [(row, Answer(text=row.prompt)) for row in finished]


class SteppedEngine:
    """An engine that fails whenever one of the `bad` prompts, or more than `most`, are in it."""

    limits = (0, 1 << 20)
    padded_to = 0.0
    parallel = 1

    def __init__(self, bad=(), most=99):
        self.bad = bad
        self.most = most
        self.steps = queue.SimpleQueue()  # prompts that run, before each step
        self.may_finish = queue.SimpleQueue()  # prompts that the next step finishes

    def fail(self, prompts):
        if set(self.bad) & set(prompts):
            raise ZeroDivisionError
        if len(prompts) > self.most:
            raise torch.OutOfMemoryError

    def answer(self, waves, prompts):
        self.fail(prompts)
        return [Answer(text=prompt) for prompt in prompts]

    def open_batch(self):
        return SteppedBatch(self)

    def close(self):
        pass

    def step(self, *finished):
        """Wait until a step begins, let it finish some prompts, and return what runs."""
        running = self.steps.get(timeout=SECONDS)
        self.may_finish.put(finished)
        return running


@pytest.fixture
def start():
    batchers = []

    def make(engine, batch_size=3):
        batchers.append(Batcher(engine, batch_size=batch_size, metrics=ServerMetrics()))
        return batchers[-1]

    yield make
    for batcher in batchers:
        for _ in range(9):
            batcher.engine.may_finish.put("abcdefgh")
        batcher.close()


def submit(batcher, prompt):
    return batcher.submit(np.zeros(9, np.float32), prompt)


def test_segments_join_between_steps_and_leave_when_they_are_done(start):
    engine = SteppedEngine()
    batcher = start(engine)
    first = submit(batcher, "a")
    assert engine.steps.get(timeout=SECONDS) == ["a"]
    others = [submit(batcher, prompt) for prompt in "bcd"]
    engine.may_finish.put("")
    assert engine.step("b") == ["a", "b", "c"], "there is room for three"
    assert others[0].result(SECONDS).text == "b"
    assert engine.step("a", "c", "d") == ["a", "c", "d"]
    assert first.result(SECONDS).text == "a"
    assert [other.result(SECONDS).text for other in others] == ["b", "c", "d"]


def test_cancelled_segment_frees_its_place_between_two_steps(start):
    engine = SteppedEngine()
    batcher = start(engine, batch_size=1)
    first = submit(batcher, "a")
    assert engine.steps.get(timeout=SECONDS) == ["a"]
    never = submit(batcher, "b")
    second = submit(batcher, "c")
    assert first.cancel()
    assert never.cancel()
    engine.may_finish.put("")
    running = engine.step()
    while "c" not in running:
        assert "b" not in running
        running = engine.step("c")
    assert second.result(SECONDS).text == "c"


@pytest.mark.parametrize("when", ["joining", "running"])
def test_only_the_segment_that_fails_has_an_error(start, when):
    engine = SteppedEngine(bad="b" if when == "joining" else "")
    batcher = start(engine)
    good = submit(batcher, "a")
    assert engine.steps.get(timeout=SECONDS) == ["a"]
    bad = submit(batcher, "b")
    last = submit(batcher, "c")
    engine.may_finish.put("")
    if when == "running":
        assert engine.steps.get(timeout=SECONDS) == ["a", "b", "c"]
        engine.bad = "b"
        engine.may_finish.put("")
    assert [future.result(SECONDS).text for future in (good, last)] == ["a", "c"]
    assert isinstance(bad.exception(SECONDS), ZeroDivisionError)
    later = submit(batcher, "d")
    assert engine.step("d") == ["d"]
    assert later.result(SECONDS).text == "d"


def test_batch_that_does_not_fit_in_memory_is_halved(start):
    engine = SteppedEngine(most=2)
    batcher = start(engine, batch_size=4)
    first = submit(batcher, "a")
    assert engine.steps.get(timeout=SECONDS) == ["a"]
    others = [submit(batcher, prompt) for prompt in "bcd"]
    engine.may_finish.put("")
    assert [future.result(SECONDS).text for future in (first, *others)] == list("abcd")
    wait_for(lambda: batcher.batch_size == 2, SECONDS)
