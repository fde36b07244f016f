"""What happens beside the loop: logs, validation, checkpoints, the trace of keys."""

import contextlib
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch

from asrllm.collator.batch import PackedBatch
from asrllm.collator.loader import LoadedStep
from asrllm.errors import UserError
from asrllm.progress import ProgressBar
from asrllm.training import distributed
from asrllm.training.checkpoint import make_manifest, prune, save_checkpoint, write_whole
from asrllm.training.config import WandbConfig
from asrllm.training.trainer import MODEL_INPUTS, StepSums, Trainer, count

Record = dict[str, Any]
BAD_SHARE_OVER = 1000  # utterances that the share of unreadable ones is at least counted over


class Sink(Protocol):
    """Where log records go, on rank 0."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """Sums over ranks every `every` steps, made into one record for the sinks."""

    def __init__(self, sinks: Sequence[Sink], *, every: int, max_bad_share: float) -> None:
        self.sinks, self.every, self.max_bad_share = sinks, every, max_bad_share
        self.sums, self.since, self.steps = StepSums(), time.monotonic(), 0
        self.seen = self.bad = 0.0
        self.unreadable: list[str] = []  # by this rank

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        self.sums, self.steps = self.sums + sums, self.steps + 1
        for batch in loaded.micro_batches:
            for message in batch.bad:
                print(f"unreadable: {message}", file=sys.stderr, flush=True)
                self.unreadable.append(message)
        if trainer.step % self.every and not trainer.ending:
            return
        total, seconds = self.sums.over_ranks(trainer.device), time.monotonic() - self.since
        self.write(train_record(trainer, loaded.epoch, total, seconds, self.steps))
        self.sums, self.since, self.steps = StepSums(), time.monotonic(), 0
        self._check_bad(total, trainer.exp_dir)

    def write(self, record: Record) -> None:
        for sink in self.sinks:
            sink.write(record)

    @contextlib.contextmanager
    def beside_training(self) -> Iterator[None]:
        """The time spent inside the block is not training's."""
        began = time.monotonic()
        yield
        self.since += time.monotonic() - began

    def _check_bad(self, total: StepSums, exp_dir: Path) -> None:
        self.seen, self.bad = self.seen + total.utterances, self.bad + total.bad
        if self.bad <= self.max_bad_share * max(self.seen, BAD_SHARE_OVER):
            return
        everywhere = distributed.gather_objects(self.unreadable)
        lines = [line for rank in everywhere for line in rank]
        if distributed.rank() == 0:
            write_whole(exp_dir / "unreadable.txt", "".join(f"{line}\n" for line in lines))
        raise UserError(
            f"{self.bad:.0f} of {self.seen:.0f} utterances could not be read, more than data.max_bad_share={self.max_bad_share} allows: "
            f"{exp_dir / 'unreadable.txt'} lists them; the first: {lines[0]}"
        )

    def at_end(self, trainer: Trainer) -> None:
        for sink in self.sinks:
            sink.close()


def train_record(trainer: Trainer, epoch: int, total: StepSums, seconds: float, steps: int) -> Record:
    targets, ranks = total.targets, distributed.world_size()
    return {
        "step": trainer.step,
        "epoch": epoch,
        "loss": total.loss / targets if targets else None,  # no loss was finite
        "acc": total.correct / targets if targets else None,
        "lr": trainer.lr,
        "grad_norm": trainer.grad_norm,
        "utterances": int(total.utterances),
        "audio_seconds": round(total.audio_seconds, 3),
        "text_tokens": int(total.targets),
        "padding": round(1 - total.audio_seconds / max(total.read_seconds, 1e-9), 4),
        "bad": int(total.bad),
        "skipped": round(total.skipped / ranks),
        "tokens_per_second": round(total.tokens / seconds, 1),
        "audio_hours_per_hour": round(total.audio_seconds / seconds, 2),
        "data_wait": round(total.data_wait / ranks / seconds, 4),
        "seconds_per_step": round(seconds / steps, 4),
    }


def reopen_log(path: Path, step: int) -> TextIO:
    """A log of JSON lines to append to; what an interrupted run wrote past the step it is resumed from is taken out."""
    kept = []
    if step and path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_whole(path, "".join(line + "\n" for line in kept))
    return open(path, "a", encoding="utf-8")


class MetricsFile:
    """exp_dir/metrics.jsonl"""

    def __init__(self, exp_dir: Path, step: int) -> None:
        self.file = reopen_log(exp_dir / "metrics.jsonl", step)

    def write(self, record: Record) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class ConsoleSink:
    def __init__(self, total_steps: int, step: int) -> None:
        self.bar = ProgressBar("training", total_steps, done=step)
        self.step = step

    def write(self, record: Record) -> None:
        if "loss" not in record:
            values = ", ".join(f"{k} {v:.6g}" for k, v in record.items() if k != "step")
            print(f"step {record['step']}: {values}", file=sys.stderr, flush=True)
            return
        loss = "no finite loss" if record["loss"] is None else f"loss {record['loss']:.3f}  acc {record['acc']:.3f}"
        note = f"{loss}  lr {record['lr']:.2e}  {record['seconds_per_step']:.2f} s/step"
        self.bar.advance(record["step"] - self.step, note)
        self.step = record["step"]

    def close(self) -> None:
        self.bar.close()


