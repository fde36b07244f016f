"""Train, resume, evaluate and export in real processes; two ranks use gloo."""

import contextlib
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import asrllm
from asrllm.checkpoints.consolidate import checkpoint_weights
from asrllm.commands.dashboard import SAMPLES, training_plot
from asrllm.escape import escape
from asrllm.models.auto import read_state
from asrllm.testing import tiny_llm
from asrllm.training.callbacks.metric_names import METRICS
from asrllm.training.checkpoint.zero_files import AVERAGE, MASTERS
from tests.conftest import REPOSITORY, World, assert_done, clean_environment, made_once, run_script
from tests.processes import Process, free_port, run_forked, started, wait_for
from tests.test_cli import does, fails

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def metrics(exp: Path) -> list[dict]:
    return [json.loads(line) for line in (exp / "metrics.jsonl").read_text().splitlines()]


def losses(exp: Path) -> list[float]:
    return [record["loss"] for record in metrics(exp) if "loss" in record]


def gradient_norms(exp: Path) -> list[float]:
    return [record["grad_norm"] for record in metrics(exp) if "loss" in record]


def trained_keys(exp: Path) -> list[str]:
    return [
        key
        for path in sorted(exp.glob("keys-rank*.jsonl"))
        for line in path.read_text().splitlines()
        for key in json.loads(line)["keys"]
    ]


@pytest.fixture(scope="session")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps, launched by `deepspeed` with ZeRO-3 on two processes.

    Tests must not change it; `own` is a copy.
    """
    return (
        made_once(
            tmp_path_factory, "finished", lambda folder: train_finished(world, folder / "exp")
        )
        / "exp"
    )


@pytest.fixture
def own(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return shutil.copytree(finished, tmp_path / "own")


def train_finished(world: World, exp: Path) -> None:
    overrides = world.overrides(
        exp,
        trainer__deepspeed_config="ds_configs/zero3.json",
        trainer__sinks="[wandb,tensorboard]",
        trainer__wandb__mode="offline",
        trainer__valid_decode=32,
        prompt_file=world.root / "prompts.txt",
        data__trace="true",
    )
    assert_done(run_script("train", *overrides, launcher="deepspeed"))


def test_run_writes_the_documented_files(finished):
    assert losses(finished)[-1] < losses(finished)[0]
    records = metrics(finished)
    expected = {
        "step",
        "epoch",
        "loss",
        "acc",
        "lr",
        "grad_norm",
        "audio_seconds",
        "text_tokens",
        "padding",
        "data_wait",
        "tflops",
        "memory_gb",
    }
    assert expected <= records[0].keys() <= {"step", *METRICS}
    assert 0 < records[0]["grad_norm"] < 1e4
    assert any("valid/valid/loss" in record for record in records)
    names = [
        "config.yaml",
        "config.json",
        "tokenizer.json",
        "asrllm.sha256",
        "latest",
        "zero_to_fp32.py",
        "pretrained.pt",
        "samples.jsonl",
        "checkpoint-4",
        "checkpoint-8",
    ]
    for name in names:
        assert (finished / name).exists(), name
    assert (finished / "latest").read_text() == "checkpoint-8"
    assert not (finished / ".incomplete").exists()
    assert list((finished / "tensorboard").glob("events*"))
    assert set(trained_keys(finished)) <= {f"utt{i:04d}" for i in range(60)}


def test_checkpoint_has_the_trained_weights_and_a_manifest(finished):
    manifest = json.loads((finished / "checkpoint-8" / "asrllm.json").read_text())
    assert (manifest["step"], manifest["zero_stage"], manifest["world_size"]) == (8, 3, 2)
    assert manifest["prompts"] == ["Transcribe.", "Repeat what you hear.", "写下来。"]
    assert all(name.startswith("projector.") or "lora_" in name for name in manifest["trainable"])
    assert manifest["base_models"].keys() == {"audio_encoder", "llm"}
    assert (
        checkpoint_weights(finished / "checkpoint-8").load().keys() == manifest["trainable"].keys()
    )


FORMS = ([], ["--safe_serialization"], ["--max_shard_size", "20KB"])


def converted(exp: Path, output: Path, *form: str) -> dict[str, torch.Tensor]:
    """Return the weights that DeepSpeed's own script extracts from the newest checkpoint."""
    assert_done(
        run_forked([exp / "zero_to_fp32.py", exp, output, "--exclude_frozen_parameters", *form])
    )
    return read_state(output)


