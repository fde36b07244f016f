import json

import pytest

from asrllm.data.config import FilterConfig
from asrllm.data.corpora import read_corpora
from asrllm.errors import UserError
from asrllm.testing import data_config
from tests.data.test_sources import write_cuts

FILTERS = FilterConfig(min_duration=0.0, max_duration=30.0, max_bytes_per_second=1000.0)


def read(tmp_path, *entries, filters=FILTERS):
    return read_corpora(data_config(tmp_path / "data.yaml", entries), filters=filters, cache=tmp_path / "cache")


def test_shards_with_all_their_keys(tmp_path, world):
    entry = {"name": "n", "shards": str(world.shards), "hours": 0.01, "weights": 2, "lang": "en", "prompts": ["Say."]}
    (corpus,) = read(tmp_path, entry)
    assert (corpus.name, corpus.weight, corpus.lang, corpus.prompts) == ("n", 2.0, "en", ("Say.",))
    assert len(corpus.rows) == len(corpus.index) == 60


def test_a_manifest_becomes_shards_once(tmp_path):
    manifest = write_cuts(tmp_path / "cuts")
    (corpus,) = read(tmp_path, {"manifest": str(manifest)})
    assert len(corpus.rows) == 3
    (shard,) = corpus.index.shards
    made = shard.stat().st_mtime_ns
    (again,) = read(tmp_path, {"manifest": str(manifest)})
    assert (again.index.shards[0], again.index.shards[0].stat().st_mtime_ns) == (shard, made)


def test_filters_drop_and_say_how_many(tmp_path, world, caplog):
    filters = FilterConfig(min_duration=0.5, max_duration=1.0, max_bytes_per_second=14.0)
    (corpus,) = read(tmp_path, {"shards": str(world.shards)}, filters=filters)
    rows = corpus.index.rows[corpus.rows]
    assert 0 < len(rows) < 60
    assert rows["samples"].min() >= 8000
    assert rows["samples"].max() <= 16000
    assert "data.filter drops" in caplog.text
    assert "too_short" in caplog.text


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
        ([{"shards": "SHARDS", "hours": [1]}], "hours=\\[1\\] has the wrong type"),
        ([{"shards": "SHARDS", "prompts": "Say."}], "prompts='Say.' has the wrong type"),
        ([{"shards": "SHARDS", "prompts": [1]}], "must be a list of texts"),
        ([{"shards": "SHARDS", "name": "../x"}], "becomes a part of file names"),
        ([{"shards": 5}], "shards=5 has the wrong type"),
    ],
)
def test_a_wrong_data_config_is_one_sentence(tmp_path, world, entries, message):
    entries = json.loads(json.dumps(entries).replace("SHARDS", str(world.shards)))
    with pytest.raises(UserError, match=message):
        read(tmp_path, *entries)


def test_a_missing_and_a_broken_data_config_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"no\.yaml' does not exist"):
        read_corpora(tmp_path / "no.yaml", filters=None, cache=tmp_path)
    (tmp_path / "broken.yaml").write_text("- {shards: ")
    with pytest.raises(UserError, match="is not valid YAML"):
        read_corpora(tmp_path / "broken.yaml", filters=None, cache=tmp_path)
