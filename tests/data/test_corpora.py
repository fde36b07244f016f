import json
import logging
import os

import numpy as np
import pytest

from asrllm.data.config import FilterConfig
from asrllm.data.corpora import long_utterance, read_corpora
from asrllm.data.index import open_index
from asrllm.data.prompts import Prompt
from asrllm.defaults import RATE
from asrllm.errors import UserError
from asrllm.testing import data_config
from tests.data.test_plan import corpus as corpus_of
from tests.data.test_sources import write_cuts

FILTERS = FilterConfig(min_duration=0.0, max_duration=30.0, max_chars_per_second=1000.0)


def read(tmp_path, *entries, filters=FILTERS):
    return read_corpora(
        data_config(tmp_path / "data.yaml", entries), filters=filters, shards_dir=tmp_path / "made"
    )


def test_an_entry_with_all_keys_is_read(tmp_path, world):
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
    assert corpus.usable == len(corpus.index) == 60


def test_a_manifest_is_converted_to_shards_once(tmp_path):
    manifest = write_cuts(tmp_path / "cuts")
    (corpus,) = read(tmp_path, {"manifest": str(manifest)})
    assert corpus.usable == 3
    (shard,) = corpus.index.shards
    made = os.stat(shard).st_mtime_ns
    (again,) = read(tmp_path, {"manifest": str(manifest)})
    assert (again.index.shards[0], os.stat(again.index.shards[0]).st_mtime_ns) == (shard, made)


def test_filters_log_how_many_utterances_they_drop(tmp_path, world, caplog):
    filters = FilterConfig(min_duration=0.5, max_duration=1.0, max_chars_per_second=14.0)
    (corpus,) = read(tmp_path, {"shards": str(world.shards)}, filters=filters)
    rows = corpus.index.rows[corpus.passes(corpus.index.rows)]
    assert 0 < len(rows) == corpus.usable < 60
    assert corpus.usable_hours == pytest.approx(rows["samples"].sum() / 16000 / 3600)
    assert rows["samples"].min() >= 8000
    assert rows["samples"].max() <= 16000
    count = 60 - corpus.usable
    assert f" {count} of 60 utterances ({100 * count / 60:.1f} %)" in caplog.text
    assert f" {corpus.dropped['too_short']} too_short" in caplog.text


@pytest.mark.parametrize(("dropped", "warns"), [(0, False), (3, False), (4, True)])
def test_filters_that_drop_more_than_5_percent_cause_a_warning(
    tmp_path, world, caplog, dropped, warns
):
    """5 % of the 60 utterances are 3."""
    longest = sorted(open_index(world.shards).rows["samples"])[-1 - dropped]
    filters = FilterConfig(
        min_duration=0.0, max_duration=longest / RATE, max_chars_per_second=1000.0
    )
    with caplog.at_level(logging.WARNING):
        (corpus,) = read(tmp_path, {"shards": str(world.shards)}, filters=filters)
    assert corpus.usable == 60 - dropped
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == warns
    for message in messages:
        assert message.startswith(f"{corpus.name}: data.filter ")
        assert " 4 of 60 utterances (6.7 %): 4 too_long" in message


