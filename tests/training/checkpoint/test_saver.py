"""Checkpoints are complete or invisible, whatever happens while they are written."""

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
from asrllm.training.checkpoint.writer import CheckpointWriter, Copies
from asrllm.training.checkpoint.zero_files import ZeroFiles
from tests.processes import assert_done, both_cores, run_forked
from tests.training.small_engine import engine_of, start, train_step


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(500)
def test_kills_lose_no_checkpoint(tmp_path, soak):
    kills = 50 if soak else 6
    with both_cores():
        done = assert_done(
            run_forked(
                ["-m", "tests.training.checkpoint.kill_loop", tmp_path, kills, 7], timeout=480
            )
        )
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["lost"] == 0
    assert seen["same"], "the run that was killed has other weights than the uninterrupted one"
    assert seen["steps"][-1] > kills / 5, "what was saved was not gone on from"
    assert seen["killed_while_writing"] > kills / 5, "the kills did not meet the writing"


def save_until_full(out: str, megabytes: int) -> None:
    """In every process: files may be so large on the second rank, and not larger."""
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
            print(f"refused: {error}")
        else:
            print("saved")
        if distributed.rank() == 1:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )


@pytest.mark.slow
def test_a_rank_that_cannot_write_is_one_sentence_on_all_and_keeps_what_was_there(tmp_path):
    for process in start(
        "training.checkpoint.test_saver:save_until_full", 2, out=str(tmp_path), megabytes=2000
    ):
        sentences = [
            line for line in process.output.splitlines() if line.startswith(("refused", "saved"))
        ]
        assert len(sentences) == 2
        for sentence in sentences:
            assert sentence.startswith("refused: rank 1 could not write checkpoint-2 to exp_dir=")
            assert "make room; the same command goes on from checkpoint-1" in sentence
    assert list(list_checkpoints(tmp_path)) == [1]
    assert not (tmp_path / ".incomplete").exists()
    assert ZeroFiles(tmp_path / "checkpoint-1", read_manifest(tmp_path / "checkpoint-1")).read(
        "scale"
    ).shape == (1,)


def save_both_ways(out: str) -> None:
    """In every process: each stage's checkpoint, written beside the training and by the training thread."""
    for stage in range(4):
        engine = engine_of(stage, "bf16")
        for step in range(3):
            train_step(engine, step)
        for background in (True, False):
            save(engine, Path(out) / f"{stage}-{background}", background=background)


def resume_both_ways(source: str, out: str) -> None:
    """In every process: each of these checkpoints is loaded and saved again."""
    from asrllm import distributed
    from asrllm.training.checkpoint.partitions import load_from_other_ranks
    from asrllm.training.checkpoint.saver import load_checkpoint

    for stage in range(4):
        for background in (True, False):
            engine = engine_of(stage, "bf16")
            checkpoint = Path(source) / f"{stage}-{background}" / "checkpoint-3"
            manifest = read_manifest(checkpoint)
            same = stage == 0 or manifest["world_size"] == distributed.world_size()
            (load_checkpoint if same else load_from_other_ranks)(engine, checkpoint, manifest)
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
    """What DeepSpeed's own converter reads."""
    return get_fp32_state_dict_from_zero_checkpoint(
        str(checkpoint.parent), checkpoint.name, exclude_frozen_parameters=True
    )


@pytest.mark.slow
def test_checkpoints_are_the_same_with_and_without_background_writing(tmp_path):
    """Stages 0 to 3, one and two ranks; consolidated, averaged, by DeepSpeed's converter, resumed on as many ranks and on others."""
    start("training.checkpoint.test_saver:save_both_ways", 2, out=str(tmp_path / "made"))
    for ranks in (2, 1):
        start(
            "training.checkpoint.test_saver:resume_both_ways",
            ranks,
            source=str(tmp_path / "made"),
            out=str(tmp_path / f"on-{ranks}"),
        )
    for stage in range(4):
        expected = checkpoint_weights(tmp_path / "made" / f"{stage}-True" / "checkpoint-3").load()
        assert len(expected) == 6
        for folder in ("made", "on-2", "on-1"):
            for background in (True, False):
                checkpoint = tmp_path / folder / f"{stage}-{background}" / "checkpoint-3"
                weights, mean = (
                    checkpoint_weights(checkpoint).load(),
                    mean_weights([checkpoint, checkpoint]).load(),
                )
                found = [weights, mean]
                if stage:  # stage 0 needs no converter
                    found.append(converted(checkpoint))
                for state in found:
                    assert state.keys() == expected.keys()
                    assert all(
                        torch.equal(state[name], tensor) for name, tensor in expected.items()
                    ), (folder, stage, background)


def test_copies_are_apart_from_what_goes_on_changing_and_share_what_was_shared():
    copies, weight = Copies(), torch.arange(6.0)
    state = {"a": weight, "b": [weight, {"c": weight[2:]}], "n": 3}
    first = copies.of(state)
    copies.end()
    weight.zero_()
    assert first["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert first["b"][1]["c"].tolist() == [2, 3, 4, 5]
    assert first["a"] is first["b"][0]
    assert first["n"] == 3
    again = copies.of(state)
    assert again["a"].data_ptr() == first["a"].data_ptr(), "the memory is used again"


def test_a_failed_write_is_told_and_the_next_one_is_not(tmp_path):
    writer = CheckpointWriter(background=True)
    for path, fails in ((tmp_path / "none" / "x.pt", True), (tmp_path / "x.pt", False)):
        writer.save({"x": torch.ones(3)}, str(path))
        writer.start()
        writer.wait()
        assert (writer.error is not None) is fails
    assert torch.load(tmp_path / "x.pt", weights_only=True)["x"].tolist() == [1, 1, 1]


def test_the_newest_checkpoint_is_the_one_of_the_highest_step(tmp_path):
    needed = {
        "position": {},
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
