"""Runs and exported directories whose base models moved after training."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from asrllm import AutoModel
from asrllm.checkpoints.llm_files import LlmFiles
from asrllm.checkpoints.merge import merge_lora, save_adapter
from asrllm.commands.dispatch import main
from asrllm.errors import UserError
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.base_models import move_base_models
from asrllm.testing import tiny_llm, tiny_whisper
from tests.checkpoints.test_merge import run_of
from tests.models.asr_llm.test_modeling import make_model
from tests.models.asr_llm.test_serialization import logits
from tests.test_cli import does, fails


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Write models of the same shapes with other weights."""
    root = tmp_path_factory.mktemp("others")
    torch.manual_seed(7)
    tiny_whisper(root / "whisper")
    tiny_llm(root / "llm")
    for name in ("whisper", "llm"):
        perturb(root / name / "model.safetensors")
    return root


def perturb(file):
    from safetensors.torch import load_file, save_file

    state = {name: tensor + 0.01 for name, tensor in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})


@pytest.fixture
def moved(world, tmp_path):
    """Return a run whose base models moved from tmp_path/old to tmp_path/new."""
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(world.whisper, old / "whisper")
    shutil.copytree(world.llm, old / "llm")
    places = SimpleNamespace(
        root=old, whisper=old / "whisper", zipformer=world.zipformer, llm=old / "llm"
    )
    model = make_model(places)
    exp = run_of(model, tmp_path / "exp")
    old.rename(new)
    paths = {"audio_encoder": str(new / "whisper"), "llm": str(new / "llm")}
    return SimpleNamespace(
        exp=exp, old=old, new=new, paths=paths, model=model, words=words_of(paths)
    )


def words_of(paths):
    return [f"model.{part}.pretrained_model={path}" for part, path in paths.items()]


def weights_of(folder, **options):
    return AutoModel.from_pretrained(folder, **options).weights()


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_base_models_are_read_from_their_present_paths(moved):
    loaded = AutoModel.from_pretrained(moved.exp, base_models=moved.paths)
    assert_same_weights(loaded.weights(), moved.model.weights())
    assert torch.equal(logits(loaded), logits(moved.model))
    assert {part: base["path"] for part, base in loaded.config.base_models.items()} == moved.paths


def test_one_part_may_have_moved(moved):
    moved.old.mkdir()
    (moved.new / "whisper").rename(moved.old / "whisper")
    loaded = AutoModel.from_pretrained(moved.exp, base_models={"llm": moved.paths["llm"]})
    assert_same_weights(loaded.weights(), moved.model.weights())
    with pytest.raises(UserError) as error:
        AutoModel.from_pretrained(moved.exp)
    assert "model.llm.pretrained_model=" in str(error.value)
    assert "model.audio_encoder.pretrained_model=" not in str(error.value)


def test_a_relative_path_is_stored_as_an_absolute_one(moved, monkeypatch):
    monkeypatch.chdir(moved.new)
    loaded = AutoModel.from_pretrained(
        moved.exp, base_models={"audio_encoder": "whisper", "llm": "./llm"}
    )
    assert {part: base["path"] for part, base in loaded.config.base_models.items()} == moved.paths


@pytest.mark.parametrize("empty", [False, True])
def test_missing_base_models_are_reported_with_the_keys_to_give(moved, tmp_path, capsys, empty):
    if empty:  # like a mount point without its file system
        (moved.old / "whisper").mkdir(parents=True)
        (moved.old / "llm").mkdir()
    error = fails(capsys, "export", moved.exp, "--output", tmp_path / "model")
    for name in ("whisper", "llm"):
        assert str(moved.old / name) in error
    for part in moved.paths:
        assert f"model.{part}.pretrained_model=" in error
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("part", "name"), [("audio_encoder", "whisper"), ("llm", "llm")])
def test_another_base_model_is_rejected(moved, others, tmp_path, capsys, part, name):
    wrong = words_of(moved.paths | {part: str(others / name)})
    wav = tmp_path / "a.wav"
    output = ("--output", tmp_path / "out")
    commands = {
        "export": (moved.exp, *output),
        "transcribe": (moved.exp, wav),
        "average": (moved.exp, "--iter", 4, "--avg", 1),
        "merge-lora": (moved.exp, *output),
        "evaluate": (f"exp_dir={moved.exp}", f"data.test_data_config={tmp_path / 'no.yaml'}"),
    }
    before = sorted(moved.exp.iterdir())
    for verb, arguments in commands.items():
        error = fails(capsys, verb, *arguments, *wrong)
        assert str(others / name) in error
        assert "SHA-256" in error
        assert f"model.{part}.pretrained_model=" in error
    assert sorted(moved.exp.iterdir()) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("model.llm.pretrained_model=/no/llm", "/no/llm"),
        ("model.llm.pretrained_model=", "model.llm.pretrained_model"),
        (
            "model.llm.pretrained_model={new}/llm/model.safetensors",
            "model.llm.pretrained_model='{new}/llm/model.safetensors'",
        ),
        ("model.llm.pretrained_model={new}", "model.llm.pretrained_model='{new}'"),
        ("model.llm.pretrained=/no/llm", "'model.llm.pretrained_model'"),
        ("model.encoder=/no", "model.audio_encoder.pretrained_model"),
    ],
)
def test_invalid_base_model_options_are_rejected(moved, tmp_path, capsys, word, named):
    word = word.format(new=moved.new)
    error = fails(capsys, "export", moved.exp, word, "--output", tmp_path / "model")
    assert named.format(new=moved.new) in error
    assert not (tmp_path / "model").exists()