@pytest.mark.parametrize(
    ("factor", "warns"),
    [(0.85, True), (0.95, False), (1.0, False), (1.05, False), (1.15, True), (100, True)],
)
def test_stated_hours_that_contradict_the_index_cause_a_warning(
    tmp_path, world, caplog, factor, warns
):
    counted = open_index(world.shards).hours
    (corpus,) = read(tmp_path, {"shards": str(world.shards), "hours": factor * counted})
    assert corpus.hours == pytest.approx(factor * counted)
    assert (f"hours={factor * counted:g} " in caplog.text) is warns
    assert (f" {counted:.4g} h" in caplog.text) is warns


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "data.yaml'"),
        (["x"], "entry 1: 'x'"),
        ([{"shard": "x"}], "entry 1: .*'shard'.*'shards'"),
        ([{"lang": "en"}], "entry 1: .*'shards: DIR'.*'manifest"),
        ([{"shards": "/no/such"}], "'/no/such' .*'asrllm shards make /no/such "),
        ([{"manifest": "/no/such.jsonl"}], "'/no/such.jsonl' "),
        ([{"shards": "SHARDS", "weights": 0}], "weights=0 .* 0"),
        ([{"shards": "SHARDS", "weights": "abc"}], "weights='abc'"),
        ([{"shards": "SHARDS", "weights": 0.001}], "entry 1: no utterance .*data.filter.*weights"),
        ([{"shards": "SHARDS", "hours": 0}], "hours=0 .* 0"),
        ([{"shards": "SHARDS", "hours": [1]}], r"hours=\[1\]"),
        ([{"shards": "SHARDS", "prompts": "Say."}], "prompts='Say.'"),
        ([{"shards": "SHARDS", "prompts": [1]}], "entry 1, prompt 1: 1 "),
        ([{"shards": "SHARDS", "name": "../x"}], r"name='\.\./x'"),
        ([{"shards": "~/a"}], "shards='~/a'"),
        ([{"shards": "~"}], "shards='~'"),
        ([{"manifest": "$HOME/a"}], r"manifest='\$HOME/a'"),
        ([{"manifest": "${HOME}/a"}], r"manifest='\$\{HOME\}/a'"),
        ([{"shards": "SHARDS/*.tar"}], r" shards='.*/\*\.tar'"),
        ([{"manifest": "a b.jsonl"}], r" manifest='a b\.jsonl'"),
        ([{"shards": 5}], "shards=5 "),
        ([{"shards": "SHARDS", "lang": False}], "lang=false "),
        ([{"shards": ""}], "shards "),
        ([{"shards": "SHARDS", "hours": 1e12}], "hours=1000000000000.0 .* 1000000000"),
    ],
)
def test_an_invalid_data_config_is_reported(tmp_path, world, entries, message):
    entries = json.loads(json.dumps(entries).replace("SHARDS", str(world.shards)))
    with pytest.raises(UserError, match=message):
        read(tmp_path, *entries)


def test_a_data_config_may_begin_with_a_byte_order_mark(tmp_path, world):
    text = f"\ufeff- {{name: a, shards: {world.shards}}}\r\n"
    (tmp_path / "data.yaml").write_text(text, encoding="utf-8", newline="")
    (corpus,) = read_corpora(tmp_path / "data.yaml", filters=None, shards_dir=tmp_path)
    assert corpus.name == "a"


def test_a_missing_or_malformed_data_config_is_reported(tmp_path):
    with pytest.raises(UserError, match=rf"'{tmp_path}/no\.yaml'"):
        read_corpora(tmp_path / "no.yaml", filters=None, shards_dir=tmp_path)
    (tmp_path / "broken.yaml").write_text("- {shards: ")
    with pytest.raises(UserError, match=r"broken\.yaml:1:12"):
        read_corpora(tmp_path / "broken.yaml", filters=None, shards_dir=tmp_path)
    (tmp_path / "twice.yaml").write_text("- name: a\n  shards: x\n  shards: y\n")
    with pytest.raises(UserError, match=r"twice\.yaml:3:3.*'shards'"):
        read_corpora(tmp_path / "twice.yaml", filters=None, shards_dir=tmp_path)


@pytest.mark.parametrize(
    "second", [{"shards": "/no/such"}, {"manifest": "/no/such.jsonl"}, {"shard": "/no/such"}]
)
def test_later_entries_are_checked_before_shards_are_made(tmp_path, second):
    (tmp_path / "cuts.jsonl").write_text("no cuts")
    first = {"manifest": str(tmp_path / "cuts.jsonl")}
    with pytest.raises(UserError, match=r"entry 2|/no/such"):
        read(tmp_path, first, second)
    assert not list(tmp_path.glob("**/*.tar"))


def test_long_utterance_is_the_99th_percentile_of_kept_durations():
    """A large corpus is sampled."""
    filters = FilterConfig(min_duration=1.0, max_duration=10.0, max_chars_per_second=99)
    kept = corpus_of(np.repeat([16000, 48000, 320000], [50, 150, 2]), filters=filters)
    assert long_utterance([kept]) == 3.0
    assert long_utterance([kept, corpus_of([160000] * 40)]) == 10.0
    assert long_utterance([corpus_of([16000] * 250_000)]) == 1.0
