"""Commands in this process, as `asrllm VERB ...` runs them: exit status and what stands on standard error."""

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
    """The sentence of a user's mistake."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"asrllm {argv[0]}: ")
    assert error.count("\n") == 1
    return error


def does(capsys, *argv):
    """What a command prints, run in this process."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert len(capsys.readouterr().out) > 150


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
            "data.filter.max_duration=100.0: the audio encoder takes 0.01 to 30.01 s",
        ),
        ({"data__filter__min_duration": 0}, "data.filter.min_duration=0.0"),
        ({"prompt_file": "AUDIO_TOKEN"}, "holds the audio token"),
    ],
)
def test_a_mistake_in_training_ends_before_anything_is_written(
    world, tmp_path, capsys, change, message
):
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
def test_two_runs_in_one_directory_are_refused(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(resume, "SECONDS_TO_DIE", 0.1)
    (tmp_path / "exp").mkdir()
    with FileLock(tmp_path / "exp" / ".training.lock"):
        assert "another process is training in exp_dir" in fails(
            capsys, "train", *world.overrides(tmp_path / "exp")
        )
    (tmp_path / "file").touch()
    assert "is a file: give a directory" in fails(
        capsys, "train", *world.overrides(tmp_path / "file")
    )


@pytest.mark.slow
def test_an_empty_manifest_ends_before_anything_is_written(world, tmp_path, capsys):
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
def test_mistakes_in_evaluation(world, tmp_path, capsys):
    test = f"data.test_data_config={world.root / 'test.yaml'}"
    assert "does not exist" in fails(capsys, "evaluate", f"exp_dir={tmp_path / 'no'}", test)
    exp = f"exp_dir={tmp_path}"
    assert "has no pretrained.pt" in fails(capsys, "evaluate", exp, test)
    assert "no complete checkpoint for iter=9" in fails(
        capsys, "evaluate", exp, test, "checkpoint.model.iter=9", "checkpoint.model.avg=1"
    )
    assert "checkpoint.model.avg" in fails(capsys, "evaluate", exp, test, "checkpoint.model.iter=9")
    assert "checkpoint.model.iter" in fails(capsys, "evaluate", exp, test, "checkpoint.model.avg=9")
    assert "does not exist, nor is it in" in fails(
        capsys, "evaluate", exp, test, "checkpoint.model.filename=x.pt"
    )
    assert "did you mean 'decoding_method'" in fails(
        capsys, "evaluate", exp, test, "decoding_methods=x"
    )
    assert "normalizer='x' is unknown" in fails(capsys, "evaluate", exp, test, "normalizer=x")
    assert list(tmp_path.iterdir()) == []


def test_mistakes_of_the_other_verbs(world, tmp_path, capsys):
    assert "holds no complete checkpoint" in fails(capsys, "consolidate", tmp_path)
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
        assert "does not exist: give " in fails(capsys, verb, tmp_path / "no" / "x.pt", *options)
    assert "does not exist" in fails(
        capsys, "shards", "make", tmp_path / "out", "--cuts", tmp_path / "no.jsonl"
    )
    message = fails(capsys, "shards", "make", tmp_path / "out", "--kaldi", tmp_path)
    assert f"'{tmp_path}'" in message
    assert "wav.scp" in message
    assert "does not exist" in fails(capsys, "shards", "index", tmp_path / "no.tar")
    assert list(tmp_path.iterdir()) == []


def test_options_that_would_not_be_read_are_refused(tmp_path, capsys):
    write_checkpoint(tmp_path / "checkpoint-1", {"projector.a": torch.ones(3)})
    (tmp_path / "a.pt").touch()
    out = ("--output", tmp_path / "out")
    for verb in ("merge-lora", "export"):
        assert "is a weights file too" in fails(
            capsys, verb, tmp_path / "a.pt", "--weights", tmp_path / "b.pt", *out
        )
    for option in (["--dtype", "float32"], ["--no-check"], ["--max-shard-size", "5GB"]):
        assert f"{option[0]} says how" in fails(
            capsys, "merge-lora", tmp_path, "--adapter-only", *option, *out
        )
    assert "--private is of the repository" in fails(capsys, "export", tmp_path, "--private", *out)
    average = ("average", tmp_path, "--iter", 1, "--avg", 1, "--use-averaged-model")
    assert "running averages are of the factors" in fails(capsys, *average, "--lora", "product")
    assert "is one file" in fails(capsys, "consolidate", tmp_path, "--max-shard-size", "5GB")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "checkpoint-1"]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    write_checkpoint(tmp_path / "checkpoint-1", {"projector.a": torch.ones(3)})
    (tmp_path / "file").touch()
    for output in (
        tmp_path / "file" / "folder",
        "/sys/folder",
        "/sys/w.pt",
    ):  # nobody may write in /sys, root neither
        error = fails(capsys, "consolidate", tmp_path, "--output", output)
        assert f"{str(output)!r} cannot be written (" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "file"]


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.EACCES, "its permissions"), (errno.EROFS, "read only"), (errno.ENOTDIR, "is a file")],
)
def test_what_the_system_refuses_is_one_sentence_in_every_verb(monkeypatch, capsys, number, said):
    from asrllm.commands import transcribe

    def refused(arguments):
        raise OSError(number, os.strerror(number), "out/x.txt")

    monkeypatch.setattr(transcribe, "run", refused)
    error = fails(capsys, "transcribe", "x", "a.wav")
    assert "'out/x.txt' cannot be read or written" in error
    assert said in error