def test_unknown_parts_and_models_without_base_models_are_rejected(moved):
    config = AsrLlmConfig()
    with pytest.raises(UserError, match="'audio_encoder'"):
        move_base_models(config, {"encoder": "x"}, where="exp")
    with pytest.raises(UserError, match=r"model\.llm\.pretrained_model='x' .*'exp' .* llm\."):
        move_base_models(config, {"llm": "x"}, where="exp")
    move_base_models(config, None, where="exp")
    assert config.base_models is None


def test_base_model_options_may_be_anywhere_among_the_arguments(moved, tmp_path, capsys):
    encoder, llm = moved.words
    does(
        capsys,
        "export",
        encoder,
        moved.exp,
        "--output",
        tmp_path / "model",
        llm,
        "--keep-adapters",
        "--dtype",
        "float32",
    )
    assert_same_weights(weights_of(tmp_path / "model"), moved.model.weights())


@pytest.mark.slow
def test_export_stores_the_present_paths(moved, tmp_path, capsys):
    does(
        capsys,
        "export",
        moved.exp,
        *moved.words,
        "--output",
        tmp_path / "model",
        "--keep-adapters",
        "--dtype",
        "float32",
    )
    assert str(moved.old) not in "".join(
        file.read_text() for file in (tmp_path / "model").glob("*.json")
    )
    bases = json.loads((tmp_path / "model" / "config.json").read_text())["base_models"]
    assert {part: base["path"] for part, base in bases.items()} == moved.paths
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| llm | qwen2 | llm |" in card
    assert str(tmp_path) not in card
    shutil.rmtree(moved.new)
    assert_same_weights(weights_of(tmp_path / "model"), moved.model.weights())


@pytest.mark.slow
def test_part_excluded_from_an_export_may_move(moved, tmp_path, capsys):
    config = json.loads((moved.exp / "config.json").read_text())
    (moved.exp / "config.json").write_text(
        json.dumps(config | {"exclude_from_checkpoint": ["llm"]})
    )
    does(
        capsys,
        "export",
        moved.exp,
        *moved.words,
        "--output",
        tmp_path / "model",
        "--keep-adapters",
        "--dtype",
        "float32",
    )
    (moved.new / "llm").rename(tmp_path / "newest")
    assert "model.llm.pretrained_model=" in fails(
        capsys, "export", tmp_path / "model", "--keep-adapters", "--output", tmp_path / "again"
    )
    found = weights_of(tmp_path / "model", base_models={"llm": tmp_path / "newest"})
    assert_same_weights(found, moved.model.weights())


@pytest.mark.slow
def test_llm_is_merged_from_its_present_path(moved, tmp_path, capsys):
    does(capsys, "merge-lora", moved.exp, "--output", tmp_path / "moved", moved.words[1])
    (tmp_path / "old").symlink_to(moved.new)
    merge_lora(LlmFiles(moved.exp), tmp_path / "there")
    name = "model.safetensors"
    assert (tmp_path / "moved" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    does(
        capsys,
        "merge-lora",
        moved.exp,
        "--output",
        tmp_path / "adapter",
        "--adapter-only",
        moved.words[1],
    )
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == moved.paths["llm"]
    save_adapter(LlmFiles(moved.exp), tmp_path / "adapter-there")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "adapter" / weights).read_bytes() == (
        tmp_path / "adapter-there" / weights
    ).read_bytes()


@pytest.mark.parametrize("verb", ["transcribe", "average", "merge-lora", "export", "evaluate"])
def test_help_names_the_keys(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    text = capsys.readouterr().out
    if verb == "evaluate":
        assert re.search(r"audio_encoder: .*\n +pretrained_model: ", text)
    else:
        assert "model.llm.pretrained_model=" in " ".join(text.split())
