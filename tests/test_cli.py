"""Commands that run in this process: exit status and standard error."""

import errno
import gzip
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from asrllm.atomic import PATH_FIXES
from asrllm.commands import dispatch
from asrllm.commands.arguments.verbs import VERBS
from asrllm.commands.dispatch import explain, main, parse
from asrllm.siblings import Siblings
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


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EROFS, errno.ENOTDIR])
def test_operating_system_error_names_its_path(number):
    error = OSError(number, os.strerror(number), "/proc/run")
    assert "'/proc/run'" in explain(error)
    assert os.strerror(number) in explain(error)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
def test_rejected_processes_and_memory_are_explained(number):
    assert "num_workers" in explain(OSError(number, os.strerror(number)))


def test_too_many_workers_are_rejected(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["shards", "make", "--wav", "a", "--output", "b", "--workers", "100000"])
    assert stopped.value.code == 2
    assert "100000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "word", "ours"),
    [
        ("train", "--learning-rate=1e-3", "trainer.lr"),
        ("plan", "--max-duration", "data.sampler.max_duration"),
        ("train", "--exp-dir", "exp_dir=VALUE"),
        ("train", "--model", "model.KEY=VALUE"),
        ("evaluate", "--beam-size", "num_beams"),
    ],
)
def test_option_of_another_framework_is_answered_with_the_key(verb, word, ours, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([verb, word])
    assert stopped.value.code == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert word in last_line
    assert ours in last_line


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
def test_an_empty_value_is_rejected(verb, arguments, tmp_path, capsys, monkeypatch):
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
    ("change", "named"),
    [
        ({"trainer__lrr": 1}, ["'trainer.lrr'", "'trainer.lr'"]),
        ({"prompt_file": "EMPTY"}, ["prompt_file='{tmp}/empty.txt'"]),
        ({"trainer__deepspeed_config": "zero9.json"}, ["trainer.deepspeed_config='zero9.json'"]),
        (
            {"trainer__deepspeed_config": "MISNAMED"},
            ["{tmp}/my_zero2.json", "stage 2", "zero_optimization.stage is 0"],
        ),
        ({"data__train_data_config": "EMPTY"}, ["data.train_data_config '{tmp}/empty.txt'"]),
        ({"data__train_data_config": "no.yaml"}, ["data.train_data_config 'no.yaml'"]),
        (
            {"model__llm__pretrained_model": "WITHOUT_TOKENIZER"},
            ["model.llm.pretrained_model='{tmp}/llm'", "tokenizer.json"],
        ),
        (
            {"model__audio_encoder__pretrained_model": "LLM"},
            ["'{llm}'", "'qwen2'", "model.audio_encoder.model_type"],
        ),
        ({"model__llm__model_type": "llama"}, ["model.llm.model_type='llama'", "'qwen2'"]),
        (
            {"model__llm__model_type": "WHISPER"},
            ["model.llm.model_type='{tmp}/whisper'", "'{llm}'", "'qwen2'"],
        ),
        ({"data__filter__max_duration": 100}, ["data.filter.max_duration=100.0", "0.01", "30.01"]),
        ({"data__filter__min_duration": 0}, ["data.filter.min_duration=0.0", "0.01", "30.01"]),
        ({"prompt_file": "AUDIO_TOKEN"}, ["'Listen: <|AUDIO|>'", "'<|AUDIO|>'"]),
    ],
)
def test_mistake_in_training_exits_before_writing(world, tmp_path, capsys, change, named):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "audio_token.txt").write_text("Listen: <|AUDIO|>")
    (tmp_path / "my_zero2.json").write_text('{"zero_optimization": {}}')
    llm = tmp_path / "llm"
    llm.mkdir()
    (llm / "config.json").write_text((world.llm / "config.json").read_text())
    (tmp_path / "whisper").mkdir()
    (tmp_path / "whisper" / "config.json").write_text('{"model_type": "whisper"}')
    places = {
        "WHISPER": tmp_path / "whisper",
        "AUDIO_TOKEN": tmp_path / "audio_token.txt",
        "EMPTY": tmp_path / "empty.txt",
        "MISNAMED": tmp_path / "my_zero2.json",
        "WITHOUT_TOKENIZER": llm,
        "LLM": world.llm,
    }
    change = {key: places.get(value, value) for key, value in change.items()}
    error = fails(capsys, "train", *world.overrides(tmp_path / "exp", **change))
    for name in named:
        assert name.format(tmp=tmp_path, llm=world.llm) in error
    assert not (tmp_path / "exp").exists()


