"""Progress bars and the lines about work that takes long."""

import sys
import threading
import warnings

import pytest

from asrllm.commands import dispatch
from asrllm.progress import ProgressBar, waiting
from tests.processes import assert_done, run_script, wait_for


def is_waiting_reported():
    """Return whether the thread that prints what takes long is running."""
    return "waiting" in [thread.name for thread in threading.enumerate()]


def test_waiting_reports_long_work_again_and_again_and_short_work_not_at_all(monkeypatch, capsys):
    monkeypatch.setattr("asrllm.progress.LINE_EVERY", 0.01)
    with waiting("loading a model", after=0.01):
        printed = []

        def is_printed_again_and_again():
            printed.append(capsys.readouterr().err)
            return "".join(printed).count("loading a model") >= 3

        wait_for(is_printed_again_and_again, 10)
    capsys.readouterr()
    with waiting("loading a model", after=60):
        assert is_waiting_reported()
    assert capsys.readouterr().err == ""
    assert not is_waiting_reported()


def test_other_ranks_do_not_report_what_they_wait_for(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with waiting("loading a model", after=0):
        assert not is_waiting_reported()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("total", [3, None])
@pytest.mark.parametrize("brief", [True, False])
def test_bar_is_shown_before_its_first_item_is_done(monkeypatch, capsys, total, brief):
    monkeypatch.setattr("asrllm.progress.FIRST_LINE", 0.01)
    with ProgressBar("indexing", total, done=1, brief=brief) as bar:
        bar.timer.join(10)
        assert capsys.readouterr().err.startswith("indexing: 1")


def test_brief_bar_prints_nothing_for_short_work(capsys):
    for brief in (True, False):
        with ProgressBar("validation", 2, brief=brief) as bar:
            bar.advance(2)
    assert capsys.readouterr().err.count("validation: 2/2") == 1


def test_bars_inside_a_bar_share_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with ProgressBar("training", 4) as outer:
        for _ in range(2):
            with ProgressBar("validation", 2, brief=True) as inner:
                inner.advance(2)
                assert inner.bar is outer.bar
            outer.advance()
        assert [task.description for task in outer.bar.tasks] == ["training"]
    with ProgressBar("writing", 1) as later:
        assert later.bar is not None


@pytest.mark.filterwarnings("default")
def test_only_known_deprecations_are_silent(capsys):
    with warnings.catch_warnings(record=True) as shown:
        dispatch.set_up_logging()
        for module in ("torch.distributed.c10d_logger", "elsewhere"):
            for message in ("`torch.distributed.new` is deprecated", "something else"):
                warnings.warn_explicit(message, FutureWarning, "file.py", 1, module=module)
    assert len(shown) == 3


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_run_names_its_checkpoint_and_prints_no_warnings_of_libraries(world, tmp_path):
    for steps in (4, 6):
        overrides = world.overrides(
            tmp_path / "exp",
            trainer__num_steps=steps,
            trainer__precision="fp32",
            trainer__gradient_checkpointing="true",
            trainer__valid_decode=32,
            trainer__deepspeed_config="ds_configs/zero3.json",
        )
        done = run_script("train", *overrides, launcher="ranks")
        assert_done(done)
        assert "Warning" not in done.stderr
        assert ("checkpoint-4" in done.stderr) == (steps == 6)
