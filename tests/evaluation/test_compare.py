"""Paired comparisons of transcripts and of result files."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from asrllm.commands.dispatch import main
from asrllm.data.text import en
from asrllm.errors import UserError
from asrllm.evaluation import compare as module
from asrllm.evaluation.compare import compare_files, compare_results
from asrllm.evaluation.result_files import read_rows, write_results, write_summary
from asrllm.evaluation.summary import score
from tests.conftest import clean_environment
from tests.evaluation.test_score import transcript
from tests.test_cli import fails


def compare(a, b):
    return module.compare_transcripts(a, b, normalizer="basic")


def noisy(rate, seed, count=200, **more):
    rng = np.random.default_rng(seed)
    words = [
        ("a b c d e", " ".join("x" if rng.random() < rate else c for c in "abcde"))
        for _ in range(count)
    ]
    return [transcript(r, h, f"u{i}", **more) for i, (r, h) in enumerate(words)]


@pytest.mark.slow
def test_only_a_real_difference_is_significant():
    a, better = noisy(0.3, 1), noisy(0.15, 2)
    found = compare(a, better)
    assert found.difference == pytest.approx(found.b - found.a, abs=1e-3)
    assert found.difference < 0
    assert found.difference_ci95[1] < 0
    assert found.p < 0.001
    assert (found.better > found.worse, found.utterances, found.by) == (True, 200, "utterance")
    back = compare(better, a)
    assert (back.difference, back.better, back.worse) == (
        -found.difference,
        found.worse,
        found.better,
    )
    same = compare(a, a)
    assert (same.difference, same.p, same.difference_ci95) == (
        0.0,
        1.0,
        [-same.difference_ci95[1], same.difference_ci95[1]],
    )
    assert same.difference_ci95[1] == pytest.approx(
        300 / sum(len(t.reference.split()) for t in a), abs=1e-3
    )  # the rule of three


def test_one_utterance_gives_no_bound():
    found = compare([transcript("a b", "a x")], [transcript("a b", "a b")])
    assert (found.difference, found.difference_ci95, found.p) == (-50.0, [-100.0, 100.0], 1.0)


@pytest.mark.slow
def test_p_values_of_equal_systems_are_uniform(monkeypatch):
    """One in ten is below 0.1, and a small case matches exact enumeration."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "PERMUTATIONS", 500)  # the error of p at 0.1 is 0.013
        below = sum(
            compare(noisy(0.3, 2 * i, 40), noisy(0.3, 2 * i + 1, 40)).p < 0.1 for i in range(60)
        )
    assert 1 <= below <= 14
    few = compare(
        [transcript("a b", "a x", str(i)) for i in range(4)],
        [transcript("a b", "a b", str(i)) for i in range(4)],
    )
    assert few.p == pytest.approx(2 / 16, abs=0.02)


def test_all_utterances_of_a_speaker_are_exchanged_together():
    a = [
        transcript("a b", "a x" if s == 0 else "a b", f"{s}-{i}", speaker=f"s{s}")
        for s in range(6)
        for i in range(20)
    ]
    b = [transcript("a b", "a b", t.key, speaker=t.speaker) for t in a]
    assert (compare(a, b).by, compare(a, b).p) == (
        "speaker",
        1.0,
    )  # one speaker does not represent others


def results(folder, transcripts, normalizer="basic", name="test"):
    folder.mkdir(parents=True)
    write_summary(
        folder,
        "s",
        {name: write_results(folder, name, "s", score(transcripts), {"normalizer": normalizer})},
    )
    return folder


@pytest.mark.slow
def test_results_on_disk_are_compared(tmp_path, capsys):
    a, b = noisy(0.3, 1, speaker="x"), noisy(0.2, 2, speaker="x")
    first, second = (
        results(tmp_path / "a" / "greedy_search", a),
        results(tmp_path / "b" / "greedy_search", b),
    )
    expected = compare(a, b)
    assert compare_results(first, second) == {"test": expected}
    assert compare_results(tmp_path / "a", tmp_path / "b") == {"test": expected}
    assert compare_results(
        first / "generations-test-s.jsonl", second / "generations-test-s.jsonl"
    ) == {"generations-test-s": expected}
    assert (
        compare_files(first / "recogs-test-s.txt", second / "generations-test-s.jsonl") == expected
    )
    assert main(["evaluate", "compare", str(first), str(second)]) == 0
    output = capsys.readouterr().out
    for part in (f"{expected.a:.2f} %", f"{expected.b:.2f} %", f"{expected.difference:+.2f} "):
        assert part in output
    assert output.startswith("test: WER ")
    assert "basic" in output
    assert output.count("\n") == 1


