"""Parts of the sentences example. `make sentences` runs all of it."""

import io
import json
import subprocess
import sys
import tarfile

import pytest
import soundfile

from tests.conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "examples" / "quickstart"))
sys.path.insert(0, str(REPOSITORY / "examples" / "sentences"))

import curve
import fetch
import texts
import voices


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Please press 1, or 12 if you're late.", None),  # 12 may be read in two ways
        ("Press 1, then 0: don't wait!", "press one then zero don't wait"),
        ("a well-kept garden", "a well kept garden"),
        ("[beep]", None),
        ("the U.S. army", None),
        ("  Goodbye...  ", "goodbye"),
        ("café", None),
        ("", None),
    ],
)
def test_texts_become_plain_words(text, words):
    assert texts.plain_words(text) == words


def wordnet(root, examples):
    folder = root / "usr/share/wordnet"
    folder.mkdir(parents=True)
    for kind in ("noun", "verb", "adj", "adv"):
        (folder / f"data.{kind}").write_text("")
    lines = [f'0 n x | a gloss; "{example}"\n' for example in examples]
    (folder / "data.noun").write_text("".join(lines))


def test_sentences_are_distinct_and_not_too_short_or_long(tmp_path):
    long = " ".join(["word"] * (texts.LONGEST + 1))
    wordnet(tmp_path, ["the team is a unit", "The team is a unit!", "two words", long, "in 1984"])
    assert texts.wordnet_sentences(tmp_path) == ["the team is a unit"]


