"""Parts of the quickstart. `make quickstart` runs all of it."""

import struct
import sys

import numpy as np
import pytest
import torch
import yaml

from asrllm.commands.dispatch import main
from tests.conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "examples" / "quickstart"))
sys.path.insert(0, str(REPOSITORY / "examples" / "sentences"))

import run
import sentences
import speech
import steps
import weights


def ctranslate2_file(path, variables, aliases=(), version=6):
    """Write a model.bin like CTranslate2."""

    def string(text):
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    data = (
        struct.pack("<I", version) + string("WhisperSpec") + struct.pack("<II", 3, len(variables))
    )
    kinds = {np.dtype(np.float32): 0, np.dtype(np.int8): 1, np.dtype(np.float16): 4}
    for name, array in variables.items():
        data += (
            string(name)
            + struct.pack("<B", array.ndim)
            + struct.pack(f"<{array.ndim}I", *array.shape)
        )
        data += struct.pack("<BI", kinds[array.dtype], array.nbytes) + array.tobytes()
    data += struct.pack("<I", len(aliases)) + b"".join(string(a) + string(b) for a, b in aliases)
    path.write_bytes(data)
    return path


def test_ctranslate2_files_are_read(tmp_path):
    variables = {
        "a/weight": np.arange(6, dtype=np.float16).reshape(2, 3),
        "heads": np.array(6, np.int8),
    }
    read = weights.read_ctranslate2(
        ctranslate2_file(tmp_path / "m.bin", variables, [("b/weight", "a/weight")])
    )
    assert read["a/weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read["b/weight"] is read["a/weight"]
    assert int(read["heads"]) == 6
    with pytest.raises(SystemExit, match="expected WhisperSpec, version 6"):
        weights.read_ctranslate2(ctranslate2_file(tmp_path / "n.bin", variables, version=5))


def test_whisper_weights_get_the_names_of_transformers(world):
    """Parameters of transformers' Whisper, stacked like CTranslate2's, get their names back."""
    from transformers import WhisperModel

    theirs = {
        f"model.{k}": v for k, v in WhisperModel.from_pretrained(world.whisper).state_dict().items()
    }
    stacked = {"decoder/embeddings/weight": theirs["model.decoder.embed_tokens.weight"]}

    def put(target, *sources):
        kinds = ("gamma", "beta") if "norm" in target else ("weight", "bias")
        for kind, name in zip(kinds, ("weight", "bias"), strict=True):
            parts = [
                theirs.get(f"{s}.{name}", torch.zeros(len(theirs[f"{s}.weight"]))) for s in sources
            ]
            stacked[f"{target}/{kind}"] = torch.cat(parts)

    for conv in ("conv1", "conv2"):
        put(f"encoder/{conv}", f"model.encoder.{conv}")
    for part, layers in (("encoder", 2), ("decoder", 1)):
        stacked[f"{part}/position_encodings/encodings"] = theirs[
            f"model.{part}.embed_positions.weight"
        ]
        put(f"{part}/layer_norm", f"model.{part}.layer_norm")
        for i in range(layers):
            a = f"{part}/layer_{i}"
            b = f"model.{part}.layers.{i}"
            put(f"{a}/self_attention/layer_norm", f"{b}.self_attn_layer_norm")
            put(f"{a}/self_attention/linear_0", *(f"{b}.self_attn.{x}_proj" for x in "qkv"))
            put(f"{a}/self_attention/linear_1", f"{b}.self_attn.out_proj")
            put(f"{a}/ffn/layer_norm", f"{b}.final_layer_norm")
            put(f"{a}/ffn/linear_0", f"{b}.fc1")
            put(f"{a}/ffn/linear_1", f"{b}.fc2")
            if part == "decoder":
                put(f"{a}/attention/layer_norm", f"{b}.encoder_attn_layer_norm")
                put(f"{a}/attention/linear_0", f"{b}.encoder_attn.q_proj")
                put(
                    f"{a}/attention/linear_1",
                    f"{b}.encoder_attn.k_proj",
                    f"{b}.encoder_attn.v_proj",
                )
                put(f"{a}/attention/linear_2", f"{b}.encoder_attn.out_proj")
    mine = weights.whisper_state(stacked)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_directory_appears_only_when_complete(tmp_path):
    def interrupted():
        with weights.NewDirectory(tmp_path / "out") as folder:
            (folder / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not (tmp_path / "out").exists()
    with weights.NewDirectory(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["whole"]


@pytest.mark.slow
def test_training_strings_are_reproducible_and_within_bounds():
    pool = {
        word: [np.sin(np.arange(4000) * 0.05 * (i + 1)).astype(np.float32)]
        for i, word in enumerate(speech.DIGITS)
    }
    speech._fill_pool([("one two", pool["one"][0])], pool)
    strings = [speech.training_string(i) for i in range(40)]
    assert any(words == "one two" for words, _ in strings)
    for words, wave in strings:
        assert set(words.split()) <= set(speech.DIGITS)
        assert 1 <= len(words.split()) <= 6
        assert wave.dtype == np.float32
        assert 0.09 < np.abs(wave).max() <= 0.9
    again, wave = speech.training_string(3)
    assert again == strings[3][0]
    assert np.array_equal(wave, strings[3][1])
    assert len(speech.speed(pool["one"][0], 2.0)) == 2000
    assert len(
        speech.trim(np.concatenate([np.zeros(9000), np.ones(1000), np.zeros(9000)]))
    ) == pytest.approx(1960, abs=2)
    assert len(speech.digit_strings(pool, seed=0)) == speech.TEST_STRINGS


def test_finished_step_is_skipped(tmp_path, capsys):
    times = steps.Times()
    done = []
    assert times.step("a", tmp_path / "result", lambda: done.append(1)) is None
    (tmp_path / "result").touch()
    times.step("a", tmp_path / "result", lambda: done.append(2))
    assert done == [1]
    assert "a reused" in times.text()


@pytest.mark.parametrize("example", [run, sentences])
def test_overrides_of_the_training_are_valid(tmp_path, monkeypatch, capsys, example):
    commands = []
    monkeypatch.setattr("steps.run", commands.append)
    experiment = steps.Experiment(work=tmp_path, steps=10, save_every=50, keep_last_k=5)
    assert experiment.checkpoints == 1
    example.train(experiment)
    (command,) = commands
    overrides = [word for word in command if "=" in word]
    assert main(["train", *overrides, "--cfg", "job"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["num_steps"] == 10


def test_next_commands_use_the_weights_that_were_scored(tmp_path, capsys):
    experiment = steps.Experiment(work=tmp_path, steps=110, save_every=10, keep_last_k=3)
    steps.print_next_commands(experiment)
    transcribe, export, _ = capsys.readouterr().out.splitlines()[1:]
    assert str(experiment.exp / "averaged-iter-110-avg-3.pt") in transcribe
    assert str(experiment.averaged) in export


def test_results_of_another_number_of_steps_are_not_taken_for_these(tmp_path):
    experiment = steps.Experiment(work=tmp_path, steps=20, save_every=10, keep_last_k=3)
    steps.check_steps(experiment)
    (experiment.exp / "checkpoint-10").mkdir(parents=True)
    steps.check_steps(experiment)  # interrupted
    experiment.pretrained.touch()
    with pytest.raises(SystemExit, match=str(experiment.exp)):
        steps.check_steps(experiment)
    (experiment.exp / "checkpoint-20").mkdir()
    steps.check_steps(experiment)
