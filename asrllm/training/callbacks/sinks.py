"""Where log records go."""

import json
import os
import re
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asrllm.escape import escape
from asrllm.progress import ProgressBar
from asrllm.training.callbacks.decoding import ValidationSample
from asrllm.training.callbacks.json_log import reopen_log
from asrllm.training.callbacks.metric_names import METRICS, describe
from asrllm.training.run_config import WandbConfig
from asrllm.training.wandb_login import explained_wandb

Record = dict[str, Any]


class Sink:
    """Where log records go, on rank 0; a sink defines what it takes."""

    def write(self, record: Record) -> None:
        """Numbers of a step."""

    def write_samples(self, step: int, samples: Sequence[ValidationSample]) -> None:
        """What was decoded after a step."""

    def close(self) -> None:
        """Nothing more comes."""


class SamplesFile(Sink):
    """exp_dir/samples.jsonl"""

    def __init__(self, exp_dir: Path, step: int) -> None:
        self.file = reopen_log(exp_dir / "samples.jsonl", step)

    def write_samples(self, step: int, samples: Sequence[ValidationSample]) -> None:
        self.file.writelines(
            json.dumps({"step": step, **vars(sample)}, ensure_ascii=False) + "\n"
            for sample in samples
        )
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class MetricsFile(Sink):
    """exp_dir/metrics.jsonl"""

    def __init__(self, exp_dir: Path, step: int) -> None:
        self.file = reopen_log(exp_dir / "metrics.jsonl", step)

    def write(self, record: Record) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class ConsoleSink(Sink):
    def __init__(self, total_steps: int, step: int) -> None:
        self.bar = ProgressBar("training", total_steps, done=step)
        self.step = step

    def write(self, record: Record) -> None:
        if "loss" not in record:
            values = ", ".join(
                f"{k} {v:.6g}" for k, v in record.items() if k != "step" and v is not None
            )
            print(f"step {record['step']}: {values}", file=sys.stderr, flush=True)
            return
        loss = (
            "no finite loss"
            if record["loss"] is None
            else f"loss {record['loss']:.3f}  acc {record['acc']:.3f}"
        )
        note = f"{loss}  lr {record['lr']:.2e}  {record['seconds_per_step']:.2f} s/step"
        self.bar.advance(record["step"] - self.step, note)
        self.step = record["step"]

    def close(self) -> None:
        self.bar.close()


class TensorBoardSink(Sink):
    def __init__(self, exp_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(exp_dir / "tensorboard"))

    def write(self, record: Record) -> None:
        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "step":
                self.writer.add_scalar(full_name(name), value, record["step"])
        self.writer.flush()

    def write_samples(self, step: int, samples: Sequence[ValidationSample]) -> None:
        for corpus in dict.fromkeys(sample.corpus for sample in samples):
            shown = [s for s in samples if s.corpus == corpus]
            rows = [
                escape(f"| {s.key} | {s.reference} | {s.hypothesis} | {s.errors} |") for s in shown
            ]
            table = "\n".join(
                ["| key | reference | hypothesis | errors |", "| --- | --- | --- | --- |", *rows]
            )
            self.writer.add_text(f"samples/{corpus}", table, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandbSink(Sink):
    """exp_dir/wandb. run_config: shown with the run."""

    def __init__(self, config: WandbConfig, exp_dir: Path, run_config: dict[str, Any]) -> None:
        import wandb

        self.wandb, self.exp_dir, self.checkpoint = wandb, exp_dir, newest_tag(exp_dir)
        os.environ.pop(
            "WANDB_SERVICE", None
        )  # a parent's service outlives a killed run, whose id it then calls in use
        with explained_wandb("trainer.wandb"):
            self.run = wandb.init(
                mode=config.mode,
                project=config.project,
                name=config.name or exp_dir.name,
                id=_run_id(exp_dir),
                resume="allow",
                dir=str(exp_dir),
                config=run_config | {"metrics": {name: describe(name) for name in METRICS}},
                settings=wandb.Settings(silent=True, console="off"),
            )
        for name in dict.fromkeys(map(wandb_name, METRICS)):
            self.run.define_metric(name, summary="last")

    def write(self, record: Record) -> None:
        self.run.log(
            {full_name(k): v for k, v in record.items() if v is not None}, step=record["step"]
        )
        self._look_for_checkpoint()

    def write_samples(self, step: int, samples: Sequence[ValidationSample]) -> None:
        rows = [list(vars(sample).values()) for sample in samples]
        self.run.log(
            {"valid/samples": self.wandb.Table(columns=list(vars(samples[0])), data=rows)},
            step=step,
        )

    def _look_for_checkpoint(self) -> None:
        """A new complete one becomes an artifact that says where it lies; nothing of it is read or sent."""
        tag = newest_tag(self.exp_dir)
        if tag is None or tag == self.checkpoint:
            return
        self.checkpoint = tag
        artifact = self.wandb.Artifact(
            f"checkpoints-{self.run.id}", type="model", metadata={"tag": tag}
        )
        artifact.add_reference(f"file://{(self.exp_dir / tag).resolve()}", name=tag, checksum=False)
        self.run.log_artifact(artifact, aliases=["latest", tag])

    def close(self) -> None:
        self._look_for_checkpoint()
        self.run.finish()


def newest_tag(exp_dir: Path) -> str | None:
    """Of the newest complete checkpoint."""
    latest = exp_dir / "latest"
    return latest.read_text().strip() if latest.is_file() else None


def full_name(name: str) -> str:
    """Without a group of its own it is training's."""
    return name if "/" in name else f"train/{name}"


def wandb_name(name: str) -> str:
    """Of METRICS; W&B takes a star for what varies."""
    return re.sub(r"{\w+}.*", "*", full_name(name))


def _run_id(exp_dir: Path) -> str:
    """One W&B run for one exp_dir, also after a resume."""
    path = exp_dir / "wandb" / "run-id"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
    return path.read_text()
