"""Checkpoints are complete or invisible, even if a process is killed while it writes them."""

import json
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from asrllm.checkpoints.average import mean_weights
from asrllm.checkpoints.consolidate import checkpoint_weights
from asrllm.data.plan import Position
from asrllm.training.checkpoint.manifest import list_checkpoints, newest_checkpoint, read_manifest
from asrllm.training.checkpoint.writer import CheckpointWriter, HostCopies
from asrllm.training.checkpoint.zero_files import ZeroFiles
from tests.processes import assert_done, both_cores, run_forked
from tests.training.small_engine import engine_of, start, train_step


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(500)
def test_kills_lose_no_checkpoint(tmp_path, soak):
    kills = 50 if soak else 6
    command = ["-m", "tests.training.checkpoint.kill_loop", tmp_path, kills, 7]
    with both_cores():
        done = assert_done(run_forked(command, timeout=480))
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["lost"] == 0
    assert seen["same"], "the killed run has other weights than the uninterrupted one"
    assert seen["steps"][-1] > kills / 5, "the run did not resume from its checkpoints"
    assert seen["killed_while_writing"] > kills / 5, "no kill was during the writing"


def save_until_full(out: str, megabytes: int) -> None:
    """Save with a limit of the file size on the second rank. This runs in every process."""
    from asrllm import distributed
    from asrllm.errors import UserError
    from asrllm.training.checkpoint.saver import CheckpointSaver, make_manifest

    engine = engine_of(2, "fp32")
    train_step(engine, 0)
    for background in (True, False):
        saver = CheckpointSaver(Path(out), background=background, keep=0)
        saver.begin(
            engine,
            ["checkpoint-1"],
            make_manifest(engine, {}, step=1, position=Position(), averaged=False),
        )
        saver.finish()
        if distributed.rank() == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes, resource.RLIM_INFINITY))
        try:
            saver.begin(
                engine,
                ["checkpoint-2"],
                make_manifest(engine, {}, step=2, position=Position(), averaged=False),
            )
            saver.finish()
        except UserError as error:
            print(f"rejected: {error}")
        else:
            print("saved")
        if distributed.rank() == 1:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )


@pytest.mark.slow
def test_write_error_of_one_rank_is_raised_on_all_and_earlier_checkpoints_remain(tmp_path):
    save = "training.checkpoint.test_saver:save_until_full"
    for process in start(save, 2, out=str(tmp_path), megabytes=2000):
        lines = process.output.splitlines()
        messages = [line for line in lines if line.startswith(("rejected", "saved"))]
        assert len(messages) == 2
        for message in messages:
            assert message.startswith("rejected: rank 1 ")
            assert "checkpoint-2" in message
            assert f"exp_dir={str(tmp_path)!r}" in message
            assert message.endswith("checkpoint-1.")
    assert list(list_checkpoints(tmp_path)) == [1]
    assert not (tmp_path / ".incomplete").exists()
    files = ZeroFiles(tmp_path / "checkpoint-1", read_manifest(tmp_path / "checkpoint-1"))
    assert files.read("scale").shape == (1,)


def save_both_ways(out: str) -> None:
    """Save at each stage with and without background writing. This runs in every process."""
    for stage in range(4):
        engine = engine_of(stage, "bf16")
        for step in range(3):
            train_step(engine, step)
        for background in (True, False):
            save(engine, Path(out) / f"{stage}-{background}", background=background)


def resume_both_ways(source: str, out: str) -> None:
    """Load each of these checkpoints and save it again. This runs in every process."""
    from asrllm import distributed
    from asrllm.training.checkpoint.partitions import load_from_other_ranks
    from asrllm.training.checkpoint.saver import load_checkpoint

    for stage in range(4):
        for background in (True, False):
            engine = engine_of(stage, "bf16")
            checkpoint = Path(source) / f"{stage}-{background}" / "checkpoint-3"
            manifest = read_manifest(checkpoint)
            if stage == 0 or manifest["world_size"] == distributed.world_size():
                load_checkpoint(engine, checkpoint, manifest)
            else:
                load_from_other_ranks(engine, checkpoint, manifest)
            save(engine, Path(out) / f"{stage}-{background}", background=background)


