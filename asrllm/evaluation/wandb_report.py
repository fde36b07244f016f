"""What report.html shows, as a run of W&B."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asrllm.evaluation.report import ReportSet, worst_first
from asrllm.training.run_config import WandbConfig
from asrllm.training.wandb_login import explained_wandb

COLUMNS = (
    "key",
    "speaker",
    "duration",
    "reference",
    "hypothesis",
    "errors",
    "rate",
    "signs",
    "audio",
)


def log_to_wandb(config: WandbConfig, exp_dir: Path, sets: Sequence[ReportSet]) -> None:
    """A run of its own, so that the training run's steps stay as they are: the numbers of results.json, and a table of each set."""
    if config.mode == "disabled":
        return
    import wandb

    (exp_dir / "wandb").mkdir(
        parents=True, exist_ok=True
    )  # otherwise wandb takes another directory
    with explained_wandb("wandb"):
        run = wandb.init(
            mode=config.mode,
            project=config.project,
            name=config.name or f"{exp_dir.name}-evaluate",
            group=exp_dir.name,
            job_type="evaluate",
            dir=str(exp_dir),
            config={"exp_dir": str(exp_dir), "sets": {s.name: settings(s.entry) for s in sets}},
            settings=wandb.Settings(silent=True, console="off"),
        )
    with tempfile.TemporaryDirectory() as folder, run:
        logged: dict[str, Any] = {}
        for number, s in enumerate(sets):
            logged |= {f"{s.name}/{key}": value for key, value in numbers(s.entry).items()}
            logged[f"{s.name}/table"] = wandb.Table(
                columns=list(COLUMNS), data=table_rows(s, Path(folder) / str(number))
            )
        run.log(logged)


def settings(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if isinstance(value, str)}


def numbers(entry: dict[str, Any]) -> dict[str, float]:
    """Of an entry of results.json, also of the baseline and the signs of hallucination in it; intervals by their ends."""
    found: dict[str, float] = {}
    for key, value in entry.items():
        if isinstance(value, (int, float)):
            found[key] = value
        elif key.endswith("_ci95"):
            found[key.replace("_ci95", "_low")], found[key.replace("_ci95", "_high")] = value
        elif key in ("baseline", "paired", "hallucinations"):
            found |= {f"{key}/{name}": number for name, number in numbers(value).items()}
    return found


def table_rows(of: ReportSet, folder: Path) -> list[list[Any]]:
    """Worst first, since W&B shows the first 10 000. folder: for the audio, until it is logged."""
    import wandb

    folder.mkdir()
    errors, rows = of.scored.main, []
    for i in worst_first(errors):
        t, audio = of.scored.transcripts[i], None
        if t.key in of.audio:
            path = folder / f"{i}.mp3"
            path.write_bytes(of.audio[t.key])
            audio = wandb.Audio(str(path), caption=t.key)
        rate = errors.of([i]).rate
        rows.append([t.key, t.speaker, t.duration, t.raw_reference, t.raw_hypothesis, int(errors.total[i]), rate,
                     " ".join(of.scored.signs[i]), audio])  # fmt: skip
    return rows