@pytest.mark.slow
def test_second_run_in_one_directory_is_rejected(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(resume, "LOCK_TIMEOUT", 0.1)
    (tmp_path / "exp").mkdir()
    with FileLock(tmp_path / "exp" / ".training.lock"):
        error = fails(capsys, "train", *world.overrides(tmp_path / "exp"))
    assert f"exp_dir={str(tmp_path / 'exp')!r}" in error
    assert [path.name for path in (tmp_path / "exp").iterdir()] == [".training.lock"]
    (tmp_path / "file").touch()
    error = fails(capsys, "train", *world.overrides(tmp_path / "file"))
    assert f"exp_dir={str(tmp_path / 'file')!r}" in error
    assert "'/proc/run'" in fails(capsys, "train", *world.overrides(Path("/proc/run")))


@pytest.mark.slow
def test_empty_manifest_exits_before_writing(world, tmp_path, capsys):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    for name in ("empty.jsonl", "empty.jsonl.gz"):
        data = tmp_path / "train.yaml"
        data.write_text(f"- {{manifest: {tmp_path / name}}}\n")
        overrides = world.overrides(tmp_path / "exp", data__train_data_config=data)
        assert repr(str(tmp_path / name)) in fails(capsys, "train", *overrides)
        assert not (tmp_path / "exp").exists()


@pytest.mark.slow
def test_mistakes_in_evaluation_exit_before_writing(world, tmp_path, capsys):
    test = f"data.test_data_config={world.root / 'test.yaml'}"
    absent = tmp_path / "no"
    assert f"exp_dir={str(absent)!r}" in fails(capsys, "evaluate", f"exp_dir={absent}", test)
    exp = f"exp_dir={tmp_path}"
    choice = ("checkpoint.model.iter=9", "checkpoint.model.avg=1")
    lost = f"data.test_data_config={tmp_path / 'lost.yaml'}"
    assert repr(str(tmp_path / "lost.yaml")) in fails(capsys, "evaluate", exp, lost, *choice)
    error = fails(capsys, "evaluate", exp, test)
    assert repr(str(tmp_path)) in error
    assert "pretrained.pt" in error
    error = fails(capsys, "evaluate", exp, test, *choice)
    assert repr(str(tmp_path)) in error
    assert "iter=9" in error
    assert "checkpoint.model.avg" in fails(capsys, "evaluate", exp, test, "checkpoint.model.iter=9")
    assert "checkpoint.model.iter" in fails(capsys, "evaluate", exp, test, "checkpoint.model.avg=9")
    both = fails(
        capsys, "evaluate", exp, test, "checkpoint.model.iter=8", "checkpoint.model.epoch=1"
    )
    assert "checkpoint.model.iter=8" in both
    assert "checkpoint.model.epoch=1" in both
    assert "checkpoint.model.filename='x.pt'" in fails(
        capsys, "evaluate", exp, test, "checkpoint.model.filename=x.pt"
    )
    assert "'decoding_method'" in fails(capsys, "evaluate", exp, test, "decoding_methods=x")
    assert "normalizer='x'" in fails(capsys, "evaluate", exp, test, "normalizer=x")
    assert list(tmp_path.iterdir()) == []


def test_mistakes_in_other_verbs_exit_before_writing(world, tmp_path, capsys):
    assert f"exp_dir={str(tmp_path)!r}" in fails(capsys, "consolidate", tmp_path)
    error = fails(capsys, "average", tmp_path, "--iter", 3, "--avg", 2)
    assert f"exp_dir={str(tmp_path)!r}" in error
    assert "iter=3" in error
    for verb, *arguments in (
        ("export", tmp_path, "--output", tmp_path / "out"),
        ("transcribe", tmp_path, tmp_path / "no.wav"),
    ):
        error = fails(capsys, verb, *arguments)
        assert repr(str(tmp_path)) in error
        assert "config.json" in error
    for verb, *options in (
        ("consolidate",),
        ("average", "--iter", 3, "--avg", 2),
        ("export", "--output", tmp_path / "out"),
    ):
        absent = tmp_path / "no" / "x.pt"
        assert repr(str(absent)) in fails(capsys, verb, absent, *options)
    cuts = tmp_path / "no.jsonl"
    assert repr(str(cuts)) in fails(capsys, "shards", "make", tmp_path / "out", "--cuts", cuts)
    message = fails(capsys, "shards", "make", tmp_path / "out", "--kaldi", tmp_path)
    assert f"'{tmp_path}'" in message
    assert "wav.scp" in message
    tar = tmp_path / "no.tar"
    assert repr(str(tar)) in fails(capsys, "shards", "index", tar)
    assert list(tmp_path.iterdir()) == []


def test_options_without_effect_are_rejected(tmp_path, capsys):
    write_checkpoint(tmp_path / "checkpoint-1", {"projector.a": torch.ones(3)})
    (tmp_path / "a.pt").touch()
    out = ("--output", tmp_path / "out")
    for verb in ("merge-lora", "export"):
        files = (tmp_path / "a.pt", "--weights", tmp_path / "b.pt")
        error = fails(capsys, verb, *files, *out)
        assert f"--weights {str(tmp_path / 'b.pt')!r}" in error
        assert repr(str(tmp_path / "a.pt")) in error
    for option in (["--dtype", "float32"], ["--no-check"], ["--max-shard-size", "5GB"]):
        error = fails(capsys, "merge-lora", tmp_path, "--adapter-only", *option, *out)
        assert option[0] in error
        assert "--adapter-only" in error
    error = fails(capsys, "export", tmp_path, "--private", *out)
    assert "--private" in error
    assert "--push-to-hub" in error
    average = ("average", tmp_path, "--iter", 1, "--avg", 1, "--use-averaged-model")
    error = fails(capsys, *average, "--lora", "product")
    assert "--lora product" in error
    assert "--use-averaged-model" in error
    error = fails(capsys, "consolidate", tmp_path, "--max-shard-size", "5GB")
    assert "--max-shard-size=5GB" in error
    assert repr(str(tmp_path / "checkpoint-1.pt")) in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "checkpoint-1"]


