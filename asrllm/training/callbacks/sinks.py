"""Destinations of log records."""

import json
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from asrllm.escape import escape
from asrllm.progress import ProgressBar
from asrllm.training.callbacks.decoding import ValidationSample
from asrllm.training.callbacks.json_log import reopen_log
from asrllm.training.callbacks.metric_names import (
    METRICS,
    SAMPLES,
    describe_metric,
    full_name,
    wandb_name,
)
from asrllm.training.checkpoint.manifest import newest_checkpoint
from asrllm.training.run_config import WandbConfig
from asrllm.training.wandb_login import explained_wandb, print_sync_command

Record = dict[str, float | int | None]  # values of a step by metric
TABLE_HEADER = ["| key | reference | hypothesis | errors |", "| --- | --- | --- | --- |"]


class Sink:
    """Destination of log records on rank 0. Subclasses override the methods they need."""

    def write(self, record: Record) -> None:
        """Write the metrics of a step."""

    def write_samples(self, step: int, samples: Sequence[ValidationSample]) -> None:
        """Write the utterances that were decoded after a step."""

    def close(self) -> None:
        """Finish writing."""


class SamplesFile(Sink):
    """exp_dir/samples.jsonl: decoded utterances of the validation sets."""

    def __init__(self, exp_dir: Path, step: int) -> None:
        """Open the file and remove records after the step from which the run resumes."""
        self.file = reopen_log(exp_dir / "samples.jsonl", step)

    def write_samples(self, step: int, samples: Sequence[ValidationSample]) -> None:
        """Write one line per utterance."""
        for sample in samples:
            record = {"step": step, **vars(sample)}
            self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class MetricsFile(Sink):
    """exp_dir/metrics.jsonl: one line per record."""

    def __init__(self, exp_dir: Path, step: int) -> None:
        """Open the file and remove records after the step from which the run resumes."""
        self.file = reopen_log(exp_dir / "metrics.jsonl", step)

    def write(self, record: Record) -> None:
        """Write one line."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class ConsoleSink(Sink):
    """Progress of the training on standard error."""

    def __init__(self, total_steps: int, step: int) -> None:
        """Start the progress bar.

        Args:
            total_steps: number of steps of the whole run.
            step: optimizer steps done.
        """
        self.bar = ProgressBar("training", total_steps, done=step)
        self.step = step

    def write(self, record: Record) -> None:
        """Advance the bar for a training record, or print any other record."""
        if "loss" not in record:
            self._print_values(record)
            return
        loss = "no finite loss"
        if record["loss"] is not None:
            loss = f"loss {record['loss']:.3f}  acc {record['acc']:.3f}"
        note = f"{loss}  lr {record['lr']:.2e}  {record['seconds_per_step']:.2f} s/step"
        step = int(record["step"] or 0)
        self.bar.advance(step - self.step, note)
        self.step = step

    def _print_values(self, record: Record) -> None:
        """Print a record without a loss, for example of a validation."""
        values = []
        for name, value in record.items():
            if name != "step" and value is not None:
                values.append(f"{name} {value:.6g}")
        print(f"step {record['step']}: {', '.join(values)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop the bar."""
        self.bar.close()


class TensorBoardSink(Sink):
    """exp_dir/tensorboard."""

    def __init__(self, exp_dir: Path, step: int) -> None:
        """Open a file whose events replace those after the step from which the run resumes."""
        from torch.utils.tensorboard import SummaryWriter

        first_step = step + 1 if step else 0  # a new run logs step 0
        self.writer = SummaryWriter(str(exp_dir / "tensorboard"), purge_step=first_step)

    def write(self, record: Record) -> None:
        """Write the metrics as scalars."""
        for name, value in record.items():
            if value is not None and name != "step":
                self.writer.add_scalar(full_name(name), value, record["step"])
        self.writer.flush()

    def write_samples(self, step: int, samples: Sequence[ValidationSample]) -> None:
        """Write one table per validation set."""
        tables: dict[str, list[str]] = {}
        for sample in samples:
            cells = f"{sample.key} | {sample.reference} | {sample.hypothesis} | {sample.errors}"
            tables.setdefault(sample.corpus, [*TABLE_HEADER]).append(escape(f"| {cells} |"))
        for corpus, rows in tables.items():
            self.writer.add_text(f"samples/{corpus}", "\n".join(rows), step)
        self.writer.flush()

    def close(self) -> None:
        """Close the writer."""
        self.writer.close()


class WandbSink(Sink):
    """A Weights & Biases run, with its files below exp_dir/wandb."""

    def __init__(
        self, config: WandbConfig, exp_dir: Path, run_config: Mapping[str, object]
    ) -> None:
        """Start or resume the W&B run.

        Args:
            config: options of Weights & Biases.
            exp_dir: directory of the run.
            run_config: configuration that W&B shows with the run.
        """
        import wandb

        self.wandb = wandb
        self.exp_dir = exp_dir
        self.checkpoint = newest_checkpoint(exp_dir)
        # A parent's service outlives a killed run. It would report that the run's id is in use.
        os.environ.pop("WANDB_SERVICE", None)
        metrics = {name: describe_metric(name) for name in METRICS}
        with explained_wandb("trainer.wandb"):
            self.run = wandb.init(
                mode=config.mode,
                project=config.project,
                name=config.name or exp_dir.name,
                id=run_id(exp_dir / "wandb"),
                resume="allow",
                dir=str(exp_dir),
                config={**run_config, "metrics": metrics},
                settings=wandb.Settings(silent=True, console="off"),
            )
        for name in dict.fromkeys(map(wandb_name, METRICS)):
            self.run.define_metric(name, summary="last")

    def write(self, record: Record) -> None:
        """Log the metrics, and a new checkpoint if there is one."""
        self.run.log(full_values(record), step=record["step"])
        self._log_new_checkpoint()

    def write_samples(self, step: int, samples: Sequence[ValidationSample]) -> None:
        """Log a table of the decoded utterances."""
        columns = list(vars(samples[0]))
        rows = [list(vars(sample).values()) for sample in samples]
        table = self.wandb.Table(columns=columns, data=rows)
        self.run.log({SAMPLES: table}, step=step)

    def _log_new_checkpoint(self) -> None:
        """Log a new complete checkpoint as an artifact that refers to its path.

        The files are neither read nor uploaded.
        """
        checkpoint = newest_checkpoint(self.exp_dir)
        if checkpoint is None or checkpoint == self.checkpoint:
            return
        self.checkpoint = checkpoint
        tag = checkpoint.name
        artifact = self.wandb.Artifact(
            f"checkpoints-{self.run.id}", type="model", metadata={"tag": tag}
        )
        artifact.add_reference(f"file://{checkpoint.resolve()}", name=tag, checksum=False)
        self.run.log_artifact(artifact, aliases=["latest", tag])

    def close(self) -> None:
        """Log the last checkpoint and finish the W&B run."""
        self._log_new_checkpoint()
        self.run.finish()
        print_sync_command(self.run)


def full_values(record: Record) -> Record:
    """Return the known values of a record by their full names, without the step."""
    values: Record = {}
    for name, value in record.items():
        if value is not None and name != "step":
            values[full_name(name)] = value
    return values


def run_id(directory: Path) -> str:
    """Return the id of a tracker's run, which stays the same after a resume.

    Args:
        directory: the tracker's directory in exp_dir.
    """
    path = directory / "run-id"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
    return path.read_text()