@pytest.mark.slow
def test_recogs_are_compared_with_their_generations(tmp_path):
    """Normalization changes these texts, and the words of icefall's own recogs are upper case."""
    transcripts = [
        transcript(
            "it is 25",
            "it is 24",
            "u1",
            raw_reference="It's twenty-five.",
            raw_hypothesis="It's twenty-four",
        ),
        transcript("hello\u2028there", "hello there", "u2", raw_reference="Hello\u2028there!"),
    ]
    folder = results(tmp_path / "a", transcripts, "en")
    found = compare_files(folder / "generations-test-s.jsonl", folder / "recogs-test-s.txt")
    assert (found.difference, found.normalizer, found.utterances) == (0.0, "en", 2)
    chinese = results(
        tmp_path / "zh",
        [transcript("打开 abc", "打开 ab", "u1"), transcript("你好" * 200, "你好" * 200, "u2")],
        "zh",
    )
    assert (
        compare_files(
            chinese / "generations-test-s.jsonl", chinese / "recogs-test-s.txt"
        ).difference
        == 0.0
    )
    icefall = tmp_path / "recogs-icefall.txt"
    icefall.write_text(
        "u1:\tref=['IT', 'IS', '25']\nu1:\thyp=['IT', 'IS', '25']\n"
        "u2:\tref=['HELLO', 'THERE']\nu2:\thyp=['HELLO']\n"
    )
    assert compare_files(folder / "generations-test-s.jsonl", icefall).better == 1
    assert compare_files(icefall, icefall).normalizer == "none"


def test_recogs_of_a_normalizer_that_changes_its_own_output_are_compared_as_written(tmp_path):
    """Whisper's normalizer changes "minus five" to "-5", and "-5" to "5"."""
    raw = [
        ("Minus five degrees.", "Minus five degrees"),
        ("double o seven", "double o eight"),
        ("a", "a"),
    ]
    transcripts = [
        transcript(en(r), en(h), f"u\x1b{i}", raw_reference=r, raw_hypothesis=h)
        for i, (r, h) in enumerate(raw)
    ]
    assert any(en(t.reference) != t.reference for t in transcripts)
    folder = results(tmp_path / "a", transcripts, "en")
    generations, recogs = folder / "generations-test-s.jsonl", folder / "recogs-test-s.txt"
    expected = compare_files(generations, generations)
    for pair in ((generations, recogs), (recogs, generations), (recogs, recogs)):
        found = compare_files(*pair)
        assert (found.a, found.b, found.difference, found.p) == (expected.a, expected.b, 0.0, 1.0)
    assert expected.a == pytest.approx(25.0)


def test_speakers_are_read_from_either_file(tmp_path):
    transcripts = [
        transcript("a b", "a x", f"{s}-{i}", speaker=f"s{s}") for s in range(6) for i in range(2)
    ]
    folder = results(tmp_path / "a", transcripts)
    generations, recogs = folder / "generations-test-s.jsonl", folder / "recogs-test-s.txt"
    assert (
        compare_files(generations, recogs).by == compare_files(recogs, generations).by == "speaker"
    )


@pytest.mark.parametrize("kind", ["recogs", "generations"])
def test_repeated_keys_are_rejected(tmp_path, kind):
    """Otherwise only the last utterance of a key would be compared."""
    transcripts = [
        transcript("a b", "a b", "u1"),
        transcript("a b", "x y", "u1"),
        transcript("c", "c", "u2"),
    ]
    folder = results(tmp_path / "a", transcripts)
    (path,) = folder.glob(f"{kind}-test*")
    with pytest.raises(UserError, match=rf"'{path}' .* 1 .*'u1'"):
        compare_files(path, path)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_recogs_are_recognized_by_their_content(tmp_path, end):
    lines = ["k:\tref=['a', 'b']", "k:\thyp=['a']", ""]
    (tmp_path / "mine.txt").write_text(end.join(lines), newline="")
    rows = read_rows(tmp_path / "mine.txt")
    assert [(row["key"], row["ref"], row["hyp"]) for row in rows] == [("k", "a b", "a")]


def test_icefalls_recogs_with_timestamps_are_read(tmp_path):
    path = tmp_path / "recogs-x.txt"
    lines = [
        "u1:\tref=['a', 'b']",
        "u1:\thyp=['a']",
        "u1:\ttimestamp_ref=[0.0, 0.4]",
        "u1:\ttimestamp_hyp=[0.0]",
    ]
    path.write_text("\n".join(lines) + "\n")
    assert compare_files(path, path).a == 50.0


@pytest.mark.slow
def test_invisible_characters_are_not_errors(tmp_path):
    transcripts = [
        transcript(
            "ab cd",
            "ab cd",
            "u1",
            raw_reference="ab cd",
            raw_hypothesis="\ufeffa\u00adb\u200b cd\u200e",
        )
    ]
    plain = results(tmp_path / "plain", [transcript("ab cd", "ab cd", "u1")])
    for name in ("basic", "en", "none"):
        folder = results(tmp_path / name, transcripts, name)
        assert (
            compare_files(
                folder / "generations-test-s.jsonl", folder / "generations-test-s.jsonl"
            ).a
            == 0.0
        )
        assert (
            compare_files(plain / "recogs-test-s.txt", folder / "generations-test-s.jsonl").b == 0.0
        )


