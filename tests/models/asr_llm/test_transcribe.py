"""`asrllm transcribe` on every kind of directory, and all of its options."""

import errno
import json
import logging
import os
import re
import shutil

import numpy as np
import pytest
import soundfile
import torch

from asrllm.audio.reader import read_audio
from asrllm.commands import transcribe
from asrllm.commands.dispatch import main
from asrllm.data.prompts import Prompt
from asrllm.escape import escape
from asrllm.evaluation.engine import TorchEngine
from asrllm.models.asr_llm.generation import Answer
from asrllm.models.auto import AutoModel
from asrllm.models.build import describe_prompts
from asrllm.testing import tone, vowels
from tests.models.asr_llm.test_modeling import make_model
from tests.models.interop.test_auden import auden_directory
from tests.test_cli import fails


class Heard:
    """An engine that records its requests."""

    def __init__(self, monkeypatch, end="stop"):
        self.prompts, self.seconds, self.dtypes = [], [], []

        def answer(engine, waves, prompts):
            self.prompts += prompts
            self.seconds += [round(len(wave) / 16000, 2) for wave in waves]
            self.dtypes.append(engine.model.dtype)
            return [Answer(text=f"{len(wave)}", end=end) for wave in waves]

        monkeypatch.setattr(TorchEngine, "answer", answer)


def warned(caplog, monkeypatch, *argv):
    """Return the warnings of a command that succeeds."""
    caplog.clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert main([str(a) for a in argv]) == 0
    return [record.getMessage() for record in caplog.records]


@pytest.fixture
def model(world, tmp_path):
    made = make_model(world)
    describe_prompts(
        made.config,
        [
            Prompt(text="Transcribe."),
            Prompt(text="写下来。", lang="zh"),
            Prompt(text="Write.", lang="en"),
        ],
    )
    made.config.hotwords_template = "Names: {words}!"
    made.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def speech(tmp_path):
    """Write two utterances with 3 s of silence between them, at 22.05 kHz."""
    rate = 22050
    wave = np.concatenate(
        [vowels(2, rate=rate), np.zeros(3 * rate), vowels(1.5, seed=1, rate=rate), np.zeros(rate)]
    )
    soundfile.write(tmp_path / "speech.flac", wave, rate)
    return tmp_path / "speech.flac"


@pytest.mark.slow
def test_transcribe_accepts_runs_exports_and_auden_directories(
    world, tmp_path, capsys, monkeypatch, caplog
):
    """Other directories are rejected."""
    run, exported, auden, out = (tmp_path / name for name in ("run", "exported", "auden", "out"))
    model = make_model(world)
    model.save_pretrained(exported)
    model.config.save_pretrained(run)
    model.processor.save_pretrained(run)
    torch.save(model.weights(), run / "pretrained.pt")
    auden_directory(world, auden)
    heard = Heard(monkeypatch)
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", tone("one", 0.5 + i / 10), 16000)
    files = [str(tmp_path / f"{i}.wav") for i in range(3)]
    for folder in (run, exported, auden):
        for options in ([], ["--dtype", "bfloat16", "--batch-size", "2"]):
            capsys.readouterr()
            assert (
                warned(caplog, monkeypatch, "transcribe", folder, *files, "--no-vad", *options)
                == []
            )
            assert capsys.readouterr().out == "".join(
                f"{file}\t{8000 + 1600 * i}\n" for i, file in enumerate(files)
            )
    assert warned(caplog, monkeypatch, "export", auden, "--output", out) == []
    assert set(heard.dtypes) == {torch.float32, torch.bfloat16}
    assert heard.dtypes.index(torch.bfloat16) == 1
    (tmp_path / "empty").mkdir()
    for folder, named in (
        (tmp_path / "no", str(tmp_path / "no")),
        (tmp_path / "empty", "config.json"),
        (world.llm, "'qwen2'"),
    ):
        error = fails(capsys, "transcribe", folder, files[0])
        assert repr(str(folder)) in error
        assert named in error
    soundfile.write(files[1], np.zeros(100), 16000)
    error = fails(capsys, "transcribe", auden, files[1])
    assert repr(files[1]) in error
    assert " 10 ms" in error


