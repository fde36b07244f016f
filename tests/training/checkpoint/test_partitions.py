"""Resuming with another number of processes changes no weight, moment or average."""

from pathlib import Path

import pytest
import torch

from asrllm.checkpoints.average import mean_between
from asrllm.checkpoints.consolidate import checkpoint_weights
from asrllm.data.plan import Position
from asrllm.training.checkpoint.manifest import read_manifest
from asrllm.training.checkpoint.zero_files import AVERAGE, MASTERS, ZeroFiles
from tests.training.small_engine import engine_of, start, train_step

PERIOD = 2  # of the running average
KINDS = [(stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16")]


def train_and_save(out: str, kinds: list, steps: int) -> None:
    """Train and save. This runs in every process."""
    from asrllm.training.running_average import RunningAverage

    for stage, precision in kinds:
        engine = engine_of(stage, precision)
        average = RunningAverage(engine, period=PERIOD)
        losses = []
        for step in range(steps):
            losses.append(train_step(engine, step))
            average.update(step + 1)
            if step + 1 == 4:
                save(engine, average, Path(out) / f"{stage}-{precision}", "checkpoint-4", losses)
        save(engine, average, Path(out) / f"{stage}-{precision}", f"checkpoint-{steps}", losses)


def load_and_save(source: str, out: str, kinds: list, steps: int) -> None:
    """Resume checkpoint-4 of any number of processes, save it again, and train on.

    This runs in every process.
    """
    from asrllm.training.checkpoint.partitions import load_from_other_ranks
    from asrllm.training.running_average import RunningAverage

    for stage, precision in kinds:
        engine = engine_of(stage, precision)
        checkpoint = Path(source) / f"{stage}-{precision}" / "checkpoint-4"
        manifest = read_manifest(checkpoint)
        load_from_other_ranks(engine, checkpoint, manifest)
        average = RunningAverage(engine, period=PERIOD)
        average.load(checkpoint, manifest)
        save(engine, average, Path(out) / f"{stage}-{precision}", "checkpoint-4", [])
        losses = []
        for step in range(4, steps):
            losses.append(train_step(engine, step))
            average.update(step + 1)
        save(engine, average, Path(out) / f"{stage}-{precision}", f"checkpoint-{steps}", losses)


def save(engine, average, exp_dir: Path, tag: str, losses: list[float]) -> None:
    from asrllm import distributed
    from asrllm.training.checkpoint.saver import CheckpointSaver, make_manifest

    saver = CheckpointSaver(exp_dir, background=True, keep=0)
    manifest = make_manifest(
        engine, {"losses": losses}, step=int(tag.split("-")[1]), position=Position(), averaged=True
    )
    saver.begin(engine, [tag], manifest, average.files())
    saver.finish()
    distributed.barrier()


def contents(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = ZeroFiles(checkpoint, read_manifest(checkpoint))
    keys = [MASTERS, AVERAGE, *files.state_keys()]
    assert {"exp_avg", "exp_avg_sq"} <= set(keys)
    steps = {f"step/{g}": files.shared_state(g)["step"] for g in range(2)}
    tensors = {}
    for name in files.locations:
        for key in keys:
            tensors[f"{name}/{key}"] = files.read(name, key)
    return tensors | steps


@pytest.mark.slow
@pytest.mark.soak
def test_weights_moments_and_averages_are_the_same_on_another_number_of_ranks(tmp_path, soak):
    kinds = KINDS if soak else [(1, "bf16"), (2, "fp32"), (3, "bf16")]
    module = "training.checkpoint.test_partitions"
    two = tmp_path / "two"
    start(f"{module}:train_and_save", 2, out=str(two), kinds=kinds, steps=6)
    for stage, precision in kinds:
        early = two / f"{stage}-{precision}" / "checkpoint-4"
        late = two / f"{stage}-{precision}" / "checkpoint-6"
        between = mean_between(early, late).load()
        since = mean_between(None, late).load()
        # the mean of the weights after steps 2 and 4
        average_of_two = checkpoint_weights(early, AVERAGE).load()
        for name, tensor in checkpoint_weights(late).load().items():
            torch.testing.assert_close(between[name], tensor)  # one update, after step 6
            average_of_three = (2 * average_of_two[name] + tensor) / 3
            torch.testing.assert_close(since[name], average_of_three.float())
    for source, ranks in (("two", 1), ("two", 4), ("on-1", 2)):
        out = tmp_path / f"on-{ranks}"
        folder = str(tmp_path / source)
        start(f"{module}:load_and_save", ranks, source=folder, out=str(out), kinds=kinds, steps=6)
        for stage, precision in kinds:
            kind = f"{stage}-{precision}"
            expected = contents(two / kind / "checkpoint-4")
            found = contents(out / kind / "checkpoint-4")
            assert expected.keys() == found.keys()
            for name, tensor in expected.items():
                assert torch.equal(found[name], tensor), (source, ranks, kind, name)
            resumed = read_manifest(out / kind / "checkpoint-6")["settings"]["losses"]
            uninterrupted = read_manifest(two / kind / "checkpoint-6")["settings"]["losses"]
            tolerance = 1e-5 if precision == "fp32" else 2e-2
            assert resumed == pytest.approx(uninterrupted[4:], rel=tolerance)