@pytest.mark.parametrize("form", FORMS)
def test_deepspeed_converter_gives_the_same_weights(finished, tmp_path, form):
    theirs = converted(finished, tmp_path, *form)
    mine = torch.load(finished / "pretrained.pt", weights_only=True)
    assert theirs.keys() == mine.keys()
    assert all(torch.equal(theirs[name], mine[name]) for name in mine)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_converter_supports_a_trained_llm_with_a_tied_head(world, tmp_path, stage):
    exp = tmp_path / "exp"
    full = {"model__llm__lora": "null", "model__llm__lora__r": None, "model__llm__frozen": "false"}
    settings = {
        "trainer__deepspeed_config": f"ds_configs/zero{stage}.json",
        "trainer__num_steps": 2,
        "data__valid_data_config": "null",
    }
    assert_done(run_script("train", *world.overrides(exp, **settings, **full), launcher="ranks"))
    mine = asrllm.AutoModel.from_pretrained(exp).weights()
    for number, form in enumerate(FORMS):
        assert "llm.lm_head.weight" not in converted(exp, tmp_path / str(number), *form)
        theirs = asrllm.AutoModel.from_pretrained(exp, weights=tmp_path / str(number)).weights()
        assert theirs.keys() == mine.keys()
        assert all(torch.equal(theirs[name], mine[name]) for name in mine)


