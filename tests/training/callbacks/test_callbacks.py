"""Callbacks: rank comparison, garbage collection, profiles, the console and the W&B run."""

import gc
import io
import json
import os
import re
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from asrllm.data.plan import Position
from asrllm.distributed import check_same
from asrllm.errors import UserError
from asrllm.progress import ProgressBar
from asrllm.training.callbacks.agreement import signature
from asrllm.training.callbacks.garbage import GarbageCollection
from asrllm.training.callbacks.metric_names import METRICS, wandb_name
from asrllm.training.callbacks.profiling import Profiler
from asrllm.training.callbacks.sinks import ConsoleSink
from tests.conftest import REPOSITORY, assert_done, run_script
from tests.processes import run_forked
from tests.test_end_to_end import metrics, wandb_records


def fake_step(*, targets: int = 3, keys: tuple[str, ...] = ("a",)) -> SimpleNamespace:
    batch = SimpleNamespace(
        waves=torch.zeros(1, 9), targets=torch.zeros(targets).long(), keys=[*keys]
    )
    return SimpleNamespace(micro_batches=[batch], next_position=Position(batch=1))


def test_ranks_that_differ_are_named_with_their_values():
    trainer = SimpleNamespace(step=4, engine=SimpleNamespace(module=torch.nn.Linear(1, 1)))
    usual = signature(trainer, fake_step())
    filler = signature(trainer, fake_step(targets=0, keys=()))
    check_same("before step 5", [usual, filler, usual])
    trainer.engine.module.eval()
    other = signature(trainer, fake_step())
    with pytest.raises(
        UserError, match=r"step 5 .*training mode: \w+ on rank 0, 2; \w+ on rank 1\."
    ):
        check_same("before step 5", [usual, other, usual])
    with pytest.raises(UserError, match=r"targets: \[\] on rank 0; \[0\] on rank 1"):
        check_same("before step 5", [usual, signature(trainer, fake_step(targets=0))])


def test_garbage_is_collected_at_the_configured_steps(monkeypatch):
    collected = []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(trainer.step))
    trainer = SimpleNamespace(step=0)
    assert gc.isenabled()
    callback = GarbageCollection(every=3)
    try:
        assert not gc.isenabled()
        for trainer.step in range(1, 8):
            callback.after_step(trainer, None, None)
    finally:
        callback.at_end(trainer)
    assert collected == [3, 6]
    assert gc.isenabled()


def test_profile_covers_the_configured_steps(tmp_path):
    callback = Profiler(tmp_path, 2, 3)
    for step in range(5):
        callback.before_step(SimpleNamespace(step=step), None)
        with torch.profiler.record_function(f"step {step + 1}"):
            torch.ones(2) @ torch.ones(2)
        callback.after_step(SimpleNamespace(step=step + 1, stopping=False), None, None)
    trace = json.loads((tmp_path / "profile" / "rank0.json").read_text())
    names = {event["name"] for event in trace["traceEvents"]}
    assert {f"step {n}" for n in range(6)} & names == {"step 2", "step 3"}
    assert "aten::dot" in (tmp_path / "profile" / "rank0.txt").read_text()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_console_shows_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch, stream):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream())
    output = sys.stderr
    sink = ConsoleSink(4, 0)
    assert (sink.bar.bar is not None) == (stream is Terminal)
    for step in (2, 4):
        sink.write({"step": step, "loss": 1.5, "acc": 0.5, "lr": 1e-4, "seconds_per_step": 0.1})
        sink.write({"step": step, "valid/dev/wer": None, "valid/dev/loss": 2.25})
    sink.close()
    assert "loss 1.500" in output.getvalue()
    assert "step 4: valid/dev/loss 2.25" in output.getvalue()
    assert ("\x1b" in output.getvalue()) == (stream is Terminal)


def test_bar_without_a_total_shows_the_count(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with ProgressBar("reading", None) as bar:
        bar.advance(3)
    assert "3/?" in sys.stderr.getvalue()


def test_wandb_patterns_have_a_star_for_the_variable_part():
    assert {wandb_name(name) for name in METRICS} >= {
        "train/loss",
        "loss/*",
        "valid/*",
        "dropped/*",
    }


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_rank_that_differs_stops_the_run_before_the_next_step(world, tmp_path):
    how = json.dumps({"what": "mode", "steps": [2], "ranks": [1]})
    overrides = world.overrides(
        tmp_path / "exp", trainer__check_ranks="true", data__valid_data_config="null"
    )
    done = run_forked([REPOSITORY / "tests" / "misbehave.py", how, *overrides], ranks=2)
    assert done.returncode != 0
    assert re.search("step 3 .*training mode: ", done.stderr)
    assert [record["step"] for record in metrics(tmp_path / "exp")] == [1, 2]


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_offline_wandb_run_has_samples_units_and_checkpoint_paths(world, tmp_path):
    exp = tmp_path / "exp"
    mark = uuid.uuid4().hex
    settings = {
        "trainer__wandb__mode": "offline",
        "trainer__valid_decode": 3,
        "trainer__profile_steps": "[2,3]",
    }
    assert_done(run_script("train", *world.overrides(exp, **settings), ASRLLM_TEST=mark))
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and mark in environment_of(pid)]
    (path,) = (exp / "wandb").rglob("run-*.wandb")
    logged = []
    config = {}
    artifacts = []
    for record in wandb_records(path):
        if record.HasField("history"):
            logged += [
                (*item.nested_key, json.loads(item.value_json)) for item in record.history.item
            ]
        if record.HasField("run"):
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.HasField("artifact"):
            artifacts.append(record.artifact)
    assert config["metrics"]["valid/{set}/wer"].startswith("% ")
    (table,) = [item[-1] for item in logged if item[:-1] == ("valid/samples", "path")]
    rows = json.loads((path.parent / "files" / table).read_text())
    samples = [json.loads(line) for line in (exp / "samples.jsonl").read_text().splitlines()]
    assert [dict(zip(rows["columns"], row, strict=True)) for row in rows["data"]] == [
        {k: s[k] for k in s if k != "step"} for s in samples
    ]
    assert len(samples) == 3
    by_tag = {
        json.loads(artifact.metadata)["tag"]: artifact.manifest.contents
        for artifact in artifacts
        if artifact.type == "model"
    }
    assert "checkpoint-8" in by_tag, "the last one is complete when the run has ended"
    for tag, contents in by_tag.items():
        assert f"file://{exp.resolve() / tag}/asrllm.json" in [entry.ref for entry in contents]
    assert json.loads((exp / "profile" / "rank0.json").read_text())["traceEvents"]


def environment_of(pid: str) -> str:
    try:
        return (Path("/proc") / pid / "environ").read_text(errors="replace")
    except OSError:  # it has ended, or belongs to another user
        return ""
