"""The benchmarks run: what they measure is not asserted."""

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, clean_environment


@pytest.mark.slow
def test_the_data_benchmark_runs(tmp_path):
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "data.py"), "--utterances", "64", "--rounds", "1", "--rows", "6400"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "r.json")],
        capture_output=True,
        text=True,
        timeout=250,
        cwd=REPOSITORY,
        env=clean_environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "r.json").read_text())
    assert "one worker to the bare loop" in results["reading"]["ratios"]
    assert results["index of 6400 rows of 20 bytes"]["milliseconds to plan a step"] > 0