def wandb_records(path: Path):
    """Yield the records of an offline run, which is in LevelDB's log format.

    It has blocks of 32 KiB and chunks of crc32, u16 length, u8 kind (full, first, middle, last).
    """
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    at = 7
    parts = b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def test_wandb_run_has_config_and_losses(finished):
    (path,) = (finished / "wandb").rglob("run-*.wandb")
    logged = []
    config = {}
    for record in wandb_records(path):
        if record.HasField("history"):
            logged.append(
                {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
            )
        if record.HasField("run"):
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    assert config["trainer"]["deepspeed_config"] == "ds_configs/zero3.json"
    assert config["model"]["llm"]["lora"]["r"] == 4
    assert [row["train/loss"] for row in logged if "train/loss" in row] == losses(finished)
    assert any("valid/valid/loss" in row for row in logged)
    names = {name.partition(".")[0] for row in logged for name in row if name[0] != "_"}
    without_panel = set(names)
    for plot in map(training_plot, METRICS, METRICS):
        without_panel.difference_update(plot.names)
        without_panel -= {name for name in names if re.search(plot.pattern or "^$", name)}
    assert without_panel == {SAMPLES}


@pytest.mark.longest(60, reason="evaluates with a real launcher")
def test_evaluation_averages_checkpoints_and_writes_its_files(world, own):
    finished = own
    test = f"data.test_data_config={world.root / 'test.yaml'}"
    choice = ("checkpoint.model.iter=8", "checkpoint.model.avg=2")
    done = assert_done(
        run_script(
            "evaluate",
            f"exp_dir={finished}",
            *choice,
            test,
            "decoding_method=greedy_search",
            "max_new_tokens=20",
        )
    )
    assert "WER" in done.stdout
    averaged = torch.load(finished / "averaged-iter-8-avg-2.pt", weights_only=True)
    parts = [checkpoint_weights(finished / f"checkpoint-{step}").load() for step in (4, 8)]
    for name, tensor in averaged.items():
        if "lora_" in name:  # concatenated factors have twice the rank
            assert torch.equal(
                tensor, torch.cat([part[name] for part in parts], dim=0 if "lora_A" in name else 1)
            ), name
        else:
            torch.testing.assert_close(tensor, (parts[0][name] + parts[1][name]) / 2)
    assert [source["step"] for source in averaged.about["sources"]] == [4, 8]
    folder = finished / "greedy_search"
    results = json.loads((folder / "results.json").read_text())["test"]
    assert results["utterances"] == 9
    assert results["normalizer"] == "basic"
    assert results["wer_ci95"][0] <= results["wer"] <= results["wer_ci95"][1]
    for name in ("recogs-test", "errs-test", "wer-summary-test", "wer-summary-all"):
        assert (folder / f"{name}-iter-8-avg-2.txt").is_file()
    generations = [
        json.loads(line)
        for line in next(folder.glob("generations-test-*.jsonl")).read_text().splitlines()
    ]
    assert [row["key"] for row in generations] == [f"utt{i:04d}" for i in range(9)]
    two = assert_done(
        run_script(
            "evaluate",
            f"exp_dir={finished}",
            *choice,
            test,
            "max_new_tokens=20",
            launcher="torchrun",
        )
    )
    assert "WER" in two.stdout
    assert json.loads((folder / "results.json").read_text())["test"]["utterances"] == 9
    assert [
        json.loads(line)
        for line in next(folder.glob("generations-test-*.jsonl")).read_text().splitlines()
    ] == generations
    assert_done(
        run_script(
            "evaluate",
            f"exp_dir={finished}",
            test,
            "decoding_method=beam_search",
            "max_new_tokens=5",
            "prompt=New.",
        )
    )
    assert (finished / "beam_search" / "recogs-test-pretrained.txt").is_file()


def test_averaged_file_is_written_again_if_its_checkpoints_changed(own):
    finished = own
    from asrllm.checkpoints.average import CheckpointSelection, resolve_weights

    last = CheckpointSelection(iteration=8, avg=1)
    path = resolve_weights(finished, filename=None, selection=last)
    made = path.stat().st_mtime_ns
    assert resolve_weights(finished, filename=None, selection=last).stat().st_mtime_ns == made
    manifest = finished / "checkpoint-8" / "asrllm.json"
    os.utime(manifest)
    assert resolve_weights(finished, filename=None, selection=last).stat().st_mtime_ns == made
    manifest.write_text(manifest.read_text() + "\n")  # a manifest of other files would differ too
    assert resolve_weights(finished, filename=None, selection=last).stat().st_mtime_ns > made
    with pytest.raises(
        asrllm.errors.UserError, match=rf"avg=3 .* 3 .* iter=8, .*'{finished}' .* 2"
    ):
        resolve_weights(finished, filename=None, selection=CheckpointSelection(iteration=8, avg=3))
    assert (
        resolve_weights(finished, filename="pretrained.pt", selection=last).name == "pretrained.pt"
    )
    assert (
        resolve_weights(finished, filename=None, selection=CheckpointSelection(avg=0)).name
        == "pretrained.pt"
    )


def test_export_transcribe_and_consolidate(world, own, tmp_path, capsys):
    finished = own
    wav = next((world.root / "kaldi" / "test" / "wav").glob("*.wav"))
    assert_done(
        run_script("export", finished, "--output", tmp_path / "model", "--dtype", "float32")
    )
    output = ("--output", tmp_path / "model")
    assert f"--output {str(output[1])!r}" in fails(capsys, "export", finished, *output)
    exported = assert_done(run_script("transcribe", tmp_path / "model", wav, "--no-vad")).stdout
    assert exported == does(capsys, "transcribe", finished, wav, "--no-vad")
    averaged = finished / "averaged-iter-8-avg-2.pt"
    does(capsys, "average", finished, "--iter", "8", "--avg", "2", "--output", averaged)
    merged = does(capsys, "merge-lora", averaged, "--output", tmp_path / "llm")
    assert str(tmp_path / "llm") in merged
    does(
        capsys,
        "export",
        averaged,
        "--output",
        tmp_path / "merged",
        "--dtype",
        "float32",
    )
    of_run = does(capsys, "transcribe", finished, wav, "--no-vad", "--weights", averaged)
    assert of_run == does(capsys, "transcribe", tmp_path / "merged", wav, "--no-vad")
    (text,) = asrllm.AutoModel.from_pretrained(tmp_path / "model").transcribe([wav])
    assert exported == escape(text, keep="\n") + "\n"
    assert_done(
        run_script("zero_to_fp32", finished, "--tag", "checkpoint-4", "--output", tmp_path / "c.pt")
    )
    assert (
        torch.load(tmp_path / "c.pt", weights_only=True).keys()
        == checkpoint_weights(finished / "checkpoint-4").load().keys()
    )


@pytest.mark.longest(60, reason="trains twice, once with a real launcher")
@pytest.mark.parametrize(
    ("launcher", "again", "ds_config", "precision"),
    [
        ("interpreter", "python", "zero0", "fp32"),
        ("torchrun", "ranks", "zero1", "bf16"),
        ("ranks", "ranks", "zero2", "bf16"),
        ("ranks", "ranks", "zero3", "fp32"),
        ("python", "python", "zero3_offload", "bf16"),
    ],
)
def test_resume_reproduces_losses_bitwise(world, tmp_path, launcher, again, ds_config, precision):
    settings = {
        "trainer__deepspeed_config": f"ds_configs/{ds_config}.json",
        "trainer__precision": precision,
        "data__trace": "true",
        "model__llm__lora__lora_dropout": 0.1,
        "trainer__gradient_accumulation_steps": 2,
        "trainer__use_averaged_model": "true",
        "trainer__average_period": 3,
        "trainer__background_checkpoints": "false" if ds_config == "zero3" else "true",
    }
    whole = tmp_path / "whole"
    parts = tmp_path / "parts[1]*?"  # not a pattern
    assert_done(run_script("train", *world.overrides(whole, **settings), launcher=launcher))
    shutil.copytree(whole, parts)
    # like a run that was killed between steps 4 and 8: without the later checkpoints, with the logs
    for path in parts.glob("*/asrllm.json"):
        if json.loads(path.read_text())["step"] > 4:
            path.unlink()
    (parts / "pretrained.pt").unlink()
    assert_done(run_script("train", *world.overrides(parts, **settings), launcher=again))
    assert len(losses(whole)) == 8
    assert losses(parts) == losses(whole)
    assert trained_keys(parts) == trained_keys(whole)
    for name, tensor in torch.load(whole / "pretrained.pt", weights_only=True).items():
        assert torch.equal(torch.load(parts / "pretrained.pt", weights_only=True)[name], tensor), (
            name
        )
    for name, tensor in checkpoint_weights(whole / "checkpoint-8", AVERAGE).load().items():
        assert torch.equal(
            checkpoint_weights(parts / "checkpoint-8", AVERAGE).load()[name], tensor
        ), name


def test_ranks_with_different_settings_stop_before_the_model_loads(world, tmp_path):
    exp = tmp_path / "exp"
    script = REPOSITORY / "launch" / "train.py"
    commands = [[script, *world.overrides(exp, trainer__lr=rate)] for rate in (0.001, 0.002)]
    with started(tmp_path / "logs", *commands) as ranks:
        assert [rank.wait(timeout=90) for rank in ranks] == [2, 2]
    printed = "".join(path.read_text() for path in (tmp_path / "logs").iterdir())
    assert "trainer.lr: 0.001 on rank 0; 0.002 on rank 1" in printed
    assert "loading" not in printed
    assert not list(exp.glob("checkpoint-*"))


def test_ranks_train_on_each_utterance_once_and_zero_stages_agree(world, tmp_path):
    seen = {}
    for stage, launcher in ((0, "ranks"), (3, "ranks")):
        exp = tmp_path / str(stage)
        settings = {
            "trainer__num_epochs": 1,
            "trainer__num_steps": "null",
            "data__trace": "true",
            "trainer__precision": "fp32",
        }
        assert_done(
            run_script(
                "train",
                *world.overrides(
                    exp, trainer__deepspeed_config=f"ds_configs/zero{stage}.json", **settings
                ),
                launcher=launcher,
            )
        )
        assert sorted(trained_keys(exp)) == [f"utt{i:04d}" for i in range(60)]
        assert (exp / "epoch-1" / "asrllm.json").is_file()
        seen[stage] = losses(exp)
    np.testing.assert_allclose(seen[0], seen[3], rtol=1e-5)


@pytest.mark.parametrize(("stage", "first", "then"), [(2, 2, 1), (3, 1, 2)])
def test_resume_with_another_world_size_uses_the_same_batches(
    world, tmp_path, capsys, stage, first, then
):
    """With the same number of micro-batches per step on another number of processes.

    The losses stay the same, and no utterance is lost or repeated.
    """

    def settings(exp, processes, **more):
        keys = {
            "trainer__deepspeed_config": f"ds_configs/zero{stage}.json",
            "trainer__precision": "fp32",
            "trainer__num_epochs": 1,
            "trainer__num_steps": "null",
            "trainer__save_every": 2,
            "trainer__use_averaged_model": "true",
            "trainer__average_period": 2,
            "trainer__gradient_accumulation_steps": 2 // processes,
            "data__trace": "true",
        }
        return world.overrides(exp, **keys | more)

    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    launcher = {1: "python", 2: "ranks"}
    assert_done(run_script("train", *settings(whole, first), launcher=launcher[first]))
    checkpoint = whole / "checkpoint-2"
    assert_done(
        run_script(
            "train", *settings(parts, then, trainer__resume=checkpoint), launcher=launcher[then]
        )
    )
    np.testing.assert_allclose(losses(parts), losses(whole)[2:], rtol=2e-5)
    # compared separately, because AdamW does not depend on the scale of the gradients
    np.testing.assert_allclose(gradient_norms(parts), gradient_norms(whole)[2:], rtol=1e-3)
    trained_before = [key for line in lines(whole) if line["step"] <= 2 for key in line["keys"]]
    assert sorted(trained_before + trained_keys(parts)) == [f"utt{i:04d}" for i in range(60)]
    last = f"checkpoint-{metrics(whole)[-1]['step']}"
    for key, close in ((MASTERS, 1e-4), (AVERAGE, 1e-4)):
        expected = checkpoint_weights(whole / last, key).load()
        found = checkpoint_weights(parts / last, key).load()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=close, atol=1e-5)

    averaged = does(
        capsys, "average", whole, "--iter", last.split("-")[1], "--avg", 1, "--use-averaged-model"
    )
    assert averaged.strip().endswith("-avg-1-use-averaged-model.pt")
    choice = [
        f"checkpoint.model.iter={last.split('-')[1]}",
        "checkpoint.model.avg=1",
        "checkpoint.model.use_averaged_model=true",
    ]
    assert_done(
        run_script(
            "evaluate",
            f"exp_dir={whole}",
            f"data.test_data_config={world.root / 'test.yaml'}",
            *choice,
            "max_new_tokens=5",
        )
    )
    results = whole / "greedy_search" / "results.json"
    assert "use-averaged-model" in results.read_text()


