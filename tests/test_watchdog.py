"""A process without progress ends, and its stacks are written to a file."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asrllm.errors import UserError
from asrllm.watchdog import EXIT_STATUS, Watchdog
from tests.conftest import clean_environment

HANG = """
import ctypes, multiprocessing, sys, threading
from pathlib import Path
from asrllm.watchdog import Watchdog

def stuck_here(how):
    if how == "lock":
        threading.Lock().acquire() and threading.Event().wait()
    elif how == "interpreter":
        ctypes.PyDLL(None).sleep(60)  # keeps the interpreter's lock

def read_for_ever():
    print("reading", flush=True)
    threading.Event().wait()

if __name__ == "__main__":
    reader = multiprocessing.get_context("fork").Process(target=read_for_ever, daemon=True)
    reader.start()
    print(reader.pid, flush=True)
    with Watchdog(1, Path(sys.argv[2]), rank=3) as watchdog:
        watchdog.beat("in step 5", ["utt1", "utt2"])
        stuck_here(sys.argv[1])
"""


def hang(how: str, exp: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", HANG, how, str(exp)],
        capture_output=True,
        text=True,
        timeout=40,
        env=clean_environment(),
    )


@pytest.mark.slow
def test_report_names_the_step_and_the_batch_and_no_worker_remains(tmp_path):
    # the worker's end of the pipe must be closed as well, or this would not return
    done = hang("lock", tmp_path)
    assert done.returncode == EXIT_STATUS == 75
    report = (tmp_path / "hang-rank3.txt").read_text()
    for text in (report, done.stderr):
        assert re.search(r"rank 3: .* 1 s \(trainer\.step_timeout\) .* step 5\n", text)
        assert "utt1 utt2\n" in text
        assert "in stuck_here" in text


@pytest.mark.slow
def test_process_that_hangs_with_the_interpreter_lock_ends_too(tmp_path):
    code = HANG.replace("reader.start()", "reader.pid")
    done = subprocess.run(
        [sys.executable, "-c", code, "interpreter", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=40,
        env=clean_environment(),
    )
    assert done.returncode == 1
    assert "in stuck_here" in done.stderr


@pytest.mark.slow
def test_run_with_progress_or_without_a_limit_is_not_ended(tmp_path):
    for timeout in (0, None, 1000):
        with Watchdog(timeout, tmp_path) as watchdog:
            watchdog.beat("in step 1", ["utt1"])
    assert not list(tmp_path.iterdir())
    with Watchdog(1, tmp_path) as watchdog:
        end = time.monotonic() + 2
        while time.monotonic() < end:  # longer than the limit, with progress
            watchdog.beat("in step 1")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_limits_that_are_too_small_are_rejected():
    from asrllm.training.run_config import TrainRun
    from tests.composing import load_config

    keys = [
        "exp_dir=x",
        "data.train_data_config=x",
        "model.audio_encoder.pretrained_model=x",
        "model.llm.pretrained_model=x",
    ]
    with pytest.raises(UserError, match=r"trainer\.step_timeout=-1 "):
        load_config("train", [*keys, "trainer.step_timeout=-1"], TrainRun)
    with pytest.raises(UserError, match=r"trainer\.max_nonfinite_steps=0 "):
        load_config("train", [*keys, "trainer.max_nonfinite_steps=0"], TrainRun)
