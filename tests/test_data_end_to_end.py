"""Training data with real processes: resuming, augmentation, filters and downloads."""

import json
import shutil

import pytest

from asrllm.testing import kaldi_directory, tone_sentences
from tests.conftest import REPOSITORY, assert_done, run_script
from tests.data.object_store import s3_server, web_server
from tests.processes import started, wait_for
from tests.test_end_to_end import losses, metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def trace(exp):
    return [
        (path.name, *map(json.loads, path.read_text().splitlines()))
        for path in sorted(exp.glob("keys-rank*.jsonl"))
    ]


@pytest.mark.longest(60, reason="two ranks train four times in a row")
def test_killed_run_resumes_with_the_same_data_for_any_number_of_workers(world, tmp_path):
    """Two ranks are killed twice, and resume with another number of workers each time.

    Keys, prompts and losses equal those of the uninterrupted run, with all augmentation.
    """
    (tmp_path / "words.txt").write_text("one\ntwo\nthree\nfour\nfive\n")
    noises = kaldi_directory(tmp_path / "noise", tone_sentences(4, seed=7)) / "wav"
    settings = {
        "prompt_file": world.root / "prompts.txt",
        "data__trace": "true",
        "data__augment__speed": "[0.9,1.0,1.1]",
        "data__augment__noise__source": noises,
        "data__augment__noise__prob": 0.5,
        "data__augment__reverb__source": "synthetic",
        "data__augment__reverb__prob": 0.5,
        "data__augment__spec_augment__prob": 0.8,
        "data__hotwords__file": tmp_path / "words.txt",
        "data__hotwords__prob": 0.7,
        "data__valid_data_config": "null",
        "data__sampler__window": 25,
        "trainer__num_steps": 24,
        "trainer__save_every": 3,
        "model__llm__lora__lora_dropout": 0.1,
    }
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    assert_done(
        run_script(
            "train", *world.overrides(whole, data__num_workers=0, **settings), launcher="ranks"
        )
    )
    for workers, checkpoint in ((2, 3), (1, 9)):
        kill_after(
            killed / f"checkpoint-{checkpoint}",
            world.overrides(killed, data__num_workers=workers, **settings),
        )
        assert not (killed / "pretrained.pt").exists(), "the run finished before it was killed"
    assert_done(
        run_script(
            "train", *world.overrides(killed, data__num_workers=2, **settings), launcher="ranks"
        )
    )
    assert trace(killed) == trace(whole)
    assert losses(killed) == losses(whole)
    prompts = {prompt for _, *steps in trace(whole) for step in steps for prompt in step["prompts"]}
    assert any("Hotwords: " in prompt for prompt in prompts)
    assert (
        json.loads((whole / "config.json").read_text())["hotwords_template"] == "Hotwords: {words}."
    )
    assert {prompt.partition(" Hotwords")[0] for prompt in prompts} == {
        "Transcribe.",
        "Repeat what you hear.",
        "写下来。",
    }


def kill_after(path, overrides):
    command = [REPOSITORY / "launch" / "train.py", *overrides]
    # at the end of the block all ranks and their reading processes are killed
    with started(path.parent.with_name("logs"), command, command) as ranks:
        wait_for(lambda: path.exists() or ranks[0].poll() is not None, 120)
        assert path.exists(), f"the run ended with status {ranks[0].poll()} before {path}"


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_shards_at_a_url_are_downloaded_once_for_all_ranks(world, tmp_path, kind):
    with (web_server if kind == "http" else s3_server)() as server:
        for file in world.shards.iterdir():
            url = server.put(f"/train/{file.name}", file.read_bytes())
        (tmp_path / "train.yaml").write_text(f"- shards: {url.rpartition('/')[0]}\n")
        settings = {
            "data__train_data_config": tmp_path / "train.yaml",
            "data__cache__dir": tmp_path / "cache",
            "data__trace": "true",
        }
        local = tmp_path / "local"
        remote = tmp_path / "remote"
        environment = server.environment if kind == "s3" else {}
        assert_done(
            run_script(
                "train", *world.overrides(remote, **settings), launcher="ranks", **environment
            )
        )
        assert all(server.gets(f"/train/{shard.name}") == 1 for shard in world.shards.glob("*.tar"))
    assert_done(run_script("train", *world.overrides(local, data__trace="true"), launcher="ranks"))
    assert trace(remote) == trace(local)
    assert losses(remote) == losses(local)