def lines(exp: Path) -> list[dict]:
    return [
        json.loads(line)
        for path in sorted(exp.glob("keys-rank*.jsonl"))
        for line in path.read_text().splitlines()
    ]


@pytest.mark.longest(60, reason="trains until it is killed, and again, with a W&B service")
def test_killed_run_resumes_from_the_last_complete_checkpoint(world, tmp_path):
    """All processes are killed with SIGKILL."""
    import wandb  # takes a second, which the fast tests do not need

    # a service that outlives the killed run, like that of a notebook
    wandb.setup().ensure_service()
    assert "WANDB_SERVICE" in os.environ
    exp = tmp_path / "exp"
    overrides = world.overrides(
        exp,
        trainer__num_steps=400,
        trainer__save_every=3,
        trainer__log_every=1,
        data__valid_data_config="null",
        trainer__keep_last_k=2,
    )
    overrides.append("trainer.wandb.mode=offline")
    process = Process(
        [REPOSITORY / "launch" / "train.py", *overrides], clean_environment(), tmp_path / "log"
    )
    third = exp / "checkpoint-9"
    try:
        wait_for(lambda: third.exists() or process.poll() is not None, 240)
        assert process.poll() is None, f"the run ended with status {process.poll()} before {third}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    saved = sorted(
        int(path.parent.name.partition("-")[2]) for path in exp.glob("checkpoint-*/asrllm.json")
    )
    assert 9 in saved or saved[-1] > 9
    assert len(saved) <= 3
    end = saved[-1] + 2
    resumed = run_script(
        "train", *(o for o in overrides if "num_steps" not in o), f"trainer.num_steps={end}"
    )
    assert_done(resumed)
    steps = [record["step"] for record in metrics(exp)]
    assert steps == list(range(1, end + 1))
    runs = [path.name.rpartition("-")[2] for path in (exp / "wandb").rglob("offline-run-*")]
    assert len(runs) == 2
    assert len(set(runs)) == 1, "a resumed run is the same W&B run"
    assert runs_to_sync(resumed.stderr) == 2


