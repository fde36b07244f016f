"""The benchmarks run: what they measure is not asserted."""

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, clean_environment


def run_benchmark(script, *arguments):
    command = [sys.executable, str(REPOSITORY / "benchmarks" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=REPOSITORY, env=clean_environment())
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_the_training_steps_benchmark_runs(tmp_path):
    run_benchmark("train_step.py", "--tiny", "--rounds", 1, "--output", tmp_path / "r.json")
    results = json.loads((tmp_path / "r.json").read_text())
    assert set(results["steps"]) > {"padded to 30 s, float32", "packed, float32", "packed, bf16"}
    for step in results["steps"].values():
        assert step["seconds"] > 0
        assert step["MFU"] > 0


@pytest.mark.slow
def test_the_saving_benchmark_runs(tmp_path):
    run_benchmark("saving.py", "--tiny", "--rounds", 1, "--steps", 13, "--every", 4, "--output", tmp_path / "r.json")
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["ratios to it"]["beside training"]["saves"] > 0


@pytest.mark.slow
def test_the_data_benchmark_runs(tmp_path):
    run_benchmark("data.py", "--utterances", 64, "--rounds", 1, "--rows", 6400, "--output", tmp_path / "r.json")
    results = json.loads((tmp_path / "r.json").read_text())
    assert "one worker to the bare loop" in results["reading"]["ratios"]
    assert results["index of 6400 rows of 20 bytes"]["milliseconds to plan a step"] > 0


@pytest.mark.slow
def test_the_checkpoint_tools_benchmark_runs(tmp_path):
    run_benchmark("checkpoints.py", "--tiny", "--rounds", 1, "--output", tmp_path / "r.json")
    results = json.loads((tmp_path / "r.json").read_text())
    assert min(results["peak MiB"].values()) > 0
    assert results["ratios"]["consolidate to deepspeed, peak"] > 0


@pytest.mark.slow
def test_the_decoding_benchmark_runs(tmp_path):
    run_benchmark("decode.py", "--tiny", "--rounds", 1, "--output", tmp_path / "r.json")
    results = json.loads((tmp_path / "r.json").read_text())
    assert set(results["texts that differ"].values()) == {0}
    assert results["speed to one by one"] > 0