@pytest.mark.slow
def test_each_segment_gets_the_text_of_the_model(model, tmp_path, speech, capsys, monkeypatch):
    """The texts do not depend on the batch size."""
    outputs = []
    for size in (1, 3, 8):
        assert (
            main(
                [
                    "transcribe",
                    str(model),
                    str(speech),
                    str(speech),
                    "--batch-size",
                    str(size),
                    "--max-new-tokens",
                    "9",
                ]
            )
            == 0
        )
        captured = capsys.readouterr()
        outputs.append(captured.out)
        assert "15.0 s" in captured.err  # two files of 7.5 s
    assert outputs[0] == outputs[1] == outputs[2]
    row, again = outputs[0].splitlines()
    assert row == again
    assert row.startswith(f"{speech}\t")
    assert (
        main(
            [
                "transcribe",
                str(model),
                str(speech),
                "--format",
                "json",
                "--max-new-tokens",
                "9",
                "--language",
                "en",
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert (found["audio"], found["language"], found["duration"]) == (
        str(speech),
        "en",
        pytest.approx(7.5, abs=0.01),
    )
    wave = read_audio(speech)
    loaded = AutoModel.from_pretrained(model)
    ends = [(round(s["start"] * 16000), round(s["end"] * 16000)) for s in found["segments"]]
    np.testing.assert_allclose(np.array(ends) / 16000, [(0, 2.2), (4.8, 6.7)], atol=0.3)
    engine = TorchEngine(
        loaded, {"max_new_tokens": 9, "max_tokens_per_second": 15.0, "repetition_guard": 32}
    )
    texts = [answer.text for answer in engine.answer([wave[a:b] for a, b in ends], ["Write."] * 2)]
    assert [segment["text"] for segment in found["segments"]] == texts


@pytest.mark.slow
def test_short_file_is_one_segment_without_vad(model, speech, capsys):
    assert main(["transcribe", str(model), str(speech), "--no-vad"]) == 0
    expected = AutoModel.from_pretrained(model).transcribe([str(speech)])
    assert capsys.readouterr().out == escape(expected[0], keep="\n") + "\n"


@pytest.mark.slow
def test_output_formats_and_directories(model, speech, tmp_path, capsys, monkeypatch):
    Heard(monkeypatch)
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    shutil.copy(speech, tmp_path / "in" / "a.flac")
    shutil.copy(speech, tmp_path / "in" / "deeper" / "b.flac")
    out = tmp_path / "out" / "new"
    assert (
        main(
            [
                "transcribe",
                str(model),
                str(tmp_path / "in"),
                "--format",
                "json,srt",
                "--format",
                "vtt",
                "--output-dir",
                str(out),
            ]
        )
        == 0
    )
    assert sorted(path.name for path in out.iterdir()) == [
        f"{name}.{kind}" for name in "ab" for kind in ("json", "srt", "vtt")
    ]
    assert capsys.readouterr().out == ""
    assert (out / "a.srt").read_text().startswith("1\n00:00:00,000 --> 00:00:02,")
    assert (out / "a.vtt").read_text().startswith("WEBVTT\n\n1\n00:00:00.000 --> 00:00:02.")
    assert json.loads((out / "b.json").read_text())["audio"] == str(
        tmp_path / "in" / "deeper" / "b.flac"
    )
    assert main(["transcribe", str(model), str(tmp_path / "in"), "--output-dir", str(out)]) == 0
    assert len((out / "b.txt").read_text().split()) == 2
    assert main(["transcribe", str(model), str(tmp_path / "in"), "--format", "json"]) == 0
    assert [json.loads(line)["audio"][-6:] for line in capsys.readouterr().out.splitlines()] == [
        "a.flac",
        "b.flac",
    ]
    assert main(["transcribe", str(model), str(speech), "--format", "srt"]) == 0
    assert capsys.readouterr().out == (out / "a.srt").read_text()


@pytest.mark.slow
def test_options_reach_the_engine(model, world, speech, tmp_path, capsys, monkeypatch, caplog):
    heard = Heard(monkeypatch)
    (tmp_path / "words.txt").write_text("\ufeffAnna Lind\n\n东京\n", encoding="utf-8")

    def asked(*options, folder=model):
        heard.prompts.clear()
        warnings = warned(caplog, monkeypatch, "transcribe", folder, speech, *options)
        assert len(set(heard.prompts)) == 1
        return heard.prompts[0], warnings

    assert asked() == ("Transcribe.", [])
    assert asked("--language", "en-US") == ("Write.", [])
    assert asked("--language", "zh") == ("写下来。", [])
    text, (warning,) = asked("--language", "de")
    assert (text, "--language de" in warning) == ("Transcribe.", True)
    assert asked("--prompt", "Write.") == ("Write.", [])
    text, (warning,) = asked("--prompt", "Sing.")
    assert text == "Sing."
    for prompt in ("prompt='Sing.'", "Transcribe.", "写下来。", "Write."):
        assert prompt in warning
    assert asked("--hotwords", "Anna,Bo Ek，Cy ,Anna") == (
        "Transcribe. Names: Anna, Bo Ek, Cy!",
        [],
    )
    assert asked("--hotwords", f"@{tmp_path / 'words.txt'}") == (
        "Transcribe. Names: Anna Lind, 东京!",
        [],
    )
    make_model(world).save_pretrained(tmp_path / "plain")
    text, (warning,) = asked("--hotwords", "Anna", folder=tmp_path / "plain")
    assert (text, "hotwords" in warning) == (
        "Transcribe. Hotwords: Anna.",
        True,
    )


def test_silence_and_truncated_answers_cause_warnings(
    model, speech, tmp_path, capsys, monkeypatch, caplog
):
    Heard(monkeypatch, end="limit")
    soundfile.write(tmp_path / "silent.wav", np.zeros(32000), 16000)
    first, second = warned(
        caplog, monkeypatch, "transcribe", model, tmp_path / "silent.wav", speech
    )
    assert repr(str(tmp_path / "silent.wav")) in first
    assert "--no-vad" in first
    assert second.startswith("2 of 2 ")
    assert repr(str(speech)) in second
    assert "--max-new-tokens" in second
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'silent.wav'}\t\n{speech}\t")


def test_invalid_options_are_reported_before_the_model_loads(
    model, speech, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        transcribe, "load_engine", lambda arguments: pytest.fail("the model was loaded")
    )
    (tmp_path / "none").mkdir()
    (tmp_path / "other").mkdir()
    shutil.copy(speech, tmp_path / "other" / "speech.flac")
    (tmp_path / "text.txt").write_text("words\n")
    text, other, none = (tmp_path / name for name in ("text.txt", "other", "none"))
    inside = text / "a" / "b"
    for arguments, named in (
        (["--format", "svt"], ["--format 'svt'", "'vtt'"]),
        (["--format", "srt,vtt"], ["--format srt,vtt ", "--output-dir"]),
        ([speech, "--format", "srt"], ["--format srt ", " 2 ", "--output-dir"]),
        (["--output-dir", text], [f"--output-dir {str(text)!r}", f": {str(text)!r}"]),
        (["--output-dir", inside], [f"--output-dir {str(inside)!r}", f": {str(text)!r}"]),
        (
            [other, "--output-dir", tmp_path / "out"],
            [repr(str(speech)), repr(str(other / "speech.flac")), " speech.txt "],
        ),
        ([none], [repr(str(none))]),
        (["--hotwords", ","], ["hotwords=','"]),
        (["--hotwords", f"@{tmp_path / 'no.txt'}"], [repr(str(tmp_path / "no.txt"))]),
        (["--prompt", "Hear <|AUDIO|>"], ["'Hear <|AUDIO|>'", "'<|AUDIO|>'"]),
        (["--repetition-guard", "-1"], ["--repetition-guard -1 "]),
    ):
        error = fails(capsys, "transcribe", model, speech, *arguments)
        for name in named:
            assert name in error
    assert not (tmp_path / "out").exists()
    if os.geteuid():  # root may write everywhere
        none.chmod(0o500)
        error = fails(capsys, "transcribe", model, speech, "--output-dir", none / "out")
        assert f"--output-dir {str(none / 'out')!r}" in error
        assert repr(str(none)) in error


@pytest.mark.slow
def test_unreadable_files_are_reported_and_the_others_transcribed(
    model, speech, tmp_path, capsys, monkeypatch
):
    heard, loaded = Heard(monkeypatch), transcribe.load_engine
    cut = tmp_path / "cut.wav"
    soundfile.write(cut, vowels(1), 16000)
    cut.write_bytes(cut.read_bytes()[:9000])
    soundfile.write(tmp_path / "short.wav", np.zeros(10), 16000)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.txt").write_text("words\n")
    bad = {
        "empty.wav": "(0 bytes)",
        "text.txt": "ffmpeg",
        "no.wav": os.strerror(errno.ENOENT),
        "cut.wav": " bytes",
        "short.wav": " 1 ms ",
    }
    monkeypatch.setattr(
        transcribe, "load_engine", lambda arguments: pytest.fail("the model was loaded")
    )
    for name, value in bad.items():
        error = fails(capsys, "transcribe", model, tmp_path / name)
        assert repr(str(tmp_path / name)) in error
        assert value in error
    monkeypatch.setattr(transcribe, "load_engine", loaded)
    files = [str(tmp_path / name) for name in bad]
    assert main(["transcribe", str(model), *files[:2], str(speech), *files[2:]]) == 2
    printed = capsys.readouterr()
    assert heard.prompts
    assert printed.out.startswith(f"{speech}\t")
    assert all(repr(file) in printed.err for file in files)
    assert "(1)" in printed.err.splitlines()[-1]


@pytest.mark.slow
def test_damage_in_the_middle_of_a_file_is_reported_at_the_end(
    model, speech, tmp_path, capsys, monkeypatch
):
    Heard(monkeypatch)
    wave = vowels(3)
    wave[40_000] = np.nan
    soundfile.write(tmp_path / "bad.wav", wave, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "loud.wav", vowels(1) * 1e30, 16000, subtype="FLOAT")
    files = [tmp_path / "bad.wav", speech, tmp_path / "loud.wav"]
    assert (
        main(["transcribe", str(model), *map(str, files), "--output-dir", str(tmp_path / "out")])
        == 2
    )
    error = capsys.readouterr().err
    assert f"{str(files[0])!r} has NaN " in error
    assert re.search(rf"'{files[2]}' .*\de\+\d\d", error)
    assert "(1)" in error.splitlines()[-1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["speech.txt"]
    assert main(["transcribe", str(model), str(files[0])]) == 2
    error = capsys.readouterr().err
    assert repr(str(files[0])) in error
    assert "at 2.50 s" in error


@pytest.mark.slow
def test_segments_are_at_most_as_long_as_in_training(world, tmp_path, monkeypatch, caplog, capsys):
    rate = 16000
    soundfile.write(
        tmp_path / "long.wav",
        np.concatenate([np.append(vowels(1.2, seed=i), np.zeros(rate // 2)) for i in range(12)]),
        rate,
    )
    made = make_model(world)
    longest = {}
    for trained in (None, 4.0, 0.5):
        made.config.trained_seconds = trained
        made.save_pretrained(tmp_path / str(trained))
        heard = Heard(monkeypatch)
        assert (
            warned(
                caplog, monkeypatch, "transcribe", tmp_path / str(trained), tmp_path / "long.wav"
            )
            == []
        )
        longest[trained] = max(heard.seconds)
    assert longest[None] > 12
    assert 2 < longest[4.0] <= 4
    assert longest[0.5] <= 2
    heard = Heard(monkeypatch)
    given = ("transcribe", tmp_path / "4.0", tmp_path / "long.wav", "--max-segment")
    (warning,) = warned(caplog, monkeypatch, *given, 10)
    assert "--max-segment 10 " in warning
    assert "(4 s)" in warning
    assert 4 < max(heard.seconds) <= 10
    assert re.search("--max-segment 1 .* 2 .* 30 ", fails(capsys, *given, 1))