def runs_to_sync(log: str) -> int:
    """Return how many local runs the only command `wandb sync` of a log would upload."""
    (paths,) = re.findall(r"wandb sync (.*)", log)
    done = subprocess.run(
        f"{sys.executable} -m wandb sync --dry-run {paths}",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        env=clean_environment(WANDB_API_KEY="0" * 40),
    )
    assert_done(done)
    return done.stderr.count(".wandb\n")


def test_checkpoints_of_another_model_are_rejected(world, own, tmp_path, monkeypatch, capsys):
    finished = own
    other = tiny_llm(tmp_path / "other", seed=7)
    settings = {
        "trainer__deepspeed_config": "ds_configs/zero3.json",
        "prompt_file": world.root / "prompts.txt",
    }
    before = sorted(path.name for path in finished.iterdir())
    monkeypatch.chdir(REPOSITORY)
    place = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        "asrllm.distributed.start",
        lambda: pytest.fail("the mistake was not found before waiting for other ranks"),
    )

    def rejected(message, **changes):
        assert message in fails(capsys, "train", *world.overrides(finished, **settings | changes))

    rejected(str(other), model__llm__pretrained_model=other)
    rejected("zero_stage=3", trainer__deepspeed_config="ds_configs/zero2.json")
    rejected("trainer.resume=never", trainer__resume="never")
    rejected(" lora={", model__llm__lora__lora_alpha=99)
    rejected(" precision=bf16", trainer__precision="fp32")
    rejected(" seed=42", seed=1)
    words = shutil.copytree(world.llm, tmp_path / "words")  # the same weights, other words
    vocabulary = json.loads((words / "tokenizer.json").read_text())
    first, second = list(vocabulary["model"]["vocab"].items())[10:12]
    vocabulary["model"]["vocab"] |= {first[0]: second[1], second[0]: first[1]}
    (words / "tokenizer.json").write_text(json.dumps(vocabulary))
    rejected(" vocabulary=", model__llm__pretrained_model=words)
    rejected(" training data=[['train', 60", data__train_data_config=world.root / "test.yaml")
    assert sorted(path.name for path in finished.iterdir()) == before
    rejected(f"trainer.resume={str(finished)!r} ", trainer__resume=finished)
    earlier = finished / "checkpoint-4"
    rejected(f"trainer.resume={str(earlier)!r} ", trainer__resume=earlier)


