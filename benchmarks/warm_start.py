"""Validation curves of training from a random projector and from one that is fitted first.

    python benchmarks/warm_start.py COMMAND_FILE [--rounds R] [--steps N] [--every K] \\
        [--output FILE]

COMMAND_FILE has the overrides of `asrllm train` of one run, one a line, with a validation set; see
the command that the quickstart prints. Each round trains with both initializations and one seed, in
one process. The ratio of steps is the first validation of the fitted run whose loss is at most the
last one of the random run, divided by all steps. Both runs have the same schedule."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
KINDS = ("random", "aligned")
MEASURES = ("loss", "acc", "wer")
Point = dict[str, float]  # step and the measures


def train(keys: Sequence[str], exp: Path, seed: int, kind: str, steps: int, every: int) -> None:
    """Train once in a process of its own."""
    command = [
        sys.executable,
        str(REPOSITORY / "launch" / "train.py"),
        *keys,
        f"exp_dir={exp}",
        f"seed={seed}",
        f"model.projector_init={kind}",
        f"trainer.num_steps={steps}",
        f"trainer.valid_every={every}",
        f"trainer.save_every={steps}",
    ]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")


def curve(exp: Path) -> list[Point]:
    """Return the validations of a run, each the mean over its validation sets."""
    points: list[Point] = []
    for line in (exp / "metrics.jsonl").read_text().splitlines():
        record: dict[str, Any] = json.loads(line)
        point: Point = {}
        for measure in MEASURES:
            values = [
                value
                for key, value in record.items()
                if key.startswith("valid/") and key.endswith(f"/{measure}")
            ]
            if values:
                point[measure] = round(statistics.mean(values), 4)
        if point:
            points.append({"step": record["step"]} | point)
    return points


def ratio_of_steps(random: Sequence[Point], aligned: Sequence[Point]) -> float | None:
    """Return which part of the steps the fitted run needs for the random run's last loss."""
    last = random[-1]
    for point in aligned:
        if point["loss"] <= last["loss"]:
            return point["step"] / last["step"]
    return None


def main() -> None:
    """Run the benchmark, and print and write its results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", type=Path, metavar="COMMAND_FILE")
    parser.add_argument("--rounds", type=int, default=3, help="seeds; default: %(default)s")
    parser.add_argument("--steps", type=int, default=100, help="default: %(default)s")
    parser.add_argument(
        "--every", type=int, default=20, help="steps between validations; default: %(default)s"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    keys = arguments.overrides.read_text().splitlines()
    curves: dict[str, list[list[Point]]] = {kind: [] for kind in KINDS}
    ratios: list[float | None] = []
    with tempfile.TemporaryDirectory() as name:
        for seed in range(1, arguments.rounds + 1):
            for kind in KINDS:
                exp = Path(name) / f"{kind}-{seed}"
                train(keys, exp, seed, kind, arguments.steps, arguments.every)
                curves[kind].append(curve(exp))
            ratios.append(ratio_of_steps(curves["random"][-1], curves["aligned"][-1]))
    results = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}",
        "overrides": keys,
        "ratios of steps to the random run's last loss, by seed": ratios,
        "curves": curves,
    }
    text = json.dumps(results, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
