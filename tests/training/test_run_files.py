"""The small files of a run have checksums, which inference verifies."""

import shutil
from pathlib import Path

import pytest
import torch

from asrllm import integrity
from asrllm.checkpoints.average import adapters_with_rslora
from asrllm.checkpoints.llm_files import LlmFiles
from asrllm.commands.train import write_run_files
from asrllm.errors import CorruptedError
from asrllm.integrity import CHECKSUMS, verify_folder, write_checksums
from asrllm.models.auto import AutoModel, load_model_config
from asrllm.training.run_config import TrainRun
from tests.composing import load_config
from tests.models.asr_llm.test_modeling import make_model
from tests.test_cli import fails

LISTED = ["chat_template.jinja", "config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    """A run's directory with the files that inference needs."""
    monkeypatch.setattr("asrllm.distributed.barrier", lambda: None)
    exp = tmp_path / "exp"
    model = make_model(world)
    write_files(world, exp, model)
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state[name] = parameter.detach().float()
    torch.save(state, exp / "pretrained.pt")
    return exp


def write_files(world, exp, model):
    write_run_files(load_config("train", world.overrides(exp), TrainRun), model.processor, {})


def listed(run):
    return [line.partition("  ")[2] for line in (run / CHECKSUMS).read_text().splitlines()]


def flip(path):
    content = path.read_bytes()
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])


CHANGES = [flip, Path.unlink, lambda path: path.write_text("")]


def test_run_lists_the_checksums_of_what_inference_reads(run):
    assert listed(run) == LISTED
    assert sorted(path.name for path in run.iterdir()) == sorted(
        [*LISTED, CHECKSUMS, "config.yaml", "pretrained.pt"]
    )


@pytest.mark.parametrize("change", CHANGES)
def test_changed_file_of_a_run_is_named(run, change):
    for name in LISTED:
        content = (run / name).read_bytes()
        change(run / name)
        for use in (AutoModel.from_pretrained, LlmFiles, load_model_config, adapters_with_rslora):
            with pytest.raises(CorruptedError) as caught:
                use(run)
            assert repr(str(run / name)) in str(caught.value)
            assert repr(str(run / CHECKSUMS)) in str(caught.value)
        (run / name).write_bytes(content)


@pytest.mark.slow
def test_commands_end_with_status_2_if_a_run_lost_its_chat_template(world, run, tmp_path, capsys):
    (run / "chat_template.jinja").unlink()
    outputs = ("--output", tmp_path / "out")
    for command in (
        ("transcribe", run, tmp_path / "x.wav"),
        ("export", run, *outputs),
        ("merge-lora", run, *outputs),
        ("evaluate", f"exp_dir={run}", f"data.test_data_config={world.root / 'test.yaml'}"),
    ):
        assert str(run / "chat_template.jinja") in fails(capsys, *command)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exp"]


def test_empty_list_of_checksums_is_reported(run):
    (run / CHECKSUMS).write_text("")
    with pytest.raises(CorruptedError) as caught:
        load_model_config(run)
    assert repr(str(run / CHECKSUMS)) in str(caught.value)


def test_run_of_an_earlier_version_needs_no_checksums(run):
    (run / CHECKSUMS).unlink()
    template = run / "chat_template.jinja"
    template.write_text(template.read_text() + "{# changed #}")
    AutoModel.from_pretrained(run)


@pytest.mark.slow
def test_resumed_run_writes_the_files_and_their_checksums_again(world, run):
    flip(run / "chat_template.jinja")
    shutil.copyfile(run / "config.yaml", run / CHECKSUMS)
    model = make_model(world)
    model.processor.config.trained_seconds = 12.5
    write_files(world, run, model)
    verify_folder(run)
    assert listed(run) == LISTED
    assert load_model_config(run).trained_seconds == 12.5


def test_files_that_a_resumed_run_writes_again_are_read_as_one_version(run, monkeypatch):
    """The reader has the old list when the run replaces its files."""
    old = (run / CHECKSUMS).read_text()
    flip(run / "chat_template.jinja")
    write_checksums(run)
    lines = (run / CHECKSUMS).read_text().splitlines()
    kept = [line for line in lines if line.partition("  ")[2] in LISTED]
    (run / CHECKSUMS).write_text("\n".join(kept) + "\n")
    versions = iter([old])
    read_list = integrity._checksums
    monkeypatch.setattr(integrity, "_checksums", lambda folder: next(versions, read_list(folder)))
    verify_folder(run)
    versions = iter([old])
    (run / CHECKSUMS).unlink()
    verify_folder(run)
    (run / CHECKSUMS).write_text(old)
    with pytest.raises(CorruptedError, match="chat_template"):
        verify_folder(run)
