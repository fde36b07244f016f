import json

import jiwer
import numpy as np
import pytest

from asrllm.evaluation.decode import make_batches
from asrllm.evaluation.files import write_results, write_summary
from asrllm.evaluation.score import Transcript, character_errors, word_errors
from tests.data.test_plan import corpus as corpus_of


def transcript(reference, hypothesis, key="k"):
    return Transcript(key=key, reference=reference, hypothesis=hypothesis, raw_reference=reference, raw_hypothesis=hypothesis, duration=2.0)


def random_transcripts(count=60):
    rng = np.random.default_rng(0)

    def words():
        return " ".join(rng.choice(["a", "bb", "cab", "d"], rng.integers(1, 9)))

    return [transcript(words(), words(), str(i)) for i in range(count)]


def test_error_rates_are_jiwers():
    transcripts = random_transcripts()
    references, hypotheses = [t.reference for t in transcripts], [t.hypothesis for t in transcripts]
    errors = word_errors(transcripts)
    theirs = jiwer.process_words(references, hypotheses)
    assert errors.rate == pytest.approx(100 * theirs.wer)
    assert errors.total.sum() == theirs.insertions + theirs.deletions + theirs.substitutions
    squeezed = [[text.replace(" ", "") for text in texts] for texts in (references, hypotheses)]
    assert character_errors(transcripts).rate == pytest.approx(100 * jiwer.cer(*squeezed))


def test_the_confidence_interval_holds_the_rate_and_narrows():
    few, many = (word_errors(random_transcripts(n)) for n in (20, 500))
    for errors in (few, many):
        low, high = errors.confidence_interval()
        assert low < errors.rate < high
    assert np.diff(many.confidence_interval()) < np.diff(few.confidence_interval()) / 2
    assert word_errors([transcript("a b", "a b")]).confidence_interval() == (0.0, 0.0)


def test_result_files_have_icefalls_forms(tmp_path):
    transcripts = [
        transcript("one two three", "one too three", "x-1"),
        transcript("four", "four five", "x-2"),
        transcript("six six", "six", "x-3"),
    ]
    result = write_results(tmp_path, "test", "iter-9-avg-2", transcripts, {"normalizer": "basic", "rtfx": 3.0})
    write_summary(tmp_path, "iter-9-avg-2", {"test": result})
    assert (tmp_path / "recogs-test-iter-9-avg-2.txt").read_text().splitlines()[:2] == [
        "x-1:\tref=['one', 'two', 'three']",
        "x-1:\thyp=['one', 'too', 'three']",
    ]
    errs = (tmp_path / "errs-test-iter-9-avg-2.txt").read_text()
    assert errs.startswith("%WER = 50.00\nErrors: 1 insertions, 1 deletions, 1 substitutions, over 6 reference words (4 correct)\n")
    for line in ("x-1:\tone (two->too) three", "x-2:\tfour (*->five)", "1   two -> too", "1   five"):
        assert line in errs.splitlines()
    assert (tmp_path / "wer-summary-test-iter-9-avg-2.txt").read_text().splitlines()[0] == "settings\tWER"
    assert (tmp_path / "wer-summary-all-iter-9-avg-2.txt").read_text().splitlines()[1].startswith("test\t50.00\t")
    results = json.loads((tmp_path / "results.json").read_text())
    assert {k: results["test"][k] for k in ("wer", "utterances", "normalizer", "rtfx")} == {
        "wer": 50.0, "utterances": 3, "normalizer": "basic", "rtfx": 3.0
    }  # fmt: skip
    generations = [json.loads(line) for line in (tmp_path / "generations-test.jsonl").read_text().splitlines()]
    assert generations[0] == {"key": "x-1", "duration": 2.0, "ref": "one two three", "hyp": "one too three"}


def test_decoding_batches_hold_similar_lengths_within_the_budget():
    corpus = corpus_of(np.random.default_rng(0).integers(1600, 320000, 200))
    batches = make_batches(corpus, 60.0)
    seconds = corpus.index.rows["samples"] / 16000
    assert sorted(row for batch in batches for row in batch) == list(range(200))
    assert all(len(b) * seconds[b].max() <= 60.0 for b in batches)
    assert 1 - seconds.sum() / sum(len(b) * seconds[b].max() for b in batches) < 0.1
    assert [len(b) for b in make_batches(corpus, 0.01)] == [1] * 200