def test_checkpoints_with_other_trained_parameters_are_rejected(world, own):
    finished = own
    settings = {
        "trainer__deepspeed_config": "ds_configs/zero3.json",
        "prompt_file": world.root / "prompts.txt",
    }
    before = (finished / "config.yaml").read_text()
    done = run_script(
        "train",
        *world.overrides(finished, model__audio_encoder__frozen="false", **settings),
        launcher="ranks",
    )
    assert done.returncode != 0
    assert "'audio_encoder." in done.stderr
    assert f"'{finished}/checkpoint-" in done.stderr
    assert "Traceback" not in done.stderr
    assert (finished / "config.yaml").read_text() == before


def test_corrupted_checkpoint_is_reported_with_its_path(world, tmp_path):
    exp = tmp_path / "exp"
    run = world.overrides(exp, trainer__num_steps=4, data__valid_data_config="null")
    assert_done(run_script("train", *run))
    (state,) = (exp / "checkpoint-4").glob("*optim_states.pt")
    state.write_bytes(b"junk")
    for script, arguments in (("train", run), ("zero_to_fp32", [exp])):
        done = run_script(script, *arguments)
        assert done.returncode == 2, done.stderr
        assert str(exp / "checkpoint-4") in done.stderr
        assert "Traceback" not in done.stderr
    (exp / "checkpoint-4" / "asrllm.json").write_text("{}")
    done = run_script("train", *run)
    assert done.returncode == 2
    assert str(exp / "checkpoint-4" / "asrllm.json") in done.stderr
    # only a run that resumes from another checkpoint renames it
    assert list(exp.glob("checkpoint-*")) == [exp / "checkpoint-4"]


