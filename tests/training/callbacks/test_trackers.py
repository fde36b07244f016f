"""Trackers of experiments, each read back with its own reader."""

import json
import logging
import sys
import threading
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from asrllm.errors import UserError
from asrllm.training.callbacks.decoding import ValidationSample
from asrllm.training.callbacks.json_log import last_steps, reopen_log
from asrllm.training.callbacks.sinks import Sink, TensorBoardSink
from asrllm.training.callbacks.trackers import Background, MlflowSink, NewRecords, TrackioSink
from asrllm.training.prepare import check_sinks
from asrllm.training.run_config import TrainerConfig, WandbConfig
from tests.conftest import assert_done, run_script
from tests.test_end_to_end import metrics

OPTIONS = WandbConfig(project="speech")
SAMPLE = ValidationSample(key="u1", corpus="dev", reference="a b", hypothesis="a", errors=1)
LAST_RECORD = {"step": 4, "loss": 0.5, "valid/dev/wer": 50.0}
VALUES = {"train/loss": {3: 1.5, 4: 0.5}, "valid/dev/wer": {4: 50.0}}


def log_all(sink: Sink) -> None:
    """Log what VALUES has, and SAMPLE."""
    sink.write({"step": 3, "loss": 1.5, "grad_norm": None})
    sink.write(LAST_RECORD)
    sink.write_samples(4, [SAMPLE])


@pytest.fixture
def trackio(monkeypatch):
    """Let the test import Trackio, which reads TRACKIO_DIR when it is imported."""
    pytest.importorskip("trackio")
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    forget_trackio(monkeypatch)
    return lambda: sys.modules["trackio"]


def forget_trackio(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)


def trackio_values(exp, project="speech"):
    """Return the values of the only Trackio run by name and step, and the tables by step."""
    storage = sys.modules["trackio"].sqlite_storage.SQLiteStorage
    (run,) = sys.modules["trackio"].Api().runs(project)
    values = {}
    tables = {}
    for row in storage.get_logs(project, run.name, run_id=run.id):
        step = row.pop("step")
        del row["timestamp"]
        for name, value in row.items():
            steps = tables if name == "valid/samples" else values.setdefault(name, {})
            assert step not in steps, f"{name} has step {step} twice"
            steps[step] = value["_value"] if name == "valid/samples" else value
    return values, tables