def test_filtered_utterances_are_counted_in_the_log(world, tmp_path):
    settings = {
        "data__filter__max_duration": 1.0,
        "trainer__num_steps": 2,
        "trainer__wandb__mode": "offline",
    }
    done = assert_done(run_script("train", *world.overrides(tmp_path / "exp", **settings)))
    (dropped,) = [record for record in metrics(tmp_path / "exp") if "dropped/too_long" in record]
    assert 0 < dropped["dropped/too_long"] < 60
    assert "of 60 utterances (" in done.stderr
    (run,) = (tmp_path / "exp" / "wandb").rglob("run-*.wandb")
    assert b"dropped/too_long" in run.read_bytes()


def test_run_does_not_resume_with_other_data_of_the_same_name(world, tmp_path):
    for name, options in (("a", []), ("b", ["--seed", "3"])):
        command = [tmp_path / name / "train", "--kaldi", world.root / "kaldi" / "train", *options]
        assert_done(run_script("make_shards", *command))
        (tmp_path / f"{name}.yaml").write_text(f"- shards: {tmp_path / name / 'train'}\n")
    settings = {"data__valid_data_config": "null", "trainer__save_every": 2}
    run = {
        name: world.overrides(
            tmp_path / "exp", data__train_data_config=tmp_path / f"{name}.yaml", **settings
        )
        for name in "ab"
    }
    assert_done(run_script("train", *run["a"]))
    rejected = run_script("train", *run["b"])
    assert rejected.returncode == 2
    assert "training data" in rejected.stderr


def test_language_without_a_prompt_is_reported_before_model_load(world, tmp_path):
    (tmp_path / "train.yaml").write_text(
        f"- {{shards: {world.shards}, lang: en, prompts: [{{prompt: Schreib., lang: de}}]}}\n"
    )
    rejected = run_script(
        "train", *world.overrides(tmp_path / "exp", data__train_data_config=tmp_path / "train.yaml")
    )
    assert rejected.returncode == 2
    assert "lang='en'" in rejected.stderr
    assert "corpus 'train'" in rejected.stderr
    assert "Loading weights" not in rejected.stderr


def test_infinite_dataset_needs_a_number_of_steps(world, tmp_path):
    settings = {
        "data__use_infinite_dataset": "true",
        "data__sampler__window": 10,
        "trainer__num_steps": 12,
        "data__trace": "true",
    }
    assert_done(run_script("train", *world.overrides(tmp_path / "exp", **settings)))
    ((_, *steps),) = trace(tmp_path / "exp")
    assert len(steps) == 12
    rejected = run_script(
        "train", *world.overrides(tmp_path / "no", **settings | {"trainer__num_epochs": 2})
    )
    assert rejected.returncode == 2
    assert "data.use_infinite_dataset=true" in rejected.stderr
    assert "trainer.num_epochs" in rejected.stderr
    assert not (tmp_path / "no").exists()


def test_missing_shard_is_reported_before_model_load(world, tmp_path):
    shutil.copytree(world.shards, tmp_path / "shards")
    (tmp_path / "shards" / "shard-000001.tar").unlink()
    (tmp_path / "train.yaml").write_text(f"- shards: {tmp_path / 'shards'}\n")
    rejected = run_script(
        "train", *world.overrides(tmp_path / "exp", data__train_data_config=tmp_path / "train.yaml")
    )
    assert rejected.returncode == 2
    assert repr(str(tmp_path / "shards" / "shard-000001.tar")) in rejected.stderr
    assert "Loading weights" not in rejected.stderr
    assert not (tmp_path / "exp").exists()
