"""Signals that interrupt a run, and the launch script for Slurm that requeues it."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from asrllm.errors import UserError
from asrllm.training.preemption import Preemption, check_signals
from tests.conftest import REPOSITORY


def test_signal_is_recorded_and_the_handlers_are_restored():
    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)
    with Preemption(["SIGUSR1", "SIGTERM"]) as preemption:
        preemption.defer_to_step_boundary()
        assert preemption.signal_name is None
        signal.raise_signal(signal.SIGUSR1)
        assert preemption.signal_name == "SIGUSR1"
        signal.raise_signal(signal.SIGTERM)  # launchers send signals repeatedly
        assert preemption.signal_name == "SIGTERM"
    assert (signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.slow
def test_signal_before_the_first_step_ends_the_process(capfd):
    with pytest.raises(SystemExit) as ended, Preemption(["SIGUSR1"]):
        signal.raise_signal(signal.SIGUSR1)
    assert ended.value.code == 0
    (line,) = capfd.readouterr().err.splitlines()
    assert "SIGUSR1" in line
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_signals_that_are_not_allowed_are_rejected():
    check_signals([])
    with pytest.raises(
        UserError,
        match=r"trainer\.preemption_signals='SIGINT' .* SIGTERM, SIGHUP, SIGUSR1, SIGUSR2",
    ):
        check_signals(["SIGTERM", "SIGINT"])


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """A directory with replacements of the commands that the script calls."""
    scripts = {"scontrol": f'echo "$@" > {tmp_path}/requeued', "srun": 'shift; exec "$@"'}
    ran = f'echo "$*" > {tmp_path}/run'
    finished = "if [ $FINISHED = True ]; then touch -d '+1 second' $EXP/pretrained.pt; fi"
    scripts["python"] = f"{ran}; touch $EXP/config.yaml; {finished}; exit $STATUS"
    (tmp_path / "exp").mkdir()
    for name, text in scripts.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("status", "finished", "requeued"),
    [(0, False, True), (0, True, False), (75, False, True), (2, False, False)],
)
def test_slurm_script_requeues_the_job_until_it_is_done(slurm, status, finished, requeued):
    exp = slurm / "exp"
    environment = {
        "EXP": str(exp),
        "FINISHED": str(finished),
        "STATUS": str(status),
        "PATH": f"{slurm}:{os.environ['PATH']}",
    }
    environment["SLURM_JOB_ID"] = "7"
    done = subprocess.run(
        ["bash", str(REPOSITORY / "launch" / "slurm_requeue.sh"), "seed=1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (done.returncode, done.stderr) == (status, "")
    assert (slurm / "run").read_text() == f"launch/train.py exp_dir={exp} seed=1\n"
    assert (slurm / "requeued").exists() == requeued
