"""`asrllm init`: the files that it writes, and what it rejects."""

import gzip
import io
import json
import shlex
import shutil
import sys

import pytest
import soundfile
import yaml

from asrllm.data.sources.detect import detect_source
from asrllm.errors import UserError
from asrllm.testing import kaldi_directory, tone, tone_sentences
from tests.processes import assert_done, run_script
from tests.test_cli import does, fails

FILES = ["experiment.yaml", "prompts.txt", "train_data.yaml"]
# settings for the tiny models and the short recordings of the tests
SMALL = (
    "model.llm.lora.r=4",
    "model.projector_hidden_size=32",
    "data.sampler.max_tokens=150",
    "data.filter.min_duration=0.1",
    "data.filter.max_chars_per_second=100",
    "data.num_workers=0",
    "trainer.precision=fp32",
    "trainer.num_steps=2",
    "trainer.num_epochs=null",
    "trainer.warmup_steps=1",
    "trainer.valid_decode=0",
    "trainer.sinks=[]",
)


def flags(world, data=None, **changed):
    """Return the flags of a good command line, of which None removes one."""
    values = {
        "data": data or world.root / "kaldi" / "train",
        "lang": "en",
        "encoder": world.whisper,
        "llm": world.llm,
        "gpus": 1,
    }
    values |= changed
    words = []
    for name, value in values.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", value]
    return words


def printed_commands(output):
    """Return the words of the commands that `asrllm init` prints."""
    lines = output.splitlines()
    return [shlex.split(line) for line in lines if line.startswith(("asrllm ", "torchrun "))]


@pytest.fixture
def terminal(monkeypatch):
    """Return a function that sets the answers to the questions at a terminal."""

    def answer(*answers):
        stream = io.StringIO("".join(f"{text}\n" for text in answers))
        monkeypatch.setattr(stream, "isatty", lambda: True)
        monkeypatch.setattr(sys, "stdin", stream)

    return answer


# --- files and commands ---