@pytest.mark.slow
def test_second_evaluation_does_not_overwrite_the_first(tmp_path):
    folder, texts = tmp_path / "greedy_search", [noisy(0.3, 1, 20), noisy(0.2, 2, 20)]
    for suffix, transcripts in zip(("iter-4-avg-1", "iter-8-avg-1"), texts, strict=True):
        folder.mkdir(exist_ok=True)
        result = write_results(folder, "test", suffix, score(transcripts), {"normalizer": "basic"})
        write_summary(folder, suffix, {"test": result})
    names = {path.name for path in folder.iterdir()}
    for step in (4, 8):
        assert {
            f"results-iter-{step}-avg-1.json",
            f"generations-test-iter-{step}-avg-1.jsonl",
        } < names
    assert (folder / "results.json").read_text() == (
        folder / "results-iter-8-avg-1.json"
    ).read_text()
    newest = compare_results(folder, folder / "generations-test-iter-4-avg-1.jsonl")
    assert newest == {"test": compare(texts[1], texts[0])}


@pytest.mark.slow
def test_closed_pipe_is_not_an_error(tmp_path):
    folder = results(tmp_path / "a", noisy(0.3, 1, speaker="x"))
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "asrllm.cli", "evaluate", "compare", folder, folder]
    done = subprocess.run(
        command,
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=120,
        env=clean_environment(),
        text=True,
    )
    os.close(writer)
    assert done.returncode == 141
    assert "asrllm evaluate: " not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_results_that_cannot_be_compared_are_reported(tmp_path, capsys):
    def error(*paths):
        return fails(capsys, "evaluate", "compare", *paths)

    full = noisy(0.3, 1)
    a = results(tmp_path / "a", full)
    b = results(tmp_path / "b", full[:-2])
    message = error(a, b)
    assert re.search(rf"'{a}/.*'{b}/.*: 2 ", message)
    assert "'u198'" in message
    other = results(tmp_path / "c", [transcript("q", "q", t.key) for t in full])
    assert re.search(rf"'{a}/.*'{other}/.* 200 ", error(a, other))
    renamed = results(tmp_path / "d", full, name="x")
    assert "(sets: test)" in error(a, renamed)
    assert "(sets: x)" in error(a, renamed)
    assert repr(str(tmp_path / "no")) in error(a, tmp_path / "no")
    assert "'asrllm evaluate compare A B'" in error(a)
    (tmp_path / "recogs-x.txt").write_text("\n")
    with pytest.raises(UserError, match=r"recogs-x\.txt' .*utterances"):
        compare_results(tmp_path / "recogs-x.txt", tmp_path / "recogs-x.txt")
    english = results(tmp_path / "e", full, "en")
    message = error(a, english)
    assert "generations-test-s.jsonl' with 'basic'" in message
    assert "generations-test-s.jsonl' with 'en'" in message
    for name, text in (
        ("generations-x.jsonl", "{"),
        ("generations-y.jsonl", '{"key": "k"}'),
        ("generations-z.jsonl", "[1]"),
        ("recogs-u.txt", "nothing of the kind\n"),
        ("recogs-t.txt", "k:\tref=['b']\nk:\thyp=['b']\nl:\tref = ['b']\nl:\thyp = ['b']\n"),
        ("recogs-y.txt", "k:\tref=['a]"),
        ("recogs-z.txt", "k:\tref=[b]\n"),
        ("recogs-v.txt", "k:\tref=['b']\n"),
        ("generations-v.jsonl", '{"key": "k", "ref": "a", "hyp": ["a"]}'),
        ("recogs-w.txt", "k:\tref=[1]\nk:\thyp=['b']\n"),
        ("generations-w.jsonl", '{"key": "k", "ref": "a", "hyp": "a", "duration": null}'),
    ):
        (tmp_path / name).write_text(text)
        message = error(tmp_path / name, tmp_path / name)
        assert repr(str(tmp_path / name)) in message
        assert "generations-*.jsonl" in message
        assert "Error" not in message  # of Python
    good = json.dumps({"key": "k", "ref": "a", "hyp": "a"})
    (tmp_path / "generations-cut.jsonl").write_text(f"{good}\n{good[:-9]}")
    path = tmp_path / "generations-cut.jsonl"
    message = error(path, path)
    assert repr(str(path)) in message
    assert "line 2" in message


def test_result_file_in_another_directory_is_not_read(tmp_path):
    results(tmp_path / "other", noisy(0.3, 1))
    folder = results(tmp_path / "a", noisy(0.3, 1))
    path = folder / "results.json"
    summary = json.loads(path.read_text())
    summary["test"]["generations"] = "../other/generations-test-s.jsonl"
    path.write_text(json.dumps(summary))
    with pytest.raises(UserError, match=re.escape(str(path))):
        compare_results(folder, folder)
