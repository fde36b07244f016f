"""Chat templates run in a process with bounded time and memory, whatever they are given."""

import copy
import errno
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest

from asrllm.collator import template_process
from asrllm.collator.chat import ChatRenderer
from asrllm.collator.template_process import TemplateLimitError, TemplateProcess
from asrllm.errors import UserError
from asrllm.testing import tiny_tokenizer
from tests.processes import wait_for

AUDIO = "<|AUDIO|>"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HUGE = "{{ 'x' * 10 ** 10 }}"
LONG = "{{ 'x' * 10 ** 6 }}"


class UnpicklableError(Exception):
    def __init__(self, one, two):
        super().__init__(one + two)


def process_id():
    return str(os.getpid())


@pytest.mark.slow  # a loop is stopped by the second
@pytest.mark.parametrize(
    ("fault", "named"),
    [(LOOP, r"loops .*1 s"), (HUGE, "1024 MiB"), (LONG, "200000")],
    ids=["loop", "huge", "long"],
)
def test_template_with_a_fault_for_one_word_only_is_stopped(fault, named, monkeypatch):
    monkeypatch.setattr(template_process, "RENDERING_SECONDS", 1)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AUDIO], special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}"
        f"{{% if 'three' in m.content %}}{fault}{{% endif %}}<|im_end|>{{% endfor %}}"
    )
    renderer = ChatRenderer(tokenizer, AUDIO)
    expected = renderer.encode_prompt(renderer.user_messages("one"), [1])
    with pytest.raises(UserError, match=named):
        renderer.encode_prompt(renderer.user_messages("one three"), [1])
    renderer._cache.clear()
    assert renderer.encode_prompt(renderer.user_messages("one"), [1]) == expected


def test_crash_of_the_process_is_reported_and_the_next_call_works():
    def crash(number):
        if number == 1:
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # pytest's would print the stacks
            os.kill(os.getpid(), signal.SIGSEGV)
        return str(number)

    process = TemplateProcess(crash)
    for _ in range(2):
        assert process(0) == "0"
        with pytest.raises(TemplateLimitError):
            process(1)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ValueError("a value"), ValueError),
        (UnpicklableError("a ", "value"), RuntimeError),
    ],
)
def test_errors_are_raised_again(error, raised):
    def fail():
        raise error

    process = TemplateProcess(fail)
    for _ in range(2):
        with pytest.raises(raised, match="a value"):
            process()


def test_process_is_used_again_and_ends_with_its_owner():
    process = TemplateProcess(process_id)
    child = int(process())
    assert int(process()) == child != os.getpid()
    del process
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_copies_have_processes_of_their_own():
    process = TemplateProcess(process_id)
    own = process()
    for other in (copy.deepcopy(process), pickle.loads(pickle.dumps(process))):
        assert other() != own
    assert process() == own


def test_process_starts_again_after_the_thread_that_started_it_has_ended():
    process = TemplateProcess(process_id)
    thread = threading.Thread(target=process)
    thread.start()
    thread.join()
    assert process() == process()


def test_a_fork_starts_its_own_process_and_leaves_that_of_its_parent():
    process = TemplateProcess(process_id)
    mine = process()
    context = get_context("fork")
    answers = context.Queue()

    def work():
        answers.put(process())
        process._process._stop()

    fork = context.Process(target=work)
    fork.start()
    assert answers.get(timeout=30) != mine
    fork.join(30)
    assert fork.exitcode == 0
    assert process() == mine


def test_a_fork_is_not_blocked_by_a_call_of_its_parent(tmp_path):
    begun = tmp_path / "begun"
    released = tmp_path / "released"

    def render(waits):
        begun.touch()
        while waits and not released.exists():
            time.sleep(0.01)
        return "text"

    process = TemplateProcess(render)
    thread = threading.Thread(target=process, args=(True,))
    thread.start()
    wait_for(begun.exists)
    fork = get_context("fork").Process(target=process, args=(False,))
    fork.start()
    fork.join(30)
    assert fork.exitcode == 0
    assert thread.is_alive()
    released.touch()
    thread.join()


def test_interrupted_call_does_not_answer_the_next_one():
    def render(text, seconds):
        time.sleep(seconds)
        return text

    process = TemplateProcess(render)
    assert process("first", 0) == "first"
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            process("interrupted", 30)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert process("next", 0) == "next"


def test_idle_process_ends_and_the_next_call_starts_another(monkeypatch):
    monkeypatch.setattr(template_process, "IDLE_SECONDS", 0.1)
    process = TemplateProcess(process_id)
    first = int(process())
    wait_for(lambda: psutil.Process(first).status() == psutil.STATUS_ZOMBIE)
    assert int(process()) != first


@pytest.mark.slow  # a loop is stopped by the second
def test_loop_is_not_tried_again(monkeypatch, tmp_path):
    monkeypatch.setattr(template_process, "RENDERING_SECONDS", 1)
    calls = tmp_path / "calls"

    def render(*, loops):
        with open(calls, "a") as file:
            file.write("x")
        while loops:
            pass
        return ""

    process = TemplateProcess(lambda loops: render(loops=loops))
    process(False)
    with pytest.raises(TemplateLimitError):
        process(True)
    assert calls.read_text() == "xx"


def test_process_ends_where_children_are_reaped_by_the_system():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        process = TemplateProcess(process_id)
        child = int(process())
        process._process._stop()
        assert not psutil.pid_exists(child)
        assert int(process()) != child
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_template_is_not_blamed_for_a_denied_process(monkeypatch):
    def fork():
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(template_process.os, "fork", fork)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AUDIO], special_tokens=True)
    tokenizer.chat_template = "{{ messages[0].content }}<|im_end|>"
    with pytest.raises(BlockingIOError):
        ChatRenderer(tokenizer, AUDIO)


def test_template_that_writes_half_a_character_is_named():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AUDIO], special_tokens=True)
    tokenizer.chat_template = r"{{ messages[0].content }}{{ '\ud800' }}<|im_end|>"
    with pytest.raises(UserError, match=r"chat template .* surrogates"):
        ChatRenderer(tokenizer, AUDIO)


def test_process_ends_with_a_parent_that_is_killed():
    code = (
        "import os, signal\n"
        "from tests.collator.test_template_process import TemplateProcess, process_id\n"
        "print(TemplateProcess(process_id)(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # the process holds the pipe too, so that its end is that of both
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL
    assert ended.stdout.strip().isdigit()
