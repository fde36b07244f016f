import base64
import importlib.util
import json
import re

import numpy as np
import pytest

from asrllm.data.index import ROW, Index
from asrllm.data.stats import (
    MAX_BINS,
    check_drawing,
    collect_statistics,
    draw,
    statistics_json,
    statistics_text,
)
from asrllm.defaults import RATE
from asrllm.errors import UserError


def index(seconds, characters, **about):
    rows = np.zeros(len(seconds), ROW)
    rows["samples"] = np.asarray(seconds) * RATE
    rows["text_chars"] = characters
    return Index(rows=rows, shards=["a.tar"], starts=np.array([0, len(rows)]), about=about)


def group(utterances, hours):
    return {"utterances": utterances, "hours": hours}


@pytest.fixture
def statistics():
    rng = np.random.default_rng(0)
    first = index(
        rng.uniform(1, 20, 900),
        100,
        corpora={"a": group(900, 2.5)},
        languages={"en": group(900, 2.5)},
        speakers=7,
    )
    second = index(
        [36.0] * 100,
        900,
        corpora={"a": group(60, 0.6), "b": group(40, 0.4)},
        languages={"": group(100, 1.0)},
        speakers=0,
    )
    return collect_statistics("<x>", [first, second])


def test_statistics_sum_several_directories(statistics):
    assert (statistics.utterances, statistics.shards, statistics.speakers) == (1000, 2, 7)
    assert statistics.corpora == {"a": group(960, 3.1), "b": group(40, 0.4)}
    assert statistics.languages == {"en": group(900, 2.5), "": group(100, 1.0)}
    assert statistics.percentiles["seconds"]["100"] == 36.0
    assert statistics.percentiles["characters"]["50"] == 100
    rates = np.concatenate([100 / np.random.default_rng(0).uniform(1, 20, 900), [25] * 100])
    found = statistics.percentiles["characters_per_second"]["95"]
    assert found == pytest.approx(np.percentile(rates, 95), rel=1e-3)
    for histogram in statistics.histograms.values():
        assert sum(histogram.counts) == 1000
        assert len(histogram.edges) == len(histogram.counts) + 1 <= MAX_BINS + 1


def test_outliers_are_counted_in_the_last_bin():
    statistics = collect_statistics("x", [index([*np.linspace(1, 10, 999), 3000.0], 50)])
    histogram = statistics.histograms["seconds"]
    assert histogram.edges[-1] == 10
    assert sum(histogram.counts) == 1000


def test_equal_lengths_make_one_bin():
    assert collect_statistics("x", [index([8.0] * 3, 4)]).histograms["seconds"].counts == [3]


def test_the_terminal_shows_tables_and_bars(statistics):
    text = statistics_text(statistics, width=60)
    assert text.startswith("<x>: 1000 utterances, 3.")
    assert re.search(r"^corpus +utterances +hours\na +960 +3\.10\nb +40 +0\.40$", text, flags=re.M)
    assert re.search(r"^\(none\) +100 +1\.00$", text, flags=re.M)
    assert max(map(len, text.splitlines())) <= 80
    assert "█" in text
    assert len(statistics_text(collect_statistics("x", [index([1.0], 3)])).splitlines()) < 20


def test_json_contains_all_statistics(statistics):
    about = json.loads(statistics_json(statistics))
    assert about["corpora"]["b"] == group(40, 0.4)
    assert len(about["histograms"]["seconds"]["counts"]) > 3


@pytest.mark.slow
def test_png_and_html_are_written(tmp_path, statistics):
    pytest.importorskip("matplotlib")
    draw(statistics, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    draw(statistics, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert "<title>&lt;x&gt;</title>" in page
    assert "<td>960</td>" in page
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    assert "http" not in page


@pytest.mark.parametrize(
    ("name", "message"), [("a.pdf", r"a\.pdf.*\.png.*\.html"), ("no/a.png", "{}/no/a.png")]
)
def test_an_unusable_drawing_is_reported(tmp_path, name, message):
    with pytest.raises(UserError, match=message.format(tmp_path)):
        check_drawing(tmp_path / name)


def test_missing_matplotlib_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'asrllm\[plot\]'"):
        check_drawing(tmp_path / "a.png")