@pytest.mark.slow
def test_printed_commands_make_shards_plan_and_train(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kaldi = world.root / "kaldi"
    given = flags(world, valid_data=kaldi / "valid")
    commands = printed_commands(does(capsys, "init", "my run", *given))
    folder = tmp_path / "my run"
    assert sorted(path.name for path in folder.iterdir()) == [*FILES, "valid_data.yaml"]
    make_train, make_valid, plan, train = commands
    does(capsys, *make_train[1:])
    does(capsys, *make_valid[1:])
    assert "weights" in does(capsys, *plan[1:], *SMALL)
    assert train[:2] == ["asrllm", "train"]
    assert_done(run_script("train", *train[2:], *SMALL))
    config = yaml.safe_load((folder / "exp" / "config.yaml").read_text())
    assert config["model"]["llm"]["pretrained_model"] == str(world.llm)
    assert config["prompt_file"] == str(folder / "prompts.txt")
    assert (folder / "exp" / "checkpoint-2").is_dir()


def test_relative_paths_work_from_other_directories(world, tmp_path, capsys, monkeypatch):
    shutil.copytree(world.root / "kaldi" / "valid", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    commands = printed_commands(does(capsys, "init", "exp", *flags(world, data="data")))
    assert str(tmp_path / "data") in commands[0]
    config = yaml.safe_load((tmp_path / "exp" / "experiment.yaml").read_text())
    assert config["exp_dir"] == str(tmp_path / "exp" / "exp")
    assert config["data"]["train_data_config"] == str(tmp_path / "exp" / "train_data.yaml")


def test_without_validation_data_no_validation_is_configured(world, tmp_path, capsys):
    commands = printed_commands(does(capsys, "init", tmp_path / "exp", *flags(world)))
    assert [command[1] for command in commands] == ["shards", "plan", "train"]
    assert sorted(path.name for path in (tmp_path / "exp").iterdir()) == FILES
    config = yaml.safe_load((tmp_path / "exp" / "experiment.yaml").read_text())
    assert config["data"]["valid_data_config"] is None


def test_several_gpus_are_started_by_torchrun(world, tmp_path, capsys):
    commands = printed_commands(does(capsys, "init", tmp_path / "exp", *flags(world, gpus=8)))
    assert commands[-1][:5] == ["torchrun", "--nproc_per_node=8", "-m", "asrllm", "train"]
    assert "+gpus=8" in commands[-2]


def test_zipformer_is_recognized(world, tmp_path, capsys):
    does(capsys, "init", tmp_path / "exp", *flags(world, encoder=world.zipformer))
    config = yaml.safe_load((tmp_path / "exp" / "experiment.yaml").read_text())
    assert config["model"]["audio_encoder"]["model_type"] == "zipformer"


def test_special_characters_of_paths_are_kept(world, tmp_path, capsys):
    name = 'a: "b" ${c} #'
    does(capsys, "init", tmp_path / name, *flags(world, lang="no"))
    (entry,) = yaml.safe_load((tmp_path / name / "train_data.yaml").read_text())
    assert entry["lang"] == "no"
    assert entry["shards"] == str(tmp_path / name / "shards" / "train")
    config = ["--config-dir", tmp_path / name, "--config-name", "experiment"]
    printed = does(capsys, "train", *config, "--cfg", "job", "--resolve")
    assert yaml.safe_load(printed)["prompt_file"] == str(tmp_path / name / "prompts.txt")


# --- questions ---


def test_missing_flags_are_asked_for_at_a_terminal(world, tmp_path, capsys, terminal):
    terminal(world.root / "kaldi" / "train", "", "en", world.whisper, world.llm, 2)
    commands = printed_commands(does(capsys, "init", tmp_path / "exp"))
    assert commands[-1][1] == "--nproc_per_node=2"


def test_given_flags_are_not_asked_for(world, tmp_path, capsys, terminal):
    terminal("", "de")  # --valid-data and --lang
    does(capsys, "init", tmp_path / "exp", *flags(world, lang=None))
    (entry,) = yaml.safe_load((tmp_path / "exp" / "train_data.yaml").read_text())
    assert entry["lang"] == "de"


@pytest.mark.parametrize(
    ("answers", "named"), [(["", "two"], "'two'"), ([""], "--gpus N"), (["", ""], "--gpus N")]
)
def test_bad_answers_are_rejected(world, tmp_path, capsys, terminal, answers, named):
    terminal(*answers)
    assert named in fails(capsys, "init", tmp_path / "exp", *flags(world, gpus=None))
    assert list(tmp_path.iterdir()) == []


def test_missing_flags_without_a_terminal_are_named_in_one_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    error = fails(capsys, "init", tmp_path / "exp", "--lang", "en")
    for option in ("--data", "--encoder", "--llm", "--gpus"):
        assert option in error
    assert "--lang" not in error
    assert "--valid-data" not in error
    assert list(tmp_path.iterdir()) == []


# --- mistakes ---


def nemo_manifest(folder, rows):
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_first_missing_audio_file_of_a_manifest_is_named(world, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", tone("one", 0.5), 16000)
    rows = [{"audio_filepath": f"{name}.wav", "text": "one"} for name in "abc"]
    manifest = nemo_manifest(tmp_path, rows)
    error = fails(capsys, "init", tmp_path / "exp", *flags(world, data=manifest))
    assert repr(str(tmp_path / "b.wav")) in error
    assert "c.wav" not in error
    assert not (tmp_path / "exp").exists()


@pytest.mark.parametrize("option", ["data", "valid_data"])
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda path: None, "{path}"),
        (lambda path: path.mkdir(), "{path}"),
        (lambda path: path.write_text(""), "{path}"),
        (lambda path: path.write_text("a.wav,one\n"), "metadata.csv"),
        (lambda path: path.write_text('{"a": 1}\n'), "{path}"),
        (lambda path: path.write_text('{"audio_filepath": "no.wav", "text": "one"}'), "no.wav"),
    ],
)
def test_data_that_cannot_be_read_is_named(world, tmp_path, capsys, option, make, named):
    path = tmp_path / "source"
    make(path)
    error = fails(capsys, "init", tmp_path / "exp", *flags(world, **{option: path}))
    assert named.format(path=path) in error
    assert not (tmp_path / "exp").exists()


