import json
import logging
import os

import numpy as np
import pytest

from asrllm.data.config import FilterConfig
from asrllm.data.corpora import long_utterance, read_corpora
from asrllm.data.index import RATE, open_index
from asrllm.data.prompts import Prompt
from asrllm.errors import UserError
from asrllm.testing import data_config
from tests.data.test_plan import corpus as corpus_of
from tests.data.test_sources import write_cuts

FILTERS = FilterConfig(min_duration=0.0, max_duration=30.0, max_chars_per_second=1000.0)


def read(tmp_path, *entries, filters=FILTERS):
    return read_corpora(
        data_config(tmp_path / "data.yaml", entries), filters=filters, made=tmp_path / "made"
    )


def test_shards_with_all_their_keys(tmp_path, world):
    prompts = ["Say.", {"prompt": "Schreib.", "weight": 2, "lang": "de"}]
    entry = {
        "name": "n",
        "shards": str(world.shards),
        "hours": 0.01,
        "weights": 2,
        "lang": "en",
        "prompts": prompts,
    }
    (corpus,) = read(tmp_path, entry)
    assert (corpus.name, corpus.weight, corpus.lang, corpus.hours) == ("n", 2.0, "en", 0.01)
    assert corpus.prompts == (Prompt(text="Say."), Prompt(text="Schreib.", weight=2.0, lang="de"))
    assert corpus.kept == len(corpus.index) == 60


def test_a_manifest_becomes_shards_once(tmp_path):
    manifest = write_cuts(tmp_path / "cuts")
    (corpus,) = read(tmp_path, {"manifest": str(manifest)})
    assert corpus.kept == 3
    (shard,) = corpus.index.shards
    made = os.stat(shard).st_mtime_ns
    (again,) = read(tmp_path, {"manifest": str(manifest)})
    assert (again.index.shards[0], os.stat(again.index.shards[0]).st_mtime_ns) == (shard, made)


def test_filters_drop_and_say_how_many(tmp_path, world, caplog):
    filters = FilterConfig(min_duration=0.5, max_duration=1.0, max_chars_per_second=14.0)
    (corpus,) = read(tmp_path, {"shards": str(world.shards)}, filters=filters)
    rows = corpus.index.rows[corpus.passes(corpus.index.rows)]
    assert 0 < len(rows) == corpus.kept < 60
    assert corpus.kept_hours == pytest.approx(rows["samples"].sum() / 16000 / 3600)
    assert rows["samples"].min() >= 8000
    assert rows["samples"].max() <= 16000
    count = 60 - corpus.kept
    expected = f"data.filter drops {count} of 60 utterances ({100 * count / 60:.1f} %): {corpus.dropped['too_short']} too_short, "
    assert expected in caplog.text


@pytest.mark.parametrize(("dropped", "warns"), [(0, False), (3, False), (4, True)])
def test_filters_that_drop_more_than_a_twentieth_are_warned_of(
    tmp_path, world, caplog, dropped, warns
):
    """Of 60 utterances: 5 % are 3."""
    longest = sorted(open_index(world.shards).rows["samples"])[-1 - dropped]
    filters = FilterConfig(
        min_duration=0.0, max_duration=longest / RATE, max_chars_per_second=1000.0
    )
    with caplog.at_level(logging.WARNING):
        (corpus,) = read(tmp_path, {"shards": str(world.shards)}, filters=filters)
    assert corpus.kept == 60 - dropped
    assert [record.getMessage() for record in caplog.records] == (
        [
            f"{corpus.name}: data.filter drops 4 of 60 utterances (6.7 %): 4 too_long. Widen data.filter if you need them."
        ]
        if warns
        else []
    )


@pytest.mark.parametrize(
    ("factor", "warns"),
    [(0.85, True), (0.95, False), (1.0, False), (1.05, False), (1.15, True), (100, True)],
)
def test_stated_hours_that_contradict_the_index_are_warned_of(
    tmp_path, world, caplog, factor, warns
):
    counted = open_index(world.shards).hours
    (corpus,) = read(tmp_path, {"shards": str(world.shards), "hours": factor * counted})
    assert corpus.hours == pytest.approx(factor * counted)
    assert (
        f"hours={factor * counted:g} contradicts the index, which counts {counted:.4g} h."
        in caplog.text
    ) is warns


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "must be a list of entries"),
        (["x"], "expected keys such as 'shards: DIR'"),
        ([{"shard": "x"}], "unknown key 'shard': did you mean 'shards'"),
        ([{"lang": "en"}], "give either 'shards: DIR' or 'manifest"),
        ([{"shards": "/no/such"}], "does not exist"),
        ([{"manifest": "/no/such.jsonl"}], "does not exist"),
        ([{"shards": "SHARDS", "weights": 0}], "weights=0.0 must be above 0"),
        ([{"shards": "SHARDS", "weights": "abc"}], "weights='abc' has the wrong type"),
        ([{"shards": "SHARDS", "weights": 0.001}], "no utterance is left"),
        ([{"shards": "SHARDS", "hours": 0}], "hours=0 must be above 0"),
        ([{"shards": "SHARDS", "hours": [1]}], "hours=\\[1\\] has the wrong type"),
        ([{"shards": "SHARDS", "prompts": "Say."}], "prompts='Say.' has the wrong type"),
        ([{"shards": "SHARDS", "prompts": [1]}], "is neither a text"),
        ([{"shards": "SHARDS", "name": "../x"}], "becomes a part of file names"),
        ([{"shards": 5}], "shards=5 has the wrong type: it must be text"),
        (
            [{"shards": "SHARDS", "lang": False}],
            "lang=False has the wrong type: it must be text: put it in quotes",
        ),
        ([{"shards": ""}], "name='' becomes a part of file names"),
        (
            [{"shards": "SHARDS", "hours": 1e12}],
            "hours=1000000000000.0 must be above 0 and at most",
        ),
    ],
)
def test_a_wrong_data_config_is_one_sentence(tmp_path, world, entries, message):
    entries = json.loads(json.dumps(entries).replace("SHARDS", str(world.shards)))
    with pytest.raises(UserError, match=message):
        read(tmp_path, *entries)


def test_a_missing_and_a_broken_data_config_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"no\.yaml' does not exist"):
        read_corpora(tmp_path / "no.yaml", filters=None, made=tmp_path)
    (tmp_path / "broken.yaml").write_text("- {shards: ")
    with pytest.raises(UserError, match="is not valid YAML"):
        read_corpora(tmp_path / "broken.yaml", filters=None, made=tmp_path)


def test_how_long_utterances_of_training_are():
    """Of what passes the filters; of large corpora a part is looked at."""
    filters = FilterConfig(min_duration=1.0, max_duration=10.0, max_chars_per_second=99)
    kept = corpus_of(np.repeat([16000, 48000, 320000], [50, 150, 2]), filters=filters)
    assert long_utterance([kept]) == 3.0
    assert long_utterance([kept, corpus_of([160000] * 40)]) == 10.0
    assert long_utterance([corpus_of([16000] * 250_000)]) == 1.0
