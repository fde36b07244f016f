"""Trackio and MLflow as destinations of log records."""

import contextlib
import functools
import importlib
import logging
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from asrllm.distributed import flat_settings
from asrllm.errors import UserError
from asrllm.progress import waiting
from asrllm.text_files import first_words
from asrllm.training.callbacks.decoding import ValidationSample
from asrllm.training.callbacks.metric_names import SAMPLES, full_name
from asrllm.training.callbacks.sinks import Record, Sink, full_values, run_id
from asrllm.training.run_config import WandbConfig

logger = logging.getLogger(__name__)
CLOSE_TIMEOUT = 60  # seconds
RUN_TAG = "asrllm_run"  # by which a resumed run finds its MLflow run
MAX_PARAMS = 100  # in a request to MLflow
MAX_PARAM_LENGTH = 6000  # characters, of MLflow


class NewRecords(Sink):
    """A sink that passes on what a killed run has not logged yet.

    The run resumes from an earlier step, and trackers cannot delete the steps after it.
    """

    def __init__(self, sink: Sink, logged: Mapping[str, int], sampled: int) -> None:
        """Create the sink.

        Args:
            sink: receives the new values.
            logged: last step that was logged of each metric.
            sampled: last step of which decoded utterances were logged, or -1.
        """
        self.sink = sink
        self.logged = logged
        self.sampled = sampled

    def write(self, record: Record) -> None:
        """Write the values of a record that are new."""
        step = int(record["step"] or 0)
        values: Record = {}
        for name, value in record.items():
            if value is not None and name != "step" and step > self.logged.get(name, -1):
                values[name] = value
        if values:
            self.sink.write({"step": step, **values})

    def write_samples(self, step: int, samples: Sequence[ValidationSample]) -> None:
        """Write the utterances if the step is new."""
        if step > self.sampled:
            self.sink.write_samples(step, samples)

    def close(self) -> None:
        """Close the sink."""
        self.sink.close()


class Background(Sink):
    """A sink that calls another in a thread: errors and a slow network do not stop training."""

    def __init__(self, name: str, sink: Sink, close_timeout: float = CLOSE_TIMEOUT) -> None:
        """Start the thread.

        Args:
            name: the tracker's name in warnings.
            sink: the sink.
            close_timeout: seconds that `close` waits for what is not written yet.
        """
        self.name = name
        self.sink = sink
        self.close_timeout = close_timeout
        self.calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.failures = 0
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        """Call the sink, in order."""
        for call in iter(self.calls.get, None):
            try:
                call()
            except Exception as error:  # the storages of a tracker raise exceptions of any type
                self.failures += 1
                if self.failures == 1:
                    logger.warning(
                        "%s: values are not logged: %s. Training continues.",
                        self.name,
                        first_words(error),
                    )

    def write(self, record: Record) -> None:
        """Write a record later."""
        self.calls.put(functools.partial(self.sink.write, record))

    def write_samples(self, step: int, samples: Sequence[ValidationSample]) -> None:
        """Write decoded utterances later."""
        self.calls.put(functools.partial(self.sink.write_samples, step, samples))

    def close(self) -> None:
        """Wait until everything is written, but not longer than the time limit."""
        self.calls.put(self.sink.close)
        self.calls.put(None)
        self.thread.join(self.close_timeout)
        if self.thread.is_alive():
            logger.warning(
                "%s: the last values are not logged, because it does not answer. "
                "metrics.jsonl has all of them.",
                self.name,
            )
        elif self.failures:
            logger.warning(
                "%s: %d calls failed, so values are missing. metrics.jsonl has all of them.",
                self.name,
                self.failures,
            )