@pytest.fixture
def mlflow(monkeypatch):
    """Return MLflow, without settings of the machine."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return pytest.importorskip("mlflow")


def mlflow_run(mlflow, uri, experiment="speech"):
    """Return a client and the only run of an experiment."""
    client = mlflow.MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    (run,) = client.search_runs([found.experiment_id])
    return client, run


def mlflow_values(client, run):
    """Return the values of a run by name and step."""
    values = {}
    for name in run.data.metrics:
        history = client.get_metric_history(run.info.run_id, name)
        values[name] = {point.step: point.value for point in history}
        assert len(values[name]) == len(history), f"{name} has a step twice"
    return values


def scalars(exp):
    """Return the steps of each scalar in exp_dir/tensorboard."""
    events = EventAccumulator(str(exp / "tensorboard"))
    events.Reload()
    return {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("name", ["trackio", "mlflow"])
def test_missing_package_of_a_sink_is_reported(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"pip install 'asrllm\[{name}\]'"):
        check_sinks(["wandb", "tensorboard", name])
    check_sinks(["wandb", "tensorboard"])


def test_wandb_mode_without_the_sink_is_rejected():
    with pytest.raises(UserError, match=r"trainer\.wandb\.mode=online .*trainer\.sinks"):
        TrainerConfig(sinks=["tensorboard"], wandb=WandbConfig(mode="online"))
    assert TrainerConfig(sinks=["tensorboard"]).wandb.mode == "disabled"


def test_last_steps_are_those_of_each_name(tmp_path):
    log = tmp_path / "metrics.jsonl"
    assert last_steps(log) == {}
    log.write_text('{"step": 2, "loss": 1}\n{"step": 4, "valid/a": 1}\ndamaged\n{"step": 6, "lo')
    assert last_steps(log) == {"step": 4, "loss": 2, "valid/a": 4}


def test_last_steps_stay_when_a_resume_removes_lines(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 2, "loss": 1}\n{"step": 9, "loss": 1}\n')
    assert last_steps(log)["loss"] == 9
    reopen_log(log, 4).close()
    assert last_steps(log)["loss"] == 9


@pytest.mark.parametrize("damage", [b'{"loss": 9, "st', b"\xff", b"[9]", b'{"loss": "9"}'])
def test_damaged_file_of_last_steps_is_reported_and_made_again(tmp_path, caplog, damage):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 2, "loss": 1}\n')
    (tmp_path / "metrics.steps.json").write_bytes(damage)
    assert last_steps(log) == {"step": 2, "loss": 2}
    assert "metrics.steps.json" in caplog.text
    caplog.clear()
    assert last_steps(log) == {"step": 2, "loss": 2}
    assert not caplog.text


def test_resumed_tensorboard_log_has_every_step_once(tmp_path):
    for first, last in ((0, 4), (2, 6)):
        sink = TensorBoardSink(tmp_path, first)
        for step in range(first + 1, last + 1):
            sink.write({"step": step, "loss": 1.0})
        sink.close()
    assert scalars(tmp_path) == {"train/loss": [1, 2, 3, 4, 5, 6]}


class Recorder(Sink):
    def __init__(self):
        self.calls = []

    def write(self, record):
        if record["step"] in (2, 3):
            raise ConnectionError("no network")
        self.calls.append(record)

    def write_samples(self, step, samples):
        self.calls.append((step, samples))

    def close(self):
        self.calls.append("closed")


def test_only_new_values_are_passed_on():
    recorder = Recorder()
    sink = NewRecords(recorder, {"loss": 8, "valid/dev/loss": 4}, sampled=4)
    sink.write({"step": 6, "loss": 1.0, "lr": None})
    sink.write({"step": 8, "valid/dev/loss": 2.0})
    sink.write({"step": 9, "loss": 3.0})
    for step in (4, 8):
        sink.write_samples(step, [SAMPLE])
    sink.close()
    assert recorder.calls == [
        {"step": 8, "valid/dev/loss": 2.0},
        {"step": 9, "loss": 3.0},
        (8, [SAMPLE]),
        "closed",
    ]


def test_errors_of_a_tracker_are_warnings_and_later_records_are_logged(caplog):
    recorder = Recorder()
    sink = Background("Tracker", recorder)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 5):
            sink.write({"step": step})
        sink.write_samples(4, [SAMPLE])
        sink.close()
    assert recorder.calls == [{"step": 1}, {"step": 4}, (4, [SAMPLE]), "closed"]
    first, last = [record.getMessage() for record in caplog.records]
    assert "no network" in first
    assert "2 calls" in last


def test_tracker_that_does_not_answer_does_not_delay_training(caplog):
    answers = threading.Event()

    class Stuck(Sink):
        def write(self, record):
            answers.wait()

    sink = Background("Tracker", Stuck(), close_timeout=0.01)
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        for step in range(100):
            sink.write({"step": step})
        sink.close()
    assert time.monotonic() - start < 5
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    answers.set()
    sink.thread.join()


def test_mlflow_run_has_metrics_parameters_and_samples(mlflow, tmp_path):
    exp = tmp_path / "first"
    sink = MlflowSink(OPTIONS, exp, {"trainer": {"lr": 0.1, "betas": [0.9, 0.98]}, "seed": 1})
    log_all(sink)
    uri = (exp / "mlruns").as_uri()
    assert mlflow_run(mlflow, uri)[1].info.status == "RUNNING"
    sink.close()
    client, run = mlflow_run(mlflow, uri)
    assert run.info.run_name == "first"
    assert run.info.status == "FINISHED"
    assert mlflow_values(client, run) == VALUES
    assert run.data.params == {"trainer.lr": "0.1", "trainer.betas": "[0.9, 0.98]", "seed": "1"}
    (artifact,) = client.list_artifacts(run.info.run_id, "samples")
    table = json.loads(
        (
            exp / "mlruns" / run.info.experiment_id / run.info.run_id / "artifacts" / artifact.path
        ).read_text()
    )
    assert dict(zip(table["columns"], table["data"][0], strict=True)) == vars(SAMPLE)


def test_resumed_mlflow_run_is_the_same_run(mlflow, tmp_path, monkeypatch):
    uri = (tmp_path / "shared").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for seed in (1, 2):  # a parameter of a run cannot change
        sink = MlflowSink(OPTIONS, tmp_path / "exp", {"seed": seed})
        log_all(sink if seed == 1 else NewRecords(sink, {"loss": 3}, -1))
        sink.close()
    client, run = mlflow_run(mlflow, uri)
    assert run.data.params == {"seed": "1"}
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == [
        3,
        4,
        4,
    ]
    other = MlflowSink(OPTIONS, tmp_path / "other" / "exp", {})
    assert other.run != run.info.run_id


def test_lost_mlflow_storage_does_not_stop_the_training(mlflow, tmp_path, caplog):
    made = MlflowSink(OPTIONS, tmp_path, {})
    (folder,) = (tmp_path / "mlruns").glob(f"*/{made.run}")
    (folder / "metrics").rmdir()
    (folder / "metrics").touch()
    sink = Background("MLflow", made)
    with caplog.at_level(logging.WARNING):
        log_all(sink)
        sink.close()
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


def test_mlflow_server_that_cannot_be_reached_is_reported(mlflow, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"http://127.0.0.1:9 .*MLFLOW_TRACKING_URI"):
        MlflowSink(OPTIONS, tmp_path, {})


def test_experiment_may_appear_after_the_search_for_it(mlflow, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tmp_path.as_uri())
    first = MlflowSink(OPTIONS, tmp_path / "0", {})
    find = mlflow.MlflowClient.get_experiment_by_name
    answers = iter([None])
    monkeypatch.setattr(
        mlflow.MlflowClient,
        "get_experiment_by_name",
        lambda client, name: next(answers, find(client, name)),
    )
    second = MlflowSink(OPTIONS, tmp_path / "1", {})
    runs = [sink.client.get_run(sink.run).info for sink in (first, second)]
    assert runs[0].experiment_id == runs[1].experiment_id
    assert runs[0].run_id != runs[1].run_id


def test_metric_names_have_only_characters_of_mlflow(mlflow, tmp_path):
    sink = MlflowSink(OPTIONS, tmp_path, {})
    sink.write({"step": 1, "valid/dev (clean)+写/loss": 1.0})
    client, run = mlflow_run(mlflow, (tmp_path / "mlruns").as_uri())
    assert mlflow_values(client, run) == {"valid/dev _clean__写/loss": {1: 1.0}}


def test_trackio_run_has_metrics_configuration_and_samples(trackio, tmp_path, capsys):
    exp = tmp_path / "first"
    sink = TrackioSink(OPTIONS, exp, {"trainer": {"lr": 0.1}})
    log_all(sink)
    sink.close()
    assert (exp / "trackio" / "speech.db").is_file()
    values, tables = trackio_values(exp)
    assert values == VALUES
    assert tables == {4: [vars(SAMPLE)]}
    (run,) = trackio().Api().runs("speech")
    assert run.name.startswith("first-")
    assert run.config["trainer"] == {"lr": 0.1}
    assert capsys.readouterr().out == ""


def test_resumed_trackio_run_is_the_same_run(trackio, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", f"{tmp_path}/shared/")
    for logged in ({}, {"loss": 4, "valid/dev/wer": 3}):
        forget_trackio(monkeypatch)  # as in the next process
        sink = TrackioSink(OPTIONS, tmp_path / "exp", {})
        NewRecords(sink, logged, -1).write(LAST_RECORD if logged else {"step": 4, "loss": 0.5})
        sink.close()
    assert trackio_values(tmp_path)[0] == {"train/loss": {4: 0.5}, "valid/dev/wer": {4: 50.0}}
    other = TrackioSink(OPTIONS, tmp_path / "other" / "exp", {})
    other.close()
    assert other.run.id != sink.run.id


def test_project_that_trackio_rejects_is_reported(trackio, tmp_path):
    with pytest.raises(UserError, match=r"'registry-a' .*trainer\.wandb\.project"):
        TrackioSink(WandbConfig(project="registry-a"), tmp_path, {})


def test_lost_trackio_storage_does_not_stop_the_training(trackio, tmp_path):
    sink = TrackioSink(OPTIONS, tmp_path, {})
    (tmp_path / "trackio" / "speech.db").mkdir(parents=True)
    log_all(sink)
    with pytest.warns(UserWarning, match="flush metric logs"):
        sink.close()


def test_next_job_of_a_sweep_needs_a_common_trackio_directory(trackio, tmp_path, monkeypatch):
    TrackioSink(OPTIONS, tmp_path / "0", {}).close()
    with pytest.raises(UserError, match="TRACKIO_DIR"):
        TrackioSink(OPTIONS, tmp_path / "1", {})


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_all_sinks_have_every_step_once_after_a_resume(world, tmp_path, mlflow, trackio):
    """The first run was killed after step 4, where it has no checkpoint."""
    exp = tmp_path / "exp"
    settings = {
        "trainer__sinks": "[tensorboard,trackio,mlflow]",
        "trainer__save_every": 3,
        "trainer__valid_every": 4,
        "trainer__valid_decode": 2,
    }
    for steps in (4, 5):
        overrides = world.overrides(exp, trainer__num_steps=steps, **settings)
        assert_done(run_script("train", *overrides))
        for path in exp.glob("checkpoint-4/asrllm.json"):
            path.unlink()
    steps = [1, 2, 3, 4, 5]
    assert [record["step"] for record in metrics(exp) if "loss" in record] == steps
    assert scalars(exp)["train/loss"] == steps
    client, run = mlflow_run(mlflow, (exp / "mlruns").as_uri(), "asrllm")
    values = mlflow_values(client, run)
    assert [*values["train/loss"]] == steps
    assert [*values["valid/valid/wer"]] == [4, 5]
    assert [path.path for path in client.list_artifacts(run.info.run_id, "samples")] == [
        "samples/step-00000004.json",
        "samples/step-00000005.json",
    ]
    TrackioSink(OPTIONS, exp, {}).close()  # imports Trackio with this directory
    trackio_logged, tables = trackio_values(exp, "asrllm")
    assert [*trackio_logged["train/loss"]] == steps
    assert [*tables] == [4, 5]