class TensorBoardSink:
    def __init__(self, exp_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(exp_dir / "tensorboard"))

    def write(self, record: Record) -> None:
        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "step":
                self.writer.add_scalar(name if "/" in name else f"train/{name}", value, record["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandbSink:
    """exp_dir/wandb. run_config: shown with the run."""

    def __init__(self, config: WandbConfig, exp_dir: Path, run_config: dict[str, Any]) -> None:
        import wandb

        self.run = wandb.init(
            mode=config.mode,
            project=config.project,
            name=config.name or exp_dir.name,
            id=_run_id(exp_dir),
            resume="allow",
            dir=str(exp_dir),
            config=run_config,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def write(self, record: Record) -> None:
        self.run.log({k if "/" in k else f"train/{k}": v for k, v in record.items() if v is not None}, step=record["step"])

    def close(self) -> None:
        self.run.finish()


def _run_id(exp_dir: Path) -> str:
    """One W&B run for one exp_dir, also after a resume."""
    path = exp_dir / "wandb" / "run-id"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
    return path.read_text()


class Validation:
    """Loss and token accuracy of each validation set, every `every` steps and at the end; all ranks take part.

    A run that is asked to end leaves it out or breaks it off: its time is for saving.
    """

    def __init__(self, sets: dict[str, Callable[[], Iterator[PackedBatch]]], metrics: Metrics, *, every: int) -> None:
        self.sets, self.metrics, self.every = sets, metrics, every

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        if (trainer.step % self.every == 0 or trainer.last) and not trainer.preempted:
            with self.metrics.beside_training():
                record = self.run(trainer)
            if record is not None:
                self.metrics.write(record)

    def at_end(self, trainer: Trainer) -> None:
        """The last step has validated."""

    def run(self, trainer: Trainer) -> Record | None:
        """None: the run was asked to end."""
        trainer.engine.eval()
        try:
            return self._measure(trainer)
        finally:
            trainer.engine.train()

    @torch.no_grad()
    def _measure(self, trainer: Trainer) -> Record | None:
        record: Record = {"step": trainer.step}
        for name, batches in self.sets.items():
            sums = StepSums()
            for batch in batches():
                trainer.watchdog.beat(f"validating on {name}", batch.keys)
                if trainer.agree_to_end():
                    return None
                batch = batch.to(trainer.device)
                output = trainer.engine(**{key: getattr(batch, key) for key in MODEL_INPUTS})
                sums += count(batch, output.loss, output.correct)
            total = sums.over_ranks(trainer.device)
            record |= {f"valid/{name}/loss": total.loss / max(total.targets, 1), f"valid/{name}/acc": total.correct / max(total.targets, 1)}
        return record


class Checkpoints:
    """checkpoint-{step} every `every` steps and at the run's end; epoch-{n} after the n-th epoch."""

    def __init__(self, metrics: Metrics, settings: dict[str, Any], *, every: int, keep: int) -> None:
        self.metrics, self.settings, self.every, self.keep = metrics, settings, every, keep

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        if loaded.position.epoch != loaded.epoch:
            self.save(trainer, f"epoch-{loaded.position.epoch}")
        if trainer.step % self.every == 0 or trainer.ending:
            self.save(trainer, f"checkpoint-{trainer.step}")
            if distributed.rank() == 0:
                prune(trainer.exp_dir, self.keep)

    def save(self, trainer: Trainer, tag: str) -> None:
        trainer.watchdog.beat(f"saving {tag}")
        manifest = make_manifest(trainer.engine, self.settings, step=trainer.step, position=trainer.position)
        with self.metrics.beside_training():
            save_checkpoint(trainer.engine, trainer.exp_dir, tag, manifest)

    def at_end(self, trainer: Trainer) -> None:
        """The last step has saved."""


class Trace:
    """exp_dir/keys-rank{r}.jsonl: which utterances this rank trained on, step by step, and with which prompts."""

    def __init__(self, exp_dir: Path, step: int) -> None:
        self.file = reopen_log(exp_dir / f"keys-rank{distributed.rank()}.jsonl", step)

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        batches = loaded.micro_batches
        keys, prompts = ([value for batch in batches for value in getattr(batch, name)] for name in ("keys", "prompts"))
        self.file.write(json.dumps({"step": trainer.step, "keys": keys, "prompts": prompts}, ensure_ascii=False) + "\n")
        self.file.flush()

    def at_end(self, trainer: Trainer) -> None:
        self.file.close()
