"""Signals are noted, handlers put back; the launch script for Slurm does what it says."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from asrllm.errors import UserError
from asrllm.training.preemption import Preemption, check_signals
from tests.conftest import REPOSITORY


def test_a_signal_is_noted_and_the_handlers_are_put_back():
    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)
    with Preemption(["SIGUSR1", "SIGTERM"]) as preemption:
        preemption.defer_to_step_boundary()
        assert preemption.asked is None
        signal.raise_signal(signal.SIGUSR1)
        assert preemption.asked == "SIGUSR1"
        signal.raise_signal(signal.SIGTERM)  # launchers repeat themselves
        assert preemption.asked == "SIGTERM"
    assert (signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)) == before


def test_before_the_ranks_meet_a_signal_ends_the_process(capfd):
    with pytest.raises(SystemExit) as ended, Preemption(["SIGUSR1"]):
        signal.raise_signal(signal.SIGUSR1)
    assert ended.value.code == 0
    assert (
        "SIGUSR1 before the training began: ended, nothing was to be saved"
        in capfd.readouterr().err
    )
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_other_signals_are_refused():
    check_signals([])
    with pytest.raises(
        UserError,
        match=r"trainer.preemption_signals: 'SIGINT' is none of SIGTERM, SIGHUP, SIGUSR1, SIGUSR2",
    ):
        check_signals(["SIGTERM", "SIGINT"])


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """A directory with a stand-in for each of Slurm's commands."""
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
def test_the_slurm_script_queues_the_job_again_until_it_is_done(slurm, status, finished, requeued):
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
