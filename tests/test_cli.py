"""Commands that run in this process: exit status and standard error."""

import errno
import gzip
import os
import runpy
import sys

import pytest
import torch
from filelock import FileLock

from asrllm.commands.dispatch import main
from asrllm.commands.parsers import VERBS
from asrllm.training.checkpoint import resume
from tests.checkpoints.made import write_checkpoint
from tests.conftest import REPOSITORY


def fails(capsys, *argv):
    """Run a command that must exit with status 2, and return its one-line message."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"asrllm {argv[0]}: ")
    assert error.count("\n") == 1
    return error


def does(capsys, *argv):
    """Run a command that must succeed, and return its standard output."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert len(capsys.readouterr().out) > 150


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("transcribe", ["", "x.wav"]),
        ("transcribe", ["model", ""]),
        ("transcribe", ["model", "x.wav", "--output-dir", ""]),
        ("transcribe", ["model", "x.wav", "--weights", ""]),
        ("average", ["", "--iter", "4", "--avg", "2"]),
        ("average", ["exp", "--iter", "4", "--avg", "2", "--output", ""]),
        ("consolidate", [""]),
        ("consolidate", ["exp", "--tag", ""]),
        ("consolidate", ["exp", "--output", " "]),
        ("export", ["", "--output", "out"]),
        ("export", ["exp", "--output", ""]),
        ("export", ["exp", "--output", "out", "--weights", ""]),
        ("export", ["exp", "--output", "out", "--push-to-hub", ""]),
        ("merge-lora", ["", "--output", "out"]),
        ("merge-lora", ["exp", "--output", ""]),
        ("import-icefall", ["", "--audio-encoder", "a", "--llm", "b", "--output", "out"]),
        ("import-icefall", ["x", "--audio-encoder", "", "--llm", "b", "--output", "out"]),
        ("import-icefall", ["x", "--audio-encoder", "a", "--llm", "", "--output", "out"]),
        ("import-icefall", ["x", "--audio-encoder", "a", "--llm", "b", "--output", ""]),
    ],
)
def test_an_empty_value_is_refused(verb, arguments, tmp_path, capsys, monkeypatch):
    """An unset variable of the shell would otherwise be the working directory or the default."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main([verb, *arguments])
    assert stopped.value.code == 2
    empty = [number for number, word in enumerate(arguments) if not word.strip()]
    if empty[0] > 0 and arguments[empty[0] - 1].startswith("--"):
        assert arguments[empty[0] - 1] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "script", sorted((REPOSITORY / "launch").rglob("*.py")), ids=lambda path: path.stem
)
def test_every_launch_script_is_a_verb(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("usage: asrllm ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainer__lrr": 1}, "unknown key 'trainer.lrr'"),
        ({"prompt_file": "EMPTY"}, "empty.txt' has no prompt"),
        ({"trainer__deepspeed_config": "zero9.json"}, "does not exist"),
        (
            {"trainer__deepspeed_config": "MISNAMED"},
            "is named for ZeRO stage 2, but its zero_optimization.stage is 0",
        ),
        ({"data__train_data_config": "EMPTY"}, "empty.txt' is not a list"),
        ({"data__train_data_config": "no.yaml"}, "does not exist"),
        ({"model__llm__pretrained_model": "WITHOUT_TOKENIZER"}, "has no tokenizer"),
        ({"model__audio_encoder__pretrained_model": "LLM"}, "not whisper"),
        ({"model__llm__model_type": "llama"}, "is a 'qwen2' model"),
        (
            {"data__filter__max_duration": 100},
            "data.filter.max_duration=100.0 is outside the audio encoder's range",
        ),
        ({"data__filter__min_duration": 0}, "data.filter.min_duration=0.0"),
        ({"prompt_file": "AUDIO_TOKEN"}, "contains the audio token"),
    ],
)
def test_mistake_in_training_exits_before_writing(world, tmp_path, capsys, change, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "audio_token.txt").write_text("Listen: <|AUDIO|>")
    (tmp_path / "my_zero2.json").write_text('{"zero_optimization": {}}')
    llm = tmp_path / "llm"
    llm.mkdir()
    (llm / "config.json").write_text((world.llm / "config.json").read_text())
    places = {
        "AUDIO_TOKEN": tmp_path / "audio_token.txt",
        "EMPTY": tmp_path / "empty.txt",
        "MISNAMED": tmp_path / "my_zero2.json",
        "WITHOUT_TOKENIZER": llm,
        "LLM": world.llm,
    }
    change = {key: places.get(value, value) for key, value in change.items()}
    assert message in fails(capsys, "train", *world.overrides(tmp_path / "exp", **change))
    assert not (tmp_path / "exp").exists()


@pytest.mark.slow
def test_second_run_in_one_directory_is_rejected(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(resume, "LOCK_TIMEOUT", 0.1)
    (tmp_path / "exp").mkdir()
    with FileLock(tmp_path / "exp" / ".training.lock"):
        assert "another process is training in exp_dir" in fails(
            capsys, "train", *world.overrides(tmp_path / "exp")
        )
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in fails(capsys, "train", *world.overrides(tmp_path / "file"))


@pytest.mark.slow
def test_empty_manifest_exits_before_writing(world, tmp_path, capsys):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    for name, message in (("empty.jsonl", "is empty"), ("empty.jsonl.gz", "has no utterance")):
        data = tmp_path / "train.yaml"
        data.write_text(f"- {{manifest: {tmp_path / name}}}\n")
        assert message in fails(
            capsys, "train", *world.overrides(tmp_path / "exp", data__train_data_config=data)
        )
        assert not (tmp_path / "exp").exists()


@pytest.mark.slow
def test_mistakes_in_evaluation_are_one_message(world, tmp_path, capsys):
    test = f"data.test_data_config={world.root / 'test.yaml'}"
    assert "does not exist" in fails(capsys, "evaluate", f"exp_dir={tmp_path / 'no'}", test)
    exp = f"exp_dir={tmp_path}"
    choice = ("checkpoint.model.iter=9", "checkpoint.model.avg=1")
    lost = f"data.test_data_config={tmp_path / 'lost.yaml'}"
    assert "lost.yaml" in fails(capsys, "evaluate", exp, lost, *choice)
    assert "has no pretrained.pt" in fails(capsys, "evaluate", exp, test)
    assert "no complete checkpoint for iter=9" in fails(
        capsys, "evaluate", exp, test, "checkpoint.model.iter=9", "checkpoint.model.avg=1"
    )
    assert "checkpoint.model.avg" in fails(capsys, "evaluate", exp, test, "checkpoint.model.iter=9")
    assert "checkpoint.model.iter" in fails(capsys, "evaluate", exp, test, "checkpoint.model.avg=9")
    both = fails(
        capsys, "evaluate", exp, test, "checkpoint.model.iter=8", "checkpoint.model.epoch=1"
    )
    assert "checkpoint.model.iter=8" in both
    assert "checkpoint.model.epoch=1" in both
    assert "checkpoint.model.filename='x.pt' does not exist" in fails(
        capsys, "evaluate", exp, test, "checkpoint.model.filename=x.pt"
    )
    assert "'decoding_method'" in fails(capsys, "evaluate", exp, test, "decoding_methods=x")
    assert "normalizer='x' is unknown" in fails(capsys, "evaluate", exp, test, "normalizer=x")
    assert list(tmp_path.iterdir()) == []


def test_mistakes_in_other_verbs_are_one_message(world, tmp_path, capsys):
    assert "has no complete checkpoint" in fails(capsys, "consolidate", tmp_path)
    assert "no complete checkpoint for iter=3" in fails(
        capsys, "average", tmp_path, "--iter", 3, "--avg", 2
    )
    assert "has no config.json" in fails(capsys, "export", tmp_path, "--output", tmp_path / "out")
    assert "has no config.json" in fails(capsys, "transcribe", tmp_path, tmp_path / "no.wav")
    for verb, *options in (
        ("consolidate",),
        ("average", "--iter", 3, "--avg", 2),
        ("export", "--output", tmp_path / "out"),
    ):
        assert "does not exist" in fails(capsys, verb, tmp_path / "no" / "x.pt", *options)
    assert "does not exist" in fails(
        capsys, "shards", "make", tmp_path / "out", "--cuts", tmp_path / "no.jsonl"
    )
    message = fails(capsys, "shards", "make", tmp_path / "out", "--kaldi", tmp_path)
    assert f"'{tmp_path}'" in message
    assert "wav.scp" in message
    assert "does not exist" in fails(capsys, "shards", "index", tmp_path / "no.tar")
    assert list(tmp_path.iterdir()) == []


def test_options_without_effect_are_rejected(tmp_path, capsys):
    write_checkpoint(tmp_path / "checkpoint-1", {"projector.a": torch.ones(3)})
    (tmp_path / "a.pt").touch()
    out = ("--output", tmp_path / "out")
    for verb in ("merge-lora", "export"):
        assert "are both weights files" in fails(
            capsys, verb, tmp_path / "a.pt", "--weights", tmp_path / "b.pt", *out
        )
    for option in (["--dtype", "float32"], ["--no-check"], ["--max-shard-size", "5GB"]):
        assert f"{option[0]} has no effect with --adapter-only" in fails(
            capsys, "merge-lora", tmp_path, "--adapter-only", *option, *out
        )
    assert "--private has no effect without --push-to-hub" in fails(
        capsys, "export", tmp_path, "--private", *out
    )
    average = ("average", tmp_path, "--iter", 1, "--avg", 1, "--use-averaged-model")
    assert "--lora product has no effect with --use-averaged-model" in fails(
        capsys, *average, "--lora", "product"
    )
    assert "is one file" in fails(capsys, "consolidate", tmp_path, "--max-shard-size", "5GB")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "checkpoint-1"]


def test_unwritable_output_is_one_message(tmp_path, capsys):
    write_checkpoint(tmp_path / "checkpoint-1", {"projector.a": torch.ones(3)})
    (tmp_path / "file").touch()
    for output in (
        tmp_path / "file" / "folder",
        "/sys/folder",
        "/sys/w.pt",
    ):  # /sys is read-only even for root
        error = fails(capsys, "consolidate", tmp_path, "--output", output)
        assert f"{str(output)!r} cannot be written (" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "file"]


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.EACCES, "its permissions"), (errno.EROFS, "read-only"), (errno.ENOTDIR, "is a file")],
)
def test_operating_system_error_is_one_message(monkeypatch, capsys, number, message):
    from asrllm.commands import transcribe

    def refused(arguments):
        raise OSError(number, os.strerror(number), "out/x.txt")

    monkeypatch.setattr(transcribe, "run", refused)
    error = fails(capsys, "transcribe", "x", "a.wav")
    assert "'out/x.txt' cannot be read or written" in error
    assert message in error


def test_mistakes_in_consolidate_are_one_message(tmp_path, capsys):
    for step in (2, 10):
        write_checkpoint(tmp_path / f"checkpoint-{step}", {"projector.a": torch.ones(3)}, step=step)
    for tag in ("checkpoint-5", tmp_path / "checkpoint-2", "/checkpoint-2"):
        error = fails(capsys, "consolidate", tmp_path, "--tag", tag)
        assert repr(str(tag)) in error
        assert "checkpoint-2, checkpoint-10" in error
    for size in ("nonsense", "0"):
        for output in ("x", "x.pt"):
            options = ("--max-shard-size", size, "--output", tmp_path / output)
            assert "max_shard_size=" in fails(capsys, "consolidate", tmp_path, *options)
    error = fails(capsys, "consolidate", tmp_path, "--output", tmp_path / "x.pth")
    assert "x.pth' has an unsupported suffix" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]
    output = tmp_path / "exp-0.5"
    does(capsys, "consolidate", tmp_path, "--tag", "checkpoint-2/", "--output", output)
    assert (tmp_path / "exp-0.5" / "model.safetensors").is_file()


def test_shards_make_and_index(world, tmp_path, capsys):
    kaldi = world.root / "kaldi" / "test"
    printed = does(capsys, "shards", "make", tmp_path / "out", "--kaldi", kaldi, "--lang", "en")
    assert "9 utterances" in printed
    before = (tmp_path / "out" / "index.bin").read_bytes()
    (tmp_path / "out" / "index.json").unlink()
    assert main(["shards", "index", str(tmp_path / "out" / "shard-000000.tar")]) == 0
    assert (tmp_path / "out" / "index.bin").read_bytes() == before


def test_full_disk_is_one_message(monkeypatch, capsys):

    from asrllm.commands import transcribe

    def full(arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "out.txt")

    monkeypatch.setattr(transcribe, "run", full)
    assert main(["transcribe", "x", "a.wav"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("asrllm transcribe: no space is left on the disk (")
    assert "'out.txt'" in error
    assert error.count("\n") == 1
