"""Train and save in two processes, kill both at random moments, and check what is left.

    python -m tests.training.checkpoint.kill_loop DIR KILLS SEED

The processes are forked from this one, which has everything imported. Prints what was seen as JSON.
"""

import json
import multiprocessing
import os
import random
import shutil
import sys
import time
import warnings
from pathlib import Path

import torch

from asrllm.data.plan import Position
from asrllm.training.checkpoint.manifest import newest_checkpoint, read_manifest
from asrllm.training.checkpoint.saver import CheckpointSaver, load_checkpoint, make_manifest
from asrllm.training.checkpoint.zero_files import ZeroFiles
from tests.conftest import free_port
from tests.training.small_engine import engine_of, train_step

RANKS, KEEP, WIDTH = 2, 2, 300


def live(exp_dir: Path, rank: int, port: int, ready, until: int) -> None:
    """One rank's life: go on from the newest checkpoint, save at every step."""
    warnings.simplefilter("ignore")
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(RANKS),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    from asrllm import distributed

    device = distributed.start()
    engine, step = engine_of(2, "fp32", width=WIDTH), 0
    if newest := newest_checkpoint(exp_dir):
        manifest = read_manifest(newest)
        load_checkpoint(engine, newest, manifest)
        step = manifest["step"]
    saver = CheckpointSaver(exp_dir, background=True, keep=KEEP)
    ready.set()
    while step < until:
        train_step(engine, step)
        step += 1
        saver.look(device)
        saver.begin(
            engine,
            [f"checkpoint-{step}"],
            make_manifest(engine, {}, step=step, position=Position(), averaged=False),
        )
    saver.finish()


def run_life(exp_dir: Path, seconds: float | None, until: int = 1 << 30) -> bool:
    """Both ranks, killed so long after they began to train; None: let them end. Whether they ended well or began in time."""
    fork, port = multiprocessing.get_context("fork"), free_port()
    ready = fork.Event()
    processes = [
        fork.Process(target=live, args=(exp_dir, rank, port, ready, until)) for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    began = ready.wait(60)
    if seconds is not None:
        time.sleep(seconds)  # the moment of the kill is random on purpose
        for process in processes:
            process.kill()
    for process in processes:
        process.join(60)
    return began and (seconds is not None or all(process.exitcode == 0 for process in processes))


def state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every weight and moment; raises where a file is not whole."""
    files = ZeroFiles(checkpoint, read_manifest(checkpoint))
    return {
        f"{name}/{key}": files.read(name, key).clone()
        for name in files.places
        for key in ("fp32", *files.state_keys())
    }


def main(folder: Path, kills: int, seed: int) -> dict:
    rng, exp, newest, lost, leftovers = random.Random(seed), folder / "exp", 0, 0, 0
    steps: list[int] = []
    for _ in range(kills):
        assert run_life(exp, rng.uniform(0, 0.6)), "the ranks did not begin"
        visible = sorted(exp.glob("checkpoint-*"))
        for checkpoint in visible:
            state(checkpoint)
        assert len(visible) <= KEEP + 1, visible
        at = max((read_manifest(path)["step"] for path in visible), default=0)
        lost += at < newest
        newest = at
        steps.append(at)
        leftovers += (exp / ".incomplete").exists()
    shutil.copytree(newest_checkpoint(exp), folder / "last")
    assert run_life(folder / "whole", None, until=newest), "the uninterrupted run failed"
    expected, found = state(folder / "whole" / f"checkpoint-{newest}"), state(folder / "last")
    same = expected.keys() == found.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in expected.items()
    )
    return {"steps": steps, "lost": lost, "killed_while_writing": leftovers, "same": same}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
