"""Draw the validation WER of runs over the minutes of training, as an SVG.

    python examples/sentences/curve.py RUN [RUN ...] --output curve.svg

RUN is a run's directory. It needs matplotlib: pip install 'asrllm[plot]'.
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    """Read the runs, and draw them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's directory")
    parser.add_argument("--output", type=Path, required=True, help="SVG file to write")
    arguments = parser.parse_args()
    curves = {run.name: curve(run) for run in arguments.runs}
    draw(curves, arguments.output)


def curve(run: Path) -> list[tuple[float, float]]:
    """Return the minutes of training, without validation, and the WER in % of each validation.

    A resumed run repeats the records after its checkpoint; the last ones count.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise SystemExit(f"{path} not found. Give the directory of a run.")
    seconds: dict[int, float] = {}  # of the steps up to each one that is logged
    rates: dict[int, float] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        step = record["step"]
        if "seconds_per_step" in record:
            before = max((logged for logged in seconds if logged < step), default=0)
            seconds[step] = record["seconds_per_step"] * (step - before)
        for name, value in record.items():
            if name.startswith("valid/") and name.endswith("/wer"):
                rates[step] = value
    if not rates:
        raise SystemExit(f"{path} has no validation WER. Set trainer.valid_decode above 0.")
    points: list[tuple[float, float]] = []
    for step, rate in sorted(rates.items()):
        passed = sum(value for logged, value in seconds.items() if logged <= step)
        points.append((passed / 60, rate))
    return points


def draw(curves: dict[str, list[tuple[float, float]]], output: Path) -> None:
    """Write the SVG.

    Args:
        curves: points (minutes, WER) by name.
        output: the file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        minutes, rates = zip(*points, strict=True)
        axes.plot(minutes, rates, marker="o", label=name)
    axes.set(xlabel="minutes of training", ylabel="validation WER, %", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