def test_unwritable_output_exits_before_writing(tmp_path, capsys):
    write_checkpoint(tmp_path / "checkpoint-1", {"projector.a": torch.ones(3)})
    (tmp_path / "file").touch()
    for output in (
        tmp_path / "file" / "folder",
        "/sys/folder",
        "/sys/w.pt",
    ):  # /sys is read-only even for root
        error = fails(capsys, "consolidate", tmp_path, "--output", output)
        assert repr(str(output)) in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "file"]


@pytest.mark.parametrize("number", PATH_FIXES)
def test_operating_system_error_is_reported_with_its_path_and_fix(monkeypatch, capsys, number):
    from asrllm.commands import transcribe

    def rejected(arguments):
        raise OSError(number, os.strerror(number), "out/x.txt")

    monkeypatch.setattr(transcribe, "run", rejected)
    error = fails(capsys, "transcribe", "x", "a.wav")
    assert "'out/x.txt'" in error
    assert os.strerror(number) in error
    assert PATH_FIXES[number] in error


def test_mistakes_in_consolidate_exit_before_writing(tmp_path, capsys):
    for step in (2, 10):
        write_checkpoint(tmp_path / f"checkpoint-{step}", {"projector.a": torch.ones(3)}, step=step)
    for tag in ("checkpoint-5", tmp_path / "checkpoint-2", "/checkpoint-2"):
        error = fails(capsys, "consolidate", tmp_path, "--tag", tag)
        assert repr(str(tag)) in error
        assert "checkpoint-2, checkpoint-10" in error
    for size in ("nonsense", "0"):
        for output in ("x", "x.pt"):
            options = ("--max-shard-size", size, "--output", tmp_path / output)
            assert f"max_shard_size={size!r}" in fails(capsys, "consolidate", tmp_path, *options)
    error = fails(capsys, "consolidate", tmp_path, "--output", tmp_path / "x.pth")
    assert repr(str(tmp_path / "x.pth")) in error
    assert ".safetensors" in error
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


def test_full_disk_exits_with_the_file(monkeypatch, capsys):
    from asrllm.commands import transcribe

    def full(arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out.txt")

    monkeypatch.setattr(transcribe, "run", full)
    error = fails(capsys, "transcribe", "x", "a.wav")
    assert os.strerror(errno.ENOSPC) in error
    assert "'out.txt'" in error


@pytest.mark.parametrize("statuses", [{}, {1: 0}, {1: 130}])
def test_rank_says_that_it_was_interrupted_unless_another_one_did(monkeypatch, capsys, statuses):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(dispatch, "load_module", lambda name: interrupted)
    ranks = Siblings()
    ranks.statuses.update(statuses)
    assert dispatch.run_verb(parse(["plan", "exp"]), ranks) == 130
    assert capsys.readouterr().err.count("interrupted") == (130 not in statuses.values())


@pytest.mark.parametrize("argument", ["--local_rank=1", "--local-rank=1"])
def test_rank_that_a_launcher_appends_is_dropped(argument, capsys):
    assert main(["train", argument, "trainer.nonsense=1"]) == 2
    dropped = capsys.readouterr().err
    assert main(["train", "trainer.nonsense=1"]) == 2
    assert dropped == capsys.readouterr().err
    assert "nonsense" in dropped