def test_unsuitable_models_are_named(world, tmp_path, capsys):
    absent = tmp_path / "none" / "model"
    empty = tmp_path / "empty"
    empty.mkdir()
    for changed, named in (
        ({"encoder": absent}, f"--encoder {str(absent)!r}"),
        ({"llm": absent}, f"--llm {str(absent)!r}"),
        ({"encoder": empty}, empty),
        ({"llm": empty}, empty),
        ({"encoder": world.llm}, "qwen2"),
        ({"llm": world.whisper}, world.whisper),
    ):
        error = fails(capsys, "init", tmp_path / "exp", *flags(world, **changed))
        assert str(named) in error
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_directory_that_is_not_empty_is_rejected(world, tmp_path, capsys):
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "notes.txt").write_text("mine")
    (tmp_path / "file").touch()
    for name in ("exp", "file", "file/below"):
        assert repr(str(tmp_path / name)) in fails(capsys, "init", tmp_path / name, *flags(world))
    assert [path.name for path in (tmp_path / "exp").iterdir()] == ["notes.txt"]


def test_failed_write_leaves_nothing_behind(world, tmp_path, capsys, monkeypatch):
    from asrllm.commands import init

    class Files(dict):
        def items(self):
            yield "experiment.yaml", "a: 1\n"
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(init.Experiment, "files", lambda self: Files())
    assert "No space left" in fails(capsys, "init", tmp_path / "exp", *flags(world))
    assert list(tmp_path.iterdir()) == []


# --- kinds of data ---


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"id": "a", "type": "MonoCut", "supervisions": [], "recording": {}}, "cuts"),
        ({"audio_filepath": "a.wav", "duration": 1, "text": "one"}, "nemo"),
        ({"key": "a", "wav": "a.wav", "txt": "one"}, "wenet"),
        ({"key": "a", "source": "a.wav", "target": "one"}, "slam"),
        ({"messages": [], "audios": []}, "swift"),
        ({"conversations": [], "audio": "a.wav"}, "swift"),
        ({"query": "<audio>", "response": "one", "audios": []}, "swift"),
    ],
)
def test_manifests_are_told_apart_by_their_fields(tmp_path, row, kind):
    path = tmp_path / "data"
    path.write_text(json.dumps(row) + "\n")
    assert detect_source(path) == kind
    path.write_text(json.dumps([row, row], indent=1))
    assert detect_source(path) == kind
    path.write_bytes(gzip.compress(json.dumps(row).encode()))
    assert detect_source(path) == kind


def test_list_of_tars_is_wenets(tmp_path):
    (tmp_path / "data.list").write_text("shards/a.tar\nshards/b.tar\n")
    assert detect_source(tmp_path / "data.list") == "wenet"


def test_directories_are_told_apart(tmp_path):
    assert detect_source(kaldi_directory(tmp_path / "kaldi", tone_sentences(1))) == "kaldi"
    (tmp_path / "folder").mkdir()
    assert detect_source(tmp_path / "folder") == "folder"


def test_first_row_that_can_be_parsed_decides(tmp_path):
    (tmp_path / "data").write_text('{"audio_filepath": \n{"audio_filepath": "a", "text": "b"}\n')
    assert detect_source(tmp_path / "data") == "nemo"
    (tmp_path / "data").write_text("{broken\n")
    with pytest.raises(UserError, match="data"):
        detect_source(tmp_path / "data")
