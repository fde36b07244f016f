"""Train and save in two processes, kill both at random moments, and check the checkpoints.

    python -m tests.training.checkpoint.kill_loop DIR KILLS SEED

The processes are forked from this one, which has imported everything. The output is JSON.
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

RANKS = 2
KEEP = 2  # checkpoints
WIDTH = 300  # of the model's layers


def live(exp_dir: Path, rank: int, port: int, ready, until: int) -> None:
    """Resume one rank from the newest checkpoint, and save at every step."""
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
    engine = engine_of(2, "fp32", width=WIDTH)
    step = 0
    newest = newest_checkpoint(exp_dir)
    if newest:
        manifest = read_manifest(newest)
        load_checkpoint(engine, newest, manifest)
        step = manifest["step"]
    saver = CheckpointSaver(exp_dir, background=True, keep=KEEP)
    ready.set()
    while step < until:
        train_step(engine, step)
        step += 1
        saver.publish_if_written(device)
        manifest = make_manifest(engine, {}, step=step, position=Position(), averaged=False)
        saver.begin(engine, [f"checkpoint-{step}"], manifest)
    saver.finish()


def run_life(exp_dir: Path, seconds: float | None, until: int = 1 << 30) -> bool:
    """Run both ranks.

    Args:
        exp_dir: directory of the run.
        seconds: kill the ranks after this time of training, or None to let them finish.
        until: number of steps.

    Returns:
        Whether the ranks started in time and, unless they were killed, finished without an error.
    """
    fork = multiprocessing.get_context("fork")
    port = free_port()
    ready = fork.Event()
    processes = [
        fork.Process(target=live, args=(exp_dir, rank, port, ready, until)) for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    started = ready.wait(60)
    if seconds is not None:
        time.sleep(seconds)  # the moment of the kill is random on purpose
        for process in processes:
            process.kill()
    for process in processes:
        process.join(60)
    if seconds is not None:
        return started
    return started and all(process.exitcode == 0 for process in processes)


def state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return every weight and moment. This raises if a file is not complete."""
    files = ZeroFiles(checkpoint, read_manifest(checkpoint))
    tensors = {}
    for name in files.locations:
        for key in ("fp32", *files.state_keys()):
            tensors[f"{name}/{key}"] = files.read(name, key).clone()
    return tensors


def main(folder: Path, kills: int, seed: int) -> dict:
    rng = random.Random(seed)
    exp = folder / "exp"
    newest = 0
    lost = 0
    leftovers = 0
    steps: list[int] = []
    for _ in range(kills):
        assert run_life(exp, rng.uniform(0, 0.6)), "the ranks did not start"
        visible = sorted(exp.glob("checkpoint-*"))
        for checkpoint in visible:
            state(checkpoint)
        assert len(visible) <= KEEP + 1, visible
        step = max((read_manifest(path)["step"] for path in visible), default=0)
        lost += step < newest
        newest = step
        steps.append(step)
        leftovers += (exp / ".incomplete").exists()
    shutil.copytree(newest_checkpoint(exp), folder / "last")
    assert run_life(folder / "whole", None, until=newest), "the uninterrupted run failed"
    expected = state(folder / "whole" / f"checkpoint-{newest}")
    found = state(folder / "last")
    same = expected.keys() == found.keys()
    same = same and all(torch.equal(found[name], expected[name]) for name in expected)
    return {"steps": steps, "lost": lost, "killed_while_writing": leftovers, "same": same}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