def test_mistakes_in_consolidating(tmp_path, capsys):
    for step in (2, 10):
        write_checkpoint(tmp_path / f"checkpoint-{step}", {"projector.a": torch.ones(3)}, step=step)
    for tag in ("checkpoint-5", tmp_path / "checkpoint-2", "/checkpoint-2"):
        assert "(there are: checkpoint-2, checkpoint-10)" in fails(
            capsys, "consolidate", tmp_path, "--tag", tag
        )
    for size in ("nonsense", "0"):
        for output in ("x", "x.pt"):
            options = ("--max-shard-size", size, "--output", tmp_path / output)
            assert "is no size" in fails(capsys, "consolidate", tmp_path, *options)
    error = fails(capsys, "consolidate", tmp_path, "--output", tmp_path / "x.pth")
    assert "give a file that ends in .pt, .bin, .safetensors, or a directory's name" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]
    assert (
        main(
            [
                "consolidate",
                str(tmp_path),
                "--tag",
                "checkpoint-2/",
                "--output",
                str(tmp_path / "exp-0.5"),
            ]
        )
        == 0
    )
    assert (tmp_path / "exp-0.5" / "model.safetensors").is_file()


def test_shards_are_made_and_indexed_from_the_command_line(world, tmp_path, capsys):
    assert (
        main(
            [
                "shards",
                "make",
                str(tmp_path / "out"),
                "--kaldi",
                str(world.root / "kaldi" / "test"),
                "--lang",
                "en",
            ]
        )
        == 0
    )
    assert "9 utterances" in capsys.readouterr().out
    before = (tmp_path / "out" / "index.bin").read_bytes()
    (tmp_path / "out" / "index.json").unlink()
    assert main(["shards", "index", str(tmp_path / "out" / "shard-000000.tar")]) == 0
    assert (tmp_path / "out" / "index.bin").read_bytes() == before


def test_a_full_disk_is_one_sentence(monkeypatch, capsys):

    from asrllm.commands import transcribe

    def full(arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "out.txt")

    monkeypatch.setattr(transcribe, "run", full)
    assert main(["transcribe", "x", "a.wav"]) == 2
    assert capsys.readouterr().err == (
        "asrllm transcribe: no space is left on the disk ([Errno 28] No space left on device: 'out.txt'): make room, and give the same "
        "command again\n"
    )