def test_flipped_bit_in_the_newest_checkpoint_resumes_from_the_previous_one(world, tmp_path):
    exp = tmp_path / "exp"
    run = world.overrides(
        exp,
        trainer__num_steps=6,
        trainer__save_every=2,
        trainer__keep_last_k=0,
        data__valid_data_config="null",
    )
    assert_done(run_script("train", *run))
    expected = losses(exp)
    for later in ("checkpoint-6", "epoch-1"):
        shutil.rmtree(exp / later)
    (state,) = (exp / "checkpoint-4").glob("*optim_states.pt")
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    rejected = run_script("train", *run, f"trainer.resume={exp / 'checkpoint-4'}")
    assert rejected.returncode == 2
    assert state.name in rejected.stderr
    done = assert_done(run_script("train", *run))
    assert state.name in done.stderr
    assert "checkpoint-2" in done.stderr
    assert losses(exp) == expected
    assert (exp / "corrupted-checkpoint-4").is_dir()


@pytest.mark.parametrize("stage", range(4))
def test_background_writing_does_not_change_the_evaluation(world, tmp_path, stage):
    test = f"data.test_data_config={world.root / 'test.yaml'}"
    texts = []
    for background in ("true", "false"):
        exp = tmp_path / background
        options = {
            "trainer__deepspeed_config": f"ds_configs/zero{stage}.json",
            "trainer__background_checkpoints": background,
        }
        run = world.overrides(
            exp,
            trainer__num_steps=2,
            trainer__save_every=1,
            data__valid_data_config="null",
            **options,
        )
        assert_done(run_script("train", *run))
        choice = ("checkpoint.model.iter=2", "checkpoint.model.avg=2")
        assert_done(
            run_script(
                "evaluate",
                f"exp_dir={exp}",
                *choice,
                test,
                "max_new_tokens=10",
                "whisper_baseline=false",
            )
        )
        texts.append((exp / "greedy_search" / "generations-test-iter-2-avg-2.jsonl").read_text())
    assert texts[0] == texts[1]
    assert len(texts[0].splitlines()) == 9


def test_corrupted_manifest_of_the_newest_epoch_resumes_from_the_previous_checkpoint(
    world, tmp_path
):
    exp = tmp_path / "exp"
    run = world.overrides(
        exp,
        trainer__num_epochs=1,
        trainer__save_every=2,
        trainer__keep_last_k=0,
        data__valid_data_config="null",
    )
    assert_done(run_script("train", *run))
    expected = losses(exp)
    (exp / "corrupted-epoch-1").mkdir()  # from an earlier corruption
    manifest = exp / "epoch-1" / "asrllm.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"step"', b'"stfp"'))
    done = assert_done(run_script("train", *run))
    assert "corrupted-epoch-1-2" in done.stderr
    assert losses(exp) == expected
    assert (exp / "corrupted-epoch-1-2").is_dir()
    assert (exp / "epoch-1" / "asrllm.json").is_file()


def test_training_with_optimizer_offload_reduces_the_loss(world, tmp_path):
    exp = tmp_path / "exp"
    assert_done(
        run_script(
            "train",
            *world.overrides(
                exp,
                trainer__deepspeed_config="ds_configs/zero2_offload.json",
                trainer__num_steps=24,
            ),
        )
    )
    # means over steps, whose losses differ because their utterances have different durations
    assert np.mean(losses(exp)[-6:]) < np.mean(losses(exp)[:3]) - 0.2


def test_too_many_unreadable_utterances_stop_the_run(world, tmp_path):
    shutil.copytree(world.shards, tmp_path / "shards")
    shard = tmp_path / "shards" / "shard-000001.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    (tmp_path / "train.yaml").write_text(f"- {{shards: {tmp_path / 'shards'}}}\n")
    done = run_script(
        "train",
        *world.overrides(
            tmp_path / "exp",
            data__train_data_config=tmp_path / "train.yaml",
            data__max_bad_share=0.005,
        ),
    )
    assert done.returncode == 2
    assert "data.max_bad_share=0.005" in done.stderr
    assert "unreadable: utterance" in done.stderr
