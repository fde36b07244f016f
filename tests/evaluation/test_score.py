"""Error rates, confidence intervals, hallucination flags and result files."""

import json
from types import SimpleNamespace

import jiwer
import kaldialign
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrllm.evaluation.compare import compare_transcripts
from asrllm.evaluation.decode import (
    FEWEST_BATCHES,
    TEXT_SECONDS,
    CorpusOptions,
    batches_of_rank,
)
from asrllm.evaluation.metric_names import EVALUATION_METRICS
from asrllm.evaluation.result_files import write_results, write_summary
from asrllm.evaluation.score import Transcript, errors, fitting_metric, groups_of, mixed
from asrllm.evaluation.summary import hallucination_flags, score
from asrllm.evaluation.wandb_report import numbers
from asrllm.models.asr_llm.generation import make_batches

WORDS = st.lists(
    st.sampled_from(["a", "bb", "cab", "d", "你", "好吗"]), min_size=1, max_size=8
).map(" ".join)


def transcript(reference, hypothesis, key="k", **more):
    about = {"duration": 2.0, "raw_reference": reference, "raw_hypothesis": hypothesis} | more
    return Transcript(key=key, reference=reference, hypothesis=hypothesis, **about)


def random_transcripts(count=60):
    rng = np.random.default_rng(0)

    def words():
        return " ".join(rng.choice(["a", "bb", "cab", "d"], rng.integers(1, 9)))

    return [transcript(words(), words(), str(i)) for i in range(count)]


@pytest.mark.slow
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=12))
def test_error_rates_match_jiwer_and_kaldialign(pairs):
    transcripts = [transcript(*pair) for pair in pairs]
    references, hypotheses = map(list, zip(*pairs, strict=True))
    found = errors(transcripts)
    theirs = jiwer.process_words(references, hypotheses)
    assert found.rate == pytest.approx(100 * theirs.wer)
    assert found.total.sum() == theirs.insertions + theirs.deletions + theirs.substitutions
    squeezed = [[text.replace(" ", "") for text in texts] for texts in (references, hypotheses)]
    assert errors(transcripts, "cer").rate == pytest.approx(100 * jiwer.cer(*squeezed))
    aligned = [kaldialign.align(r.split(), h.split(), "*") for r, h in pairs]
    assert score(transcripts).errors["wer"].total.tolist() == [
        sum(r != h for r, h in a) for a in aligned
    ]


def test_mixed_rate_counts_characters_or_words_by_script():
    assert mixed("我想 play piano 吗 ok") == ["我", "想", "play", "piano", "吗", "ok"]
    assert mixed("café 42") == ["café", "42"]
    assert errors([transcript("我想 play piano", "我 想 pray piano")], "mer").rate == pytest.approx(
        25.0
    )
    assert fitting_metric(["a b", "c"]) == "wer"
    assert fitting_metric(["你好", "三 2"]) == "cer"
    assert fitting_metric(["你好", "open 门"]) == "mer"
    assert fitting_metric(["穿 t 恤", "你好世界" * 40]) == "cer"
    assert fitting_metric(["he wrote 好", "so it is " * 40]) == "wer"
    assert fitting_metric(["", "12"]) == "wer"


def test_confidence_interval_contains_the_rate_and_narrows_with_more_data():
    few, many = (errors(random_transcripts(n)) for n in (20, 500))
    for found in (few, many):
        low, high = found.confidence_interval()
        assert low < found.rate < high
    assert np.diff(many.confidence_interval()) < np.diff(few.confidence_interval()) / 2
    assert errors([transcript("a b", "a b")] * 50).confidence_interval() == (0.0, 3.0), (
        "the rule of three: 3 in 100 words"
    )
    assert errors([transcript("a b", "a b")]).confidence_interval() == (0.0, 100.0)
    assert errors([transcript("a", "b c d")]).confidence_interval() == (0.0, 300.0), (
        "one utterance gives no bound"
    )


def test_interval_has_the_width_of_95_per_cent():
    """In the normal approximation it has 3.92 standard errors; one of 90 % would have 3.29."""
    wrong = np.random.default_rng(0).random((2000, 5)) < 0.2
    found = errors(
        [
            transcript(
                "a b c d e", " ".join("x" if w else c for w, c in zip(row, "abcde", strict=True))
            )
            for row in wrong
        ]
    )
    standard_error = 100 * wrong.mean(axis=1).std() / 2000**0.5
    assert np.diff(found.confidence_interval())[0] == pytest.approx(3.92 * standard_error, rel=0.08)


