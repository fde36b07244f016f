"""`asrllm transcribe` on every kind of directory."""

import logging

import numpy as np
import soundfile
import torch
from test_auden import auden_directory
from test_model import make_model

from asrllm.cli import main
from asrllm.models.model import AsrLlmModel
from asrllm.testing import tone
from tests.test_cli import fails


def test_the_directories_that_transcribe_takes(world, tmp_path, capsys, monkeypatch, caplog):
    """A run, an exported directory and one of Auden's; another is one sentence."""
    run, exported, auden, out = (tmp_path / name for name in ("run", "exported", "auden", "out"))
    model = make_model(world)
    model.save_pretrained(exported)
    model.config.save_pretrained(run)
    model.processor.save_pretrained(run)
    torch.save(model.weights(), run / "pretrained.pt")
    auden_directory(world, auden)
    seen = []
    monkeypatch.setattr(AsrLlmModel, "transcribe", lambda self, audio, **_: seen.append(self.dtype) or [f"text of {a}" for a in audio])
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", tone("one", 0.5), 16000)
    files = [str(tmp_path / f"{i}.wav") for i in range(3)]
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.clear()
    for folder in (run, exported, auden):
        for options in ([], ["--dtype", "bfloat16", "--batch-size", "2"]):
            capsys.readouterr()
            assert main(["transcribe", str(folder), *files, *options]) == 0
            assert capsys.readouterr().out == "".join(f"{file}\ttext of {file}\n" for file in files)
    assert main(["export", str(auden), "--output", str(out)]) == 0
    assert [record.getMessage() for record in caplog.records] == []
    assert set(seen) == {torch.float32, torch.bfloat16}
    assert seen.index(torch.bfloat16) == 1
    (tmp_path / "empty").mkdir()
    for folder, message in (
        (tmp_path / "no", "has no config.json"),
        (tmp_path / "empty", "has no config.json"),
        (world.llm, "is a 'qwen2'"),
    ):
        assert message in fails(capsys, "transcribe", folder, files[0])
    soundfile.write(files[1], np.zeros(100), 16000)
    assert f"{files[1]!r} has 0.01 s of audio, the model takes" in fails(capsys, "transcribe", auden, *files)


def test_a_file_too_loud_to_transcribe_is_named(world, tmp_path, capsys):
    make_model(world).save_pretrained(tmp_path / "model")
    soundfile.write(tmp_path / "loud.wav", tone("one", 0.5) * 1e30, 16000, subtype="FLOAT")
    assert f"{str(tmp_path / 'loud.wav')!r}) are not finite" in fails(capsys, "transcribe", tmp_path / "model", tmp_path / "loud.wav")
