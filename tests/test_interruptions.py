"""Runs that are interrupted, hang, or have losses that are not finite, in real processes."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import torch

from asrllm.checkpoints.consolidate import checkpoint_weights
from tests.conftest import REPOSITORY, World, assert_done, free_port, made_once, run_script
from tests.jobs import CLEAN, GONE, job, kill_and_wait
from tests.processes import both_cores, clean_environment, descendants, started, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]
TRAIN = REPOSITORY / "launch" / "train.py"
MISBEHAVE = REPOSITORY / "tests" / "misbehave.py"
STEPS = 24


def records(exp: Path) -> list[dict]:
    path = exp / "metrics.jsonl"
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):  # else it is being written
            record = json.loads(line)
            if "loss" in record:
                found.append(record)
    return found


def losses(exp: Path) -> list[float]:
    return [record["loss"] for record in records(exp)]


def train_command(*overrides: object, script: Path = TRAIN, how: dict | None = None) -> list[str]:
    return [str(script), *([json.dumps(how)] if how else []), *map(str, overrides)]


def run_both(logs: Path, command: list[str]) -> None:
    with started(logs, command, command) as ranks:
        assert [process.wait(90) for process in ranks] == [0, 0], (logs / "1").read_text()[-3000:]


@pytest.fixture(scope="module")
def settings() -> dict[str, object]:
    return {
        "trainer__num_steps": STEPS,
        "trainer__save_every": 1000,
        "data__valid_data_config": "null",
        "model__llm__lora__lora_dropout": 0.1,
        "data__trace": "true",
    }


@pytest.fixture(scope="module")
def whole(world: World, settings, tmp_path_factory) -> Path:
    """The directory of an uninterrupted run. Tests only read it."""

    def train(folder: Path) -> None:
        overrides = world.overrides(folder / "exp", **settings)
        assert_done(run_script("train", *overrides, launcher="ranks"))
        assert len(losses(folder / "exp")) == STEPS

    return made_once(tmp_path_factory, "uninterrupted", train) / "exp"


def assert_resumes(world: World, exp: Path, settings: dict, whole: Path) -> None:
    """Check that an interrupted run saved its last step, and that the next run completes it.

    Args:
        world: data and models.
        exp: directory of the interrupted run.
        settings: settings of the run.
        whole: directory of the uninterrupted run, which must have the same losses and weights.
    """
    done = len(losses(exp))
    assert 3 <= done < STEPS
    assert (exp / "latest").read_text() == f"checkpoint-{done}"
    assert json.loads((exp / f"checkpoint-{done}" / "asrllm.json").read_text())["step"] == done
    assert not (exp / ".incomplete").exists()
    assert not (exp / "pretrained.pt").exists()
    assert_done(run_script("train", *world.overrides(exp, **settings), launcher="ranks"))
    assert losses(exp) == losses(whole)
    for name in ("keys-rank0.jsonl", "keys-rank1.jsonl"):
        assert (exp / name).read_text() == (whole / name).read_text()
    found = torch.load(exp / "pretrained.pt", weights_only=True)
    expected = torch.load(whole / "pretrained.pt", weights_only=True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGUSR1, 1), (signal.SIGTERM, 0)])
def test_signal_to_one_rank_saves_on_all_and_the_next_run_resumes(
    world, settings, whole, tmp_path, number, rank
):
    exp = tmp_path / "exp"
    command = train_command(*world.overrides(exp, **settings))
    with started(tmp_path / "logs", command, command) as ranks:
        wait_for(lambda: len(losses(exp)) >= 3)
        workers = workers_of(ranks)
        start = time.monotonic()
        ranks[rank].send_signal(number)
        if number == signal.SIGTERM:  # DeepSpeed's launcher sends it to the workers too
            for worker in workers:
                worker.terminate()
        assert_succeeded(ranks, tmp_path / "logs")
        print(f"{time.monotonic() - start:.2f} s from the signal to the exit")
        assert len(workers) == 2
        wait_for(lambda: not any(worker.is_running() for worker in workers), 15)
    tag = f"checkpoint-{len(losses(exp))}"
    assert (tmp_path / "logs" / "0").read_text().count(tag) == 1
    assert tag not in (tmp_path / "logs" / "1").read_text()
    assert_resumes(world, exp, settings, whole)


def assert_succeeded(ranks: Sequence[subprocess.Popen], logs: Path) -> None:
    statuses = [process.wait(60) for process in ranks]
    assert statuses == [0] * len(ranks), (logs / "0").read_text()


@contextlib.contextmanager
def launched(log: Path, command: list[str]) -> Iterator[subprocess.Popen]:
    """Start a real launcher of two ranks. Neither it nor they outlive the block."""
    with both_cores(), open(log, "w") as file:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=clean_environment(),
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            for started_process in [*descendants(process.pid), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    started_process.kill()
            process.wait()


def ranks_below(process: subprocess.Popen) -> list[psutil.Process]:
    found = []
    for child in descendants(process.pid):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if "RANK" in child.environ() and "train.py" in " ".join(child.cmdline()):
                found.append(child)
    return found


@pytest.mark.longest(60, reason="starts a real launcher")
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_terminated_launcher_gives_the_ranks_time_to_save(
    world, settings, whole, tmp_path, launcher
):
    """torchrun's agent and DeepSpeed's node launcher forward SIGTERM. Their own status varies."""
    exp = tmp_path / "exp"
    start = {
        "torchrun": [
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            f"--master_port={free_port()}",
        ],
        "deepspeed": [
            "-m",
            "deepspeed.launcher.launch",
            f"--master_port={free_port()}",
            "--master_addr=127.0.0.1",
            "--world_info=eyJsb2NhbGhvc3QiOiBbMCwgMV19",  # {"localhost": [0, 1]}
        ],
    }[launcher]
    command = [sys.executable, *start, str(TRAIN), *world.overrides(exp, **settings)]
    with launched(tmp_path / "log", command) as process:
        wait_for(lambda: len(losses(exp)) >= 3)
        below = ranks_below(process)
        start_time = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        print(f"{time.monotonic() - start_time:.2f} s from the signal to the launcher's exit")
        wait_for(lambda: not any(child.is_running() for child in below), 15)
    assert f"checkpoint-{len(losses(exp))}" in (tmp_path / "log").read_text()
    assert_resumes(world, exp, settings, whole)


def test_signal_while_the_model_is_built_stops_the_run_without_incomplete_files(
    world, settings, tmp_path
):
    exp = tmp_path / "exp"
    command = train_command(
        *world.overrides(exp, **settings), script=MISBEHAVE, how={"what": "build"}
    )
    with started(tmp_path / "logs", command, command) as ranks:
        wait_for(lambda: all((exp / f"building-{rank}").exists() for rank in range(2)))
        ranks[1].send_signal(signal.SIGTERM)
        (exp / "go").touch()
        assert_succeeded(ranks, tmp_path / "logs")
    assert not list(exp.glob("checkpoint*"))
    assert not (exp / "latest").exists()
    assert losses(exp) == []


def test_other_ranks_end_when_one_stops_responding(world, settings, tmp_path):
    exp = tmp_path / "exp"
    changes = {"trainer__step_timeout": 5, "trainer__num_steps": 4000}
    command = train_command(*world.overrides(exp, **settings | changes))
    with started(tmp_path / "logs", command, command) as (rank0, rank1):
        wait_for(lambda: len(losses(exp)) >= 3)
        workers = descendants(rank0.pid)
        rank1.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        assert rank0.wait(20) == 75
        assert 3 < time.monotonic() - start < 10
        wait_for(lambda: not any(worker.is_running() for worker in workers), 5)
        rank1.kill()
    assert len(workers) == 1
    report = (exp / "hang-rank0.txt").read_text()
    assert re.search(r"rank 0: .* 5 s \(trainer\.step_timeout\) ", report)
    assert re.search(r"\butt\d{4}\b", report)
    assert "in fit" in report
    assert "(trainer.step_timeout)" in (tmp_path / "logs" / "0").read_text()
    pids = {str(process.pid) for process in (rank0, rank1, *workers)}
    assert all(pids.isdisjoint(name.split("_")) for name in os.listdir("/dev/shm"))


def test_killed_worker_is_reported_and_all_ranks_may_try_again(world, settings, tmp_path):
    exp = tmp_path / "exp"
    command = train_command(*world.overrides(exp, **settings | {"trainer__num_steps": 4000}))
    with started(tmp_path / "logs", command, command) as ranks:
        wait_for(lambda: len(losses(exp)) >= 3)
        workers = workers_of(ranks)
        descendants(ranks[0].pid)[0].kill()
        assert [rank.wait(30) for rank in ranks] == [75, 75]
        wait_for(lambda: not any(worker.is_running() for worker in workers), 5)
    logs = "".join((tmp_path / "logs" / str(rank)).read_text() for rank in range(2))
    assert "data.num_workers" in logs
    assert "Traceback" not in logs


def workers_of(ranks: Sequence[subprocess.Popen]) -> list[psutil.Process]:
    workers = []
    for process in ranks:
        workers += descendants(process.pid)
    return workers


def sockets_of(pid: int) -> set[str]:
    """Return the inodes of the sockets that a process has open."""
    links = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
    return {link for link in links if link.startswith("socket:")}


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_rank_ends_the_others_at_once_and_no_worker_remains(
    world, settings, tmp_path, victim
):
    exp = tmp_path / "exp"
    command = train_command(*world.overrides(exp, **settings | {"trainer__num_steps": 4000}))
    with started(tmp_path / "logs", command, command) as ranks:
        wait_for(lambda: len(losses(exp)) >= 3)
        workers = workers_of(ranks)
        assert len(workers) == 2
        assert sockets_of(ranks[0].pid)
        assert not any(sockets_of(worker.pid) for worker in workers)
        ranks[victim].kill()
        start = time.monotonic()
        assert ranks[1 - victim].wait(20) == 75
        assert time.monotonic() - start < 10
        wait_for(lambda: not any(worker.is_running() for worker in workers), 5)
    output = (tmp_path / "logs" / f"{1 - victim}").read_text()
    assert f"asrllm: rank {victim} " in output
    assert "Traceback" not in output


@pytest.mark.parametrize("victim", [0, 1])
def test_rank_killed_on_another_node_ends_the_others(world, settings, tmp_path, victim):
    exp = tmp_path / "exp"
    overrides = world.overrides(exp, **settings | {"trainer__num_steps": 4000})
    command = train_command(*overrides, script=MISBEHAVE, how={"what": "nodes"})
    with started(tmp_path / "logs", command, command) as ranks:
        wait_for(lambda: len(losses(exp)) >= 3)
        ranks[victim].kill()
        assert ranks[1 - victim].wait(10) == 75
    output = (tmp_path / "logs" / f"{1 - victim}").read_text()
    assert f"rank {victim} " in output
    assert "Traceback" not in output


def test_rank_killed_while_the_model_is_built_ends_the_others(world, settings, tmp_path):
    """The others are not in a collective then, so no error of it can end them."""
    exp = tmp_path / "exp"
    command = train_command(
        *world.overrides(exp, **settings), script=MISBEHAVE, how={"what": "build"}
    )
    with started(tmp_path / "logs", command, command) as ranks:
        wait_for(lambda: all((exp / f"building-{rank}").exists() for rank in range(2)))
        ranks[0].kill()
        assert ranks[1].wait(10) == 75
    assert "asrllm: rank 0 " in (tmp_path / "logs" / "1").read_text()


def test_error_of_all_ranks_is_printed_once(world, settings, tmp_path):
    command = train_command(*world.overrides(tmp_path / "exp", **settings | {"trainer__lrr": 1}))
    with started(tmp_path / "logs", *[command] * 3) as ranks:
        assert [process.wait(60) for process in ranks] == [2, 2, 2]
    output = "".join((tmp_path / "logs" / f"{rank}").read_text() for rank in range(3))
    assert output.count("asrllm train: ") == 1
    assert "'trainer.lrr'" in output


KILLS = [
    ("plain", "rank"),
    ("srun", "rank"),
    ("torchrun", "rank"),
    ("deepspeed", "rank"),
    ("torchrun", "launcher"),
    ("deepspeed", "launcher"),
]
# torchrun's logs and torch's cache, which successful runs leave behind as well
LEFT_BY_LAUNCHERS = ("torchelastic_", "torchinductor_")


@pytest.mark.soak(only=True)
@pytest.mark.timeout(7200)
def test_no_kill_leaves_a_process_or_a_file(world, settings, tmp_path):
    """Kill a rank or a real launcher at 100 random moments of training."""
    rng = random.Random(0)
    for number in range(100):
        launcher, what = KILLS[number % len(KILLS)]
        exp = tmp_path / f"{number}"
        more = {"trainer__num_steps": 100000, "data__num_workers": 2, "trainer__save_every": 20}
        arguments = world.overrides(exp / "exp", **settings | more)
        with job(launcher, exp / "logs", arguments, ranks=rng.choice([2, 2, 3])) as run:
            wait_for(lambda exp=exp: len(losses(exp / "exp")) >= 3, 150)
            time.sleep(rng.uniform(0, 2))  # the moment of the kill is random on purpose
            ranks = run.ranks()
            victim = rng.choice(ranks) if what == "rank" else psutil.Process(run.started[0].pid)
            seen = kill_and_wait(run, victim)
        files = [name for name in seen["files"] if not name.startswith(LEFT_BY_LAUNCHERS)]
        print(
            launcher,
            what,
            len(ranks),
            seen["seconds"],
            seen["statuses"],
            seen["processes"],
            files,
            flush=True,
        )
        assert seen["seconds"] < (GONE if what == "rank" else CLEAN), seen["output"][-3000:]
        assert not seen["processes"]
        assert not files
        shutil.rmtree(exp)


@pytest.mark.soak
@pytest.mark.timeout(14400)
def test_error_of_all_ranks_is_printed_once_under_torchrun(world, tmp_path, soak):
    """Start runs of 2 to 8 ranks that all find the same error, before or after the imports."""
    for number in range(200 if soak else 2):
        folder = tmp_path / f"{number}"
        ranks = 2 + number % 7
        error = {"trainer__lr": -1} if number % 10 == 9 else {"trainer__lrr": 1}
        arguments = world.overrides(folder / "exp", **error)
        with job("torchrun", folder, arguments, ranks=ranks) as run:
            wait_for(lambda run=run: None not in run.statuses(), 200)
            assert run.output().count("asrllm train: ") == 1, (ranks, run.output())
        print(number, "runs, each with one message", flush=True)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("stage", "precision", "what"),
    [
        (0, "fp32", "gradient"),
        (0, "bf16", "loss"),
        (1, "bf16", "gradient"),
        (2, "fp32", "loss"),
        (3, "bf16", "loss"),
    ],
)
def test_step_that_is_not_finite_is_skipped_by_all_ranks(
    world, settings, tmp_path, stage, precision, what
):
    """Steps 3 and 4 of 8 are not finite on the second rank.

    The steps after them equal those of a run that resumes after step 4.
    """
    exp = tmp_path / "exp"
    again = tmp_path / "again"
    changes = {
        "trainer__deepspeed_config": f"ds_configs/zero{stage}.json",
        "trainer__precision": precision,
        "trainer__num_steps": 8,
        "trainer__save_every": 2,
        "trainer__gradient_accumulation_steps": 2,
    }
    how = {"what": what, "steps": [3, 4], "ranks": [1]}
    run_both(
        tmp_path / "logs",
        train_command(*world.overrides(exp, **settings | changes), script=MISBEHAVE, how=how),
    )
    shutil.copytree(
        exp, again, ignore=shutil.ignore_patterns("checkpoint-6", "checkpoint-8", "pretrained.pt")
    )
    run_both(
        tmp_path / "logs",
        train_command(*world.overrides(again, **settings | changes), script=MISBEHAVE, how=how),
    )
    assert [record["skipped"] for record in records(exp)] == [0, 0, 1, 1, 0, 0, 0, 0]
    assert losses(exp) == losses(again)
    assert records(exp)[2]["grad_norm"] is None
    assert all(loss is not None and loss > 0 for loss in losses(exp))
    weights = [checkpoint_weights(exp / f"checkpoint-{step}").load() for step in (2, 4, 6)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[1][name], weights[2][name]) for name in weights[0])
    assert all(bool(tensor.isfinite().all()) for tensor in weights[2].values())


def test_too_many_skipped_steps_in_a_row_stop_the_run(world, settings, tmp_path):
    exp = tmp_path / "exp"
    changes = {"trainer__num_steps": 8, "trainer__max_nonfinite_steps": 2}
    how = {"what": "loss", "steps": [2, 4, 5, 6], "ranks": [0, 1]}
    command = train_command(*world.overrides(exp, **settings | changes), script=MISBEHAVE, how=how)
    with started(tmp_path / "logs", command, command) as ranks:
        assert [process.wait(90) for process in ranks] == [2, 2]
    output = "".join((tmp_path / "logs" / rank).read_text() for rank in "01")
    assert re.search(r"step 2 is skipped, .*loss .*rank 0: utt", output)
    # one of the ranks prints it
    error = r"loss .*trainer\.max_nonfinite_steps=2.* step 5, .* utt"
    assert len(re.findall(error, output)) == 1
    assert "Traceback" not in output
    assert losses(exp)[1] is None
    assert len(losses(exp)) == 5