class TrackioSink(Sink):
    """A Trackio run in TRACKIO_DIR, or in exp_dir/trackio.

    Trackio writes in a thread of its own and turns errors of its storage into warnings.
    """

    def __init__(
        self, config: WandbConfig, exp_dir: Path, run_config: Mapping[str, object]
    ) -> None:
        """Start or resume the run.

        Args:
            config: project and name.
            exp_dir: directory of the run.
            run_config: configuration that Trackio shows with the run.
        """
        folder = exp_dir / "trackio"
        self.trackio = import_trackio(folder)
        # Trackio resumes a run by its name, and several exp_dirs may have the same one
        name = f"{config.name or exp_dir.name}-{run_id(folder)}"
        with explained_start("Trackio", "trainer.wandb.project"), redirected_output():
            self.run = self.trackio.init(
                project=config.project,
                name=name,
                config=dict(run_config),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def write(self, record: Record) -> None:
        """Log the metrics."""
        self.run.log(full_values(record), step=record["step"])

    def write_samples(self, step: int, samples: Sequence[ValidationSample]) -> None:
        """Log a table of the decoded utterances."""
        table = self.trackio.Table(**columns_and_rows(samples))
        self.run.log({SAMPLES: table}, step=step)

    def close(self) -> None:
        """Finish the run."""
        with redirected_output():
            self.trackio.finish()


def import_trackio(folder: Path) -> Any:
    """Import Trackio, which reads its directory from the environment at that time.

    Args:
        folder: Trackio's directory if TRACKIO_DIR is not set.

    Raises:
        UserError: an earlier job of --multirun chose another directory.
    """
    given = os.environ.get("TRACKIO_DIR")
    os.environ["TRACKIO_DIR"] = given or str(folder.resolve())
    try:
        used = importlib.import_module("trackio.utils").TRACKIO_DIR
        if Path(used) != Path(os.environ["TRACKIO_DIR"]):
            raise UserError(
                f"Trackio writes to {str(used)!r} in this process, because an earlier job of "
                "--multirun did. Set TRACKIO_DIR to a directory for all jobs."
            )
        return importlib.import_module("trackio")
    finally:
        if not given:
            del os.environ["TRACKIO_DIR"]


class MlflowSink(Sink):
    """An MLflow run at MLFLOW_TRACKING_URI, or in exp_dir/mlruns."""

    def __init__(
        self, config: WandbConfig, exp_dir: Path, run_config: Mapping[str, object]
    ) -> None:
        """Start or resume the run.

        Args:
            config: experiment and name of the run.
            exp_dir: directory of the run.
            run_config: configuration that MLflow shows as the run's parameters.

        Raises:
            UserError: MLflow could not start a run.
        """
        # MLflow wants a database for local files, which its small package cannot open
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        import mlflow

        self.mlflow = mlflow
        folder = exp_dir / "mlruns"
        uri = os.environ.get("MLFLOW_TRACKING_URI") or folder.resolve().as_uri()
        shown = re.sub("//[^/@]*@", "//", uri)  # without a user and a password
        tracker = f"MLflow at {shown}"
        with waiting(f"starting {tracker}"), explained_start(tracker, "MLFLOW_TRACKING_URI"):
            self.client = mlflow.MlflowClient(tracking_uri=uri)
            experiment = self._find_experiment(config.project)
            tag = run_id(folder)
            found = self.client.search_runs([experiment], f"tags.{RUN_TAG} = '{tag}'")
            if found:
                self.run = found[0].info.run_id
                self.client.update_run(self.run, status="RUNNING")
                return
            name = config.name or exp_dir.name
            run = self.client.create_run(experiment, tags={RUN_TAG: tag}, run_name=name)
            self.run = run.info.run_id
            self._log_params(run_config)

    def _find_experiment(self, name: str) -> str:
        """Return the id of an experiment, which is created if it is missing."""
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(self.client.create_experiment(name))
            except self.mlflow.MlflowException:  # another run may have created it just now
                experiment = self.client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        return str(experiment.experiment_id)

    def _log_params(self, run_config: Mapping[str, object]) -> None:
        """Log the configuration, which cannot change after a resume."""
        params = []
        for name, value in flat_settings(run_config).items():
            params.append(self.mlflow.entities.Param(name, str(value)[:MAX_PARAM_LENGTH]))
        for start in range(0, len(params), MAX_PARAMS):
            self.client.log_batch(self.run, params=params[start : start + MAX_PARAMS])

    def write(self, record: Record) -> None:
        """Log the metrics."""
        now = time.time_ns() // 1_000_000
        step = int(record["step"] or 0)
        metrics = []
        for name, value in record.items():
            if value is not None and name != "step":
                metric = self.mlflow.entities.Metric(mlflow_name(name), value, now, step)
                metrics.append(metric)
        self.client.log_batch(self.run, metrics=metrics)

    def write_samples(self, step: int, samples: Sequence[ValidationSample]) -> None:
        """Log the decoded utterances as an artifact, in the form of MLflow's tables."""
        path = f"samples/step-{step:08d}.json"
        self.client.log_dict(self.run, columns_and_rows(samples), path)

    def close(self) -> None:
        """Finish the run."""
        self.client.set_terminated(self.run)


@contextlib.contextmanager
def explained_start(tracker: str, setting: str) -> Iterator[None]:
    """Raise UserError if a tracker cannot start a run.

    Args:
        tracker: its name.
        setting: what may be wrong.
    """
    try:
        yield
    except Exception as error:  # trackers and their storages raise exceptions of any type
        raise UserError(
            f"trainer.sinks: {tracker} could not start a run: {first_words(error)}. "
            f"Check {setting}, or remove the tracker from trainer.sinks."
        ) from error


def redirected_output() -> contextlib.AbstractContextManager[object]:
    """Return a context in which Trackio prints to standard error."""
    return contextlib.redirect_stdout(sys.stderr)


def mlflow_name(name: str) -> str:
    """Return a metric's full name with the characters that MLflow allows."""
    return re.sub(r"[^\w./: -]", "_", full_name(name))


def columns_and_rows(samples: Sequence[ValidationSample]) -> dict[str, list[Any]]:
    """Return decoded utterances as the arguments `columns` and `data` of a table."""
    return {
        "columns": list(vars(samples[0])),
        "data": [list(vars(sample).values()) for sample in samples],
    }