def save(engine, exp_dir: Path, *, background: bool) -> None:
    from asrllm import distributed
    from asrllm.training.checkpoint.saver import CheckpointSaver, make_manifest

    saver = CheckpointSaver(exp_dir, background=background, keep=0)
    saver.begin(
        engine,
        ["checkpoint-3"],
        make_manifest(engine, {}, step=3, position=Position(), averaged=False),
    )
    saver.finish()
    distributed.barrier()


def converted(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the weights that DeepSpeed's own converter reads."""
    return get_fp32_state_dict_from_zero_checkpoint(
        str(checkpoint.parent), checkpoint.name, exclude_frozen_parameters=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("writers", [2, 1])
def test_checkpoints_are_the_same_with_and_without_background_writing(tmp_path, writers):
    """Consolidate, average, convert and resume at stages 0 to 3, on one and on two ranks."""
    module = "training.checkpoint.test_saver"
    made = str(tmp_path / "made")
    start(f"{module}:save_both_ways", writers, out=made)
    for ranks in (2, 1):
        start(f"{module}:resume_both_ways", ranks, source=made, out=str(tmp_path / f"on-{ranks}"))
    for stage in range(4):
        expected = checkpoint_weights(tmp_path / "made" / f"{stage}-True" / "checkpoint-3").load()
        assert len(expected) == 6
        for folder in ("made", "on-2", "on-1"):
            for background in (True, False):
                checkpoint = tmp_path / folder / f"{stage}-{background}" / "checkpoint-3"
                weights = checkpoint_weights(checkpoint).load()
                mean = mean_weights([checkpoint, checkpoint]).load()
                found = [weights, mean]
                if stage:  # stage 0 needs no converter
                    found.append(converted(checkpoint))
                for state in found:
                    assert state.keys() == expected.keys()
                    for name, tensor in expected.items():
                        assert torch.equal(state[name], tensor), (folder, stage, background)


def test_copies_do_not_change_with_the_tensors_and_tied_tensors_are_copied_once():
    copies = HostCopies()
    weight = torch.arange(6.0)
    state = {"a": weight, "b": [weight, {"c": weight[2:]}], "n": 3}
    first = copies.copy_of(state)
    copies.finish()
    weight.zero_()
    assert first["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert first["b"][1]["c"].tolist() == [2, 3, 4, 5]
    assert first["a"] is first["b"][0]
    assert first["n"] == 3
    again = copies.copy_of(state)
    assert again["a"].data_ptr() == first["a"].data_ptr(), "the memory is not reused"


def test_error_of_a_failed_write_is_cleared_by_the_next_one(tmp_path):
    writer = CheckpointWriter(background=True)
    for path, fails in ((tmp_path / "none" / "x.pt", True), (tmp_path / "x.pt", False)):
        writer.save({"x": torch.ones(3)}, str(path))
        writer.start()
        writer.wait()
        assert (writer.error is not None) is fails
    assert torch.load(tmp_path / "x.pt", weights_only=True)["x"].tolist() == [1, 1, 1]


def test_newest_checkpoint_has_the_highest_step(tmp_path):
    needed = {
        "position": {"epoch": 1},
        "zero_stage": 0,
        "world_size": 1,
        "trainable": {},
        "param_groups": [],
        "base_models": {},
        "settings": {},
    }
    for name, step in (("checkpoint-4", 4), ("checkpoint-8", 8), ("epoch-1", 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "asrllm.json").write_text(
            json.dumps({"step": step, "prompts": [], "files": {}, **needed})
        )
    (tmp_path / "checkpoint-12").mkdir()  # not complete
    (tmp_path / "latest").write_text("checkpoint-4")  # killed before it was written
    assert newest_checkpoint(tmp_path).name == "epoch-1"
    shutil.rmtree(tmp_path / "epoch-1")
    assert newest_checkpoint(tmp_path).name == "checkpoint-8"
