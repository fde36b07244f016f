"""Start-up time of the command line relative to `import torch`.

    python benchmarks/startup.py [--rounds R] [--output FILE]

Each command runs in its own process, in turn. The results are medians of wall seconds. The imports
of a training process are compared in processor seconds with `import torch, transformers,
deepspeed`, and with the same plus transformers' PreTrainedModel: `import transformers` alone is
lazy, and the base class of every model loads torch's distributed tensors and compiler."""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from asrllm.data.shards import write_shards
from asrllm.data.sources import read_kaldi
from asrllm.testing import kaldi_directory, tone_sentences

ASRLLM = [str(Path(sys.executable).with_name("asrllm"))]
PYTHON = [sys.executable, "-c"]
LIBRARIES = "import torch, transformers, deepspeed"


def commands(shards: Path) -> dict[str, list[str]]:
    """Return the commands to measure by name."""
    return {
        "python": [*PYTHON, "pass"],
        "import numpy": [*PYTHON, "import numpy"],
        "import torch": [*PYTHON, "import torch"],
        "asrllm --help": [*ASRLLM, "--help"],
        "asrllm --version": [*ASRLLM, "--version"],
        "asrllm train --help": [*ASRLLM, "train", "--help"],
        "asrllm shards make --help": [*ASRLLM, "shards", "make", "--help"],
        "asrllm shards stats": [*ASRLLM, "shards", "stats", str(shards)],
        "asrllm shards verify": [*ASRLLM, "shards", "verify", str(shards)],
        LIBRARIES: [*PYTHON, LIBRARIES],
        f"{LIBRARIES}; PreTrainedModel": [
            *PYTHON,
            f"{LIBRARIES}; from transformers import PreTrainedModel",
        ],
        "imports of asrllm train": [
            *PYTHON,
            "from asrllm.commands.dispatch import load_module; load_module('train')",
        ],
    }


def measure(command: list[str]) -> tuple[float, float]:
    """Return the wall seconds and the processor seconds of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Run the benchmark, and print and write its results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="runs of each command after a first one; default: %(default)s",
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        shards = Path(name) / "shards"
        write_shards(shards, read_kaldi(kaldi_directory(Path(name) / "kaldi", tone_sentences(100))))
        measured: dict[str, list[tuple[float, float]]] = {what: [] for what in commands(shards)}
        for round_ in range(arguments.rounds + 1):
            for what, command in commands(shards).items():
                figures = measure(command)
                if round_:  # the first one fills the page cache
                    measured[what].append(figures)
    wall = {what: statistics.median(w for w, _ in values) for what, values in measured.items()}
    processor = {what: statistics.median(p for _, p in values) for what, values in measured.items()}
    train = processor["imports of asrllm train"]
    results = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
        "wall seconds": {what: round(seconds, 3) for what, seconds in wall.items()},
        "processor seconds": {what: round(seconds, 3) for what, seconds in processor.items()},
        "processor ratio of a training process's imports": {
            what: round(train / processor[what], 3)
            for what in processor
            if what.startswith(LIBRARIES)
        },
        "wall ratio to import torch": {
            what: round(wall[what] / wall["import torch"], 3)
            for what in wall
            if what.startswith("asrllm")
        },
    }
    text = json.dumps(results, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