@pytest.mark.slow
def test_interval_covers_the_true_rate_in_95_per_cent_of_cases():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        wrong = rng.random((80, 5)) < 0.2
        found = errors(
            [
                transcript(
                    "a b c d e",
                    " ".join("x" if w else c for w, c in zip(row, "abcde", strict=True)),
                )
                for row in wrong
            ]
        )
        low, high = found.confidence_interval()
        covered += low <= 20 <= high
    assert covered >= 86  # 95 are expected; this is four standard deviations less


def test_utterances_of_one_speaker_are_drawn_together():
    """Each of eight speakers is either recognized or not: single utterances are not independent."""
    utterances = [
        transcript("a b", "a b" if s % 2 else "x y", f"{s}-{i}", speaker=f"s{s}")
        for s in range(8)
        for i in range(30)
    ]
    kind, groups = groups_of(utterances)
    assert (kind, len(set(groups))) == ("speaker", 8)
    narrow, wide = (
        errors(utterances).confidence_interval(),
        errors(utterances).confidence_interval(groups),
    )
    assert np.diff(wide) > 3 * np.diff(narrow)
    assert groups_of(utterances[:90]) == ("utterance", None)
    assert groups_of([*utterances, transcript("a", "a")])[0] == "utterance"
    assert (
        groups_of([transcript("a", "a", str(i), recording=f"r{i % 6}") for i in range(12)])[0]
        == "recording"
    )


@pytest.mark.parametrize(
    ("reference", "hypothesis", "end", "flags"),
    [
        ("a b c", "a b c", "stop", []),
        ("a b c", "", "stop", ["empty"]),
        ("", "a", "stop", ["invented"]),
        ("no no no", "no no no", "stop", []),
        ("a b", "a " + "ha " * 9, "stop", ["loop", "burst", "long"]),
        ("a b", "a b c", "loop", ["loop"]),
        ("a b c d", "a b v w x y z c d", "stop", ["burst", "long"]),
        ("a b c d e f g h", "a b", "stop", ["short"]),
        ("a b c", "a b c", "limit", ["limit"]),
    ],
)
def test_hallucination_flags(reference, hypothesis, end, flags):
    utterance = transcript(reference, hypothesis.strip(), end=end)
    assert hallucination_flags(utterance, score([utterance]).pairs[0]) == flags


def test_results_are_broken_down_by_duration_speaker_and_corpus():
    utterances = [
        transcript("a b", "a b", "0", duration=1.0, speaker="x", corpus="p"),
        transcript("a b", "a c", "1", duration=12.0, speaker="y", corpus="q"),
        transcript("a b", "b", "2", duration=40.0, speaker="y", corpus="q"),
    ]
    entry = score(utterances).entry()
    assert {name: row["wer"] for name, row in entry["by_duration"].items()} == {
        "0-2 s": 0.0,
        "10-15 s": 50.0,
        "over 30 s": 50.0,
    }
    assert list(entry["by_speaker"]) == ["y", "x"]
    assert entry["by_corpus"]["q"] == {"utterances": 2, "hours": round(52 / 3600, 4), "wer": 50.0}
    assert entry["percentages"]["wer"] == {
        "ins": 0.0,
        "del": pytest.approx(16.667),
        "sub": pytest.approx(16.667),
    }
    assert entry["hallucinations"]["length_ratio"] == round(5 / 6, 4)
    assert (entry["ci95_by"], entry["metric"]) == ("utterance", "wer")