def test_parts_of_the_prompts_have_no_common_text(tmp_path):
    sounds = tmp_path / texts.PROMPTS
    sounds.mkdir(parents=True)
    lines = []
    for i in range(600):
        # every text has two recordings; every third text has one word
        name = ["a", "b", "c"][i % 3] * (i // 6 + 1)
        text = name if i % 3 == 0 else f"this is {name}"
        lines.append(f"p{i}: {text}\n")
        soundfile.write(sounds / f"p{i}.wav", [0.0] * 80, 8000)
    soundfile.write(sounds / "long.wav", [0.0] * 31_000, 1000)
    lines += ["long: longer than the window of whisper\n"]
    lines += ["; a comment\n", "beep: [a beep]\n", "missing: without a recording\n"]
    doc = tmp_path / "usr/share/doc/asterisk-core-sounds-en"
    doc.mkdir(parents=True)
    (doc / "core-sounds-en.txt").write_text("".join(lines))
    subprocess.run(["gzip", str(doc / "core-sounds-en.txt")], check=True)
    parts = texts.prompts(tmp_path)
    words = {name: {recording.words for recording in part} for name, part in parts.items()}
    assert not words["test"] & words["train"]
    assert not words["test"] & words["valid"]
    assert not words["valid"] & words["train"]
    assert any(" " not in text for text in words["train"])
    assert all(" " in text for text in words["test"] | words["valid"])
    assert len(words["test"]) > 2 * len(words["valid"]) > 0
    assert (
        "longer than the window of whisper" not in words["train"] | words["test"] | words["valid"]
    )
    assert texts.prompts(tmp_path) == parts


def test_transcription_of_librivox_is_read(tmp_path):
    folder = tmp_path / texts.LIBRIVOX
    folder.mkdir(parents=True)
    (folder / "transcription").write_text("<s> he was not </s> (sense-0880)\n\n")
    (recording,) = texts.librivox(tmp_path)
    assert recording.words == "he was not"
    assert recording.path.name == "sense-0880.wav"


def test_texts_for_training_are_drawn_once_and_never_held_out():
    held_out = [texts.Recording(REPOSITORY, "text three")]
    known = texts.without([f"text {i}" for i in ("one", "two", "three", "four")], held_out)
    assert known == ["text one", "text two", "text four"]
    many = [f"sentence {i}" for i in range(400)]
    drawn = voices.draw_texts(many, 200, seed=0)
    parts = [part for text in drawn for part in text.split(". ")]
    assert len(drawn) == 200
    assert len(set(parts)) == len(parts)
    assert 20 < len(parts) - len(drawn) < 100
    assert voices.draw_texts(many, 200, seed=0) == drawn


def test_too_many_texts_are_rejected(capsys):
    with pytest.raises(SystemExit, match="20"):
        voices.draw_texts([f"sentence {i}" for i in range(20)], 30, seed=0)


def test_changed_and_missing_packages_are_named_and_nothing_is_written(tmp_path):
    debs = tmp_path / "debs"
    debs.mkdir()
    first, *_ = texts.packages()
    with pytest.raises(SystemExit, match=first):
        texts.unpack_packages(tmp_path / "out", debs)
    (debs / first).write_bytes(b"other bytes")
    with pytest.raises(SystemExit, match=first):
        texts.unpack_packages(tmp_path / "out", debs)
    assert not (tmp_path / "out").exists()


def test_recordings_of_a_finished_call_are_used_again(tmp_path, monkeypatch):
    """An interrupted synthesis resumes with the call that it was in."""
    call = voices.Call(1, ["one two", "three"], tmp_path, tmp_path / "0001")
    monkeypatch.setattr("voices.piper", lambda call: [[0.1] * 800 for _ in call.texts])
    first = voices.read_aloud(call)
    assert [path.name for path in first] == ["000.wav", "001.wav"]
    monkeypatch.setattr("voices.piper", lambda call: pytest.fail("read again"))
    assert voices.read_aloud(call) == first


def run_files(exp):
    exp.mkdir()
    for name in [*fetch.FILES, "averaged-iter-10-avg-2.pt", "pretrained.pt"]:
        (exp / name).write_text(name)
    return exp


def test_packed_model_is_unpacked_with_its_averaged_weights(tmp_path):
    exp = run_files(tmp_path / "exp")
    fetch.pack(exp, tmp_path / "model.tar.gz")
    (tmp_path / "out").mkdir()
    fetch.unpack(tmp_path / "model.tar.gz", tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted([*fetch.FILES, "averaged-iter-10-avg-2.pt"])
    assert all((tmp_path / "out" / name).read_text() == name for name in names)


def test_run_that_is_not_complete_is_not_packed(tmp_path):
    exp = run_files(tmp_path / "exp")
    (exp / "config.json").unlink()
    with pytest.raises(SystemExit, match=r"config\.json"):
        fetch.pack(exp, tmp_path / "model.tar.gz")
    assert not (tmp_path / "model.tar.gz").exists()


@pytest.mark.parametrize("name", ["../config.json", "a/config.json", "/tmp/config.json"])
def test_members_of_a_packed_model_stay_in_its_directory(tmp_path, name):
    with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(SystemExit, match=r"config\.json"):
        fetch.take(str(tmp_path / "model.tar.gz"), None, tmp_path / "work")
    assert not (tmp_path / "work" / "exp").exists()


def test_other_or_damaged_files_are_not_taken(tmp_path):
    packed = tmp_path / "model.tar.gz"
    fetch.pack(run_files(tmp_path / "exp"), packed)
    for source, digest in [
        (str(tmp_path / "missing.tar.gz"), None),
        (str(packed), "0" * 64),
        ("https://localhost:1/model.tar.gz", None),  # a URL needs a SHA-256
        ("https://localhost:1/model.tar.gz", "0" * 64),
        ("http://localhost:1/model.tar.gz", "0" * 64),
    ]:
        with pytest.raises(SystemExit, match=r"model\.tar\.gz|--sha256|missing"):
            fetch.take(source, digest, tmp_path / "work")
    whole = packed.read_bytes()
    flipped = bytearray(whole)
    flipped[-8] ^= 1  # in the checksum
    for damaged in (whole[:-20], whole[: len(whole) // 2], bytes(flipped)):
        packed.write_bytes(damaged)
        with pytest.raises(SystemExit, match=r"model\.tar\.gz"):
            fetch.take(str(packed), None, tmp_path / "work")
    assert not (tmp_path / "work" / "exp").exists()


def test_curve_has_the_minutes_of_a_resumed_run(tmp_path):
    records = [
        {"step": 0, "dropped/too_long": 4},
        {"step": 10, "seconds_per_step": 6.0},
        {"step": 10, "valid/prompts/loss": 2.0, "valid/prompts/wer": 70.0},
        {"step": 20, "seconds_per_step": 60.0},  # repeated after the run resumed
        {"step": 20, "seconds_per_step": 12.0},
        {"step": 20, "valid/prompts/wer": 50.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert curve.curve(tmp_path) == [(1.0, 70.0), (3.0, 50.0)]
    curve.draw({"run": curve.curve(tmp_path)}, tmp_path / "curve.svg")
    assert "</svg>" in (tmp_path / "curve.svg").read_text()


def test_curve_of_a_run_without_validation_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match=r"metrics\.jsonl"):
        curve.curve(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "seconds_per_step": 1.0}\n')
    with pytest.raises(SystemExit, match=r"trainer\.valid_decode"):
        curve.curve(tmp_path)
