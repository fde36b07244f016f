"""Log the content of report.html to W&B."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asrllm.evaluation.metric_names import EVALUATED_SAMPLES
from asrllm.evaluation.report import ReportSet, worst_first
from asrllm.evaluation.summary import Entry
from asrllm.training.run_config import WandbConfig
from asrllm.training.wandb_login import explained_wandb, print_sync_command

TABLE_COLUMNS = (
    "set",
    "key",
    "speaker",
    "duration",
    "reference",
    "hypothesis",
    "errors",
    "rate",
    "flags",
    "audio",
)


def log_to_wandb(config: WandbConfig, exp_dir: Path, sets: Sequence[ReportSet]) -> None:
    """Log the numbers of results.json, and a table of the utterances of all test sets.

    They are logged to a new run, because the steps of the training run must not change.

    Args:
        config: mode, project and name.
        exp_dir: the evaluated run.
        sets: the test sets.
    """
    if config.mode == "disabled":
        return
    import wandb

    # wandb uses another directory if this one does not exist
    (exp_dir / "wandb").mkdir(parents=True, exist_ok=True)
    with explained_wandb("wandb"):
        run = wandb.init(
            mode=config.mode,
            project=config.project,
            name=config.name or f"{exp_dir.name}-evaluate",
            group=exp_dir.name,
            job_type="evaluate",
            dir=str(exp_dir),
            config={
                "exp_dir": str(exp_dir),
                "sets": {test.name: settings(test.entry) for test in sets},
            },
            settings=wandb.Settings(silent=True, console="off"),
        )
    with tempfile.TemporaryDirectory() as folder, run:
        logged: dict[str, Any] = {}
        rows: list[list[Any]] = []
        for i, report_set in enumerate(sets):
            for key, value in numbers(report_set.entry).items():
                logged[f"{report_set.name}/{key}"] = value
            rows += table_rows(report_set, Path(folder) / str(i))
        # W&B shows only the first 10 000 rows
        rows.sort(key=lambda row: -row[TABLE_COLUMNS.index("errors")])
        logged[EVALUATED_SAMPLES] = wandb.Table(columns=list(TABLE_COLUMNS), data=rows)
        run.log(logged)
    print_sync_command(run)


def settings(entry: Entry) -> dict[str, str]:
    """Return the texts in an entry of results.json."""
    return {key: value for key, value in entry.items() if isinstance(value, str)}


def numbers(entry: Entry) -> dict[str, float]:
    """Return the numbers in an entry of results.json.

    Those of the baseline and the hallucination flags are included, and intervals as two numbers.
    """
    found: dict[str, float] = {}
    for key, value in entry.items():
        if isinstance(value, (int, float)):
            found[key] = value
        elif key.endswith("_ci95"):
            low, high = value
            found[key.replace("_ci95", "_low")] = low
            found[key.replace("_ci95", "_high")] = high
        elif key in ("baseline", "paired", "hallucinations"):
            for name, number in numbers(value).items():
                found[f"{key}/{name}"] = number
    return found


def table_rows(report_set: ReportSet, folder: Path) -> list[list[Any]]:
    """Return the rows of the table of utterances, worst first.

    Args:
        report_set: the test set.
        folder: where the audio is stored until it is logged.
    """
    import wandb

    folder.mkdir()
    scored = report_set.scored
    rows = []
    for i in worst_first(scored.main):
        transcript = scored.transcripts[i]
        audio = None
        if transcript.key in report_set.audio:
            path = folder / f"{i}.mp3"
            path.write_bytes(report_set.audio[transcript.key])
            audio = wandb.Audio(str(path), caption=transcript.key)
        row = [
            report_set.name,
            transcript.key,
            transcript.speaker,
            transcript.duration,
            transcript.raw_reference,
            transcript.raw_hypothesis,
            int(scored.main.total[i]),
            scored.main.select([i]).rate,
            " ".join(scored.flags[i]),
            audio,
        ]
        rows.append(row)
    return rows