def test_result_files_have_icefalls_format(tmp_path):
    transcripts = [
        transcript("one two three", "one too three", "x-1"),
        transcript("four", "four five", "x-2"),
        transcript("six six", "six", "x-3"),
    ]
    result = write_results(
        tmp_path, "test", "iter-9-avg-2", score(transcripts), {"normalizer": "basic", "rtfx": 3.0}
    )
    write_summary(tmp_path, "iter-9-avg-2", {"test": result})
    assert (tmp_path / "recogs-test-iter-9-avg-2.txt").read_text().splitlines()[:2] == [
        "x-1:\tref=['one', 'two', 'three']",
        "x-1:\thyp=['one', 'too', 'three']",
    ]
    errs = (tmp_path / "errs-test-iter-9-avg-2.txt").read_text()
    assert errs.startswith(
        "%WER = 50.00\n"
        "Errors: 1 insertions, 1 deletions, 1 substitutions, over 6 reference words (4 correct)\n"
    )
    for line in (
        "x-1:\tone (two->too) three",
        "x-2:\tfour (*->five)",
        "1   two -> too",
        "1   five",
    ):
        assert line in errs.splitlines()
    assert (tmp_path / "wer-summary-test-iter-9-avg-2.txt").read_text().splitlines()[
        0
    ] == "settings\tWER"
    assert (
        (tmp_path / "wer-summary-all-iter-9-avg-2.txt")
        .read_text()
        .splitlines()[1]
        .startswith("test\t50.00\t")
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert {k: results["test"][k] for k in ("wer", "utterances", "normalizer", "rtfx")} == {
        "wer": 50.0,
        "utterances": 3,
        "normalizer": "basic",
        "rtfx": 3.0,
    }
    generations = [
        json.loads(line)
        for line in (tmp_path / "generations-test-iter-9-avg-2.jsonl").read_text().splitlines()
    ]
    assert generations[0] == {
        "key": "x-1",
        "duration": 2.0,
        "ref": "one two three",
        "hyp": "one too three",
        "normalizer": "basic",
    }


def test_chinese_results_are_in_characters(tmp_path):
    result = write_results(
        tmp_path,
        "zh",
        "pretrained",
        score([transcript("你好世界", "你好师姐", "u")]),
        {"normalizer": "zh"},
    )
    assert (result["metric"], result["cer"], result["wer"]) == ("cer", 50.0, 100.0)
    assert "u:\tref=['你', '好', '世', '界']" in (tmp_path / "recogs-zh-pretrained.txt").read_text()
    assert (
        (tmp_path / "errs-zh-pretrained.txt")
        .read_text()
        .startswith("%WER = 50.00\nErrors: 0 insertions, 0 deletions, 2 substi")
    )


def test_decoding_batches_have_similar_lengths_within_the_budget():
    seconds = np.random.default_rng(0).integers(1600, 320000, 200) / 16000
    batches = make_batches(seconds, 60.0)
    assert sorted(row for batch in batches for row in batch) == list(range(200))
    assert all(len(b) * seconds[b].max() <= 60.0 for b in batches)
    assert 1 - seconds.sum() / sum(len(b) * seconds[b].max() for b in batches) < 0.1
    assert [len(b) for b in make_batches(seconds, 0.01)] == [1] * 200
    assert sorted(row for batch in make_batches(seconds, 60.0, skip={3, 5}) for row in batch) == [
        r for r in range(200) if r not in (3, 5)
    ]


@pytest.mark.parametrize("parallel", [2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_threads_get_equally_many_batches_of_similar_work(parallel, seed):
    seconds = np.random.default_rng(seed).gamma(4.0, 0.6, 400)
    rows = {"samples": (seconds * 16000).astype(int)}
    corpus = SimpleNamespace(index=SimpleNamespace(rows=rows))
    engine = SimpleNamespace(parallel=parallel, padded_to=0.0)
    options = CorpusOptions(prompt="", max_batch_duration=1000.0, max_bad_share=0)
    batches = batches_of_rank(engine, corpus, options, skip={7})
    assert sorted(row for batch in batches for row in batch) == [
        row for row in range(400) if row != 7
    ]
    assert len(batches) == parallel * FEWEST_BATCHES
    work = [float((seconds[batch].max() + TEXT_SECONDS) * len(batch)) for batch in batches]
    assert sum(work) / parallel > 0.85 * FEWEST_BATCHES * max(work)


def test_metrics_of_an_evaluation_have_a_unit_and_a_meaning():
    transcripts = random_transcripts(8)
    scored = score(transcripts)
    comparison = compare_transcripts(transcripts, transcripts, normalizer="none")
    baseline = scored.rates() | {"rtfx": 1.0, "paired": comparison.entry()}
    entry = scored.entry() | {"rtfx": 1.0, "unreadable": 0, "baseline": baseline}
    assert numbers(entry).keys() == EVALUATION_METRICS.keys()
    assert all(unit and meaning for unit, meaning in EVALUATION_METRICS.values())
