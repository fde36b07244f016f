"""report.html as a file: its data, and that no foreign script can run or be loaded."""

import base64
import html.parser
import io
import json
import re

import numpy as np
import pytest
import soundfile

from asrllm.evaluation.compare import compare_transcripts
from asrllm.evaluation.report import (
    ReportSet,
    alignment_runs,
    choose_audio,
    encode_audio,
    join_units,
    rate_counts,
    rate_names,
    write_report,
)
from asrllm.evaluation.score import Errors, Transcript, align
from asrllm.evaluation.summary import Scored, score
from asrllm.evaluation.wandb_report import TABLE_COLUMNS, log_to_wandb
from asrllm.testing import WORDS, tone
from asrllm.training.run_config import WandbConfig
from tests.processes import wait_for
from tests.test_end_to_end import wandb_records

ATTACK = "</script><script>alert(1)</script>\u2028<img src=x onerror=alert(2)>{{script}}"
ABOUT = {
    "normalizer": "english",
    "rtfx": 40.0,
    "unreadable": 2,
    "prompt": "Repeat <it>.",
    "weights": "exp/averaged-iter-9-avg-2.pt",
    "lang": "en",
}


def transcript(key: str, reference: str, hypothesis: str, **more: object) -> Transcript:
    fields = {"duration": 2.0, "raw_reference": reference, "raw_hypothesis": hypothesis} | more
    return Transcript(
        key=key,
        reference=reference,
        hypothesis=hypothesis,
        **fields,  # type: ignore[arg-type]
    )


def decoded(
    count: int = 40, *, seed: int = 0, speakers: int = 7, error_rate: float = 0.2
) -> Scored:
    """Utterances of one to twelve words, some of them replaced; the last one is correct."""
    rng, references = np.random.default_rng(seed), np.random.default_rng(99)
    found = []
    for i in range(count):
        words = references.choice(WORDS, references.integers(1, 13)).tolist()
        spoken = [
            str(rng.choice(WORDS)) if i < count - 1 and rng.random() < error_rate else word
            for word in words
        ]
        who = {"speaker": f"s{i % speakers}" if speakers else "", "duration": 0.5 * len(words) + 1}
        found.append(transcript(f"utt{i:03d}", " ".join(words), " ".join(spoken), **who))
    return score(found)


def report_set(name: str, scored: Scored, **more: object) -> ReportSet:
    entry = scored.entry() | ABOUT
    if "baseline" in more:
        entry["baseline"] = {
            "paired": compare_transcripts(
                more["baseline"].transcripts, scored.transcripts, normalizer=""
            ).entry()
        }
    return ReportSet(name=name, scored=scored, entry=entry, **more)  # type: ignore[arg-type]


class Page(html.parser.HTMLParser):
    """The elements of a page with their attributes, and its data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        self.data = json.loads(
            re.search('<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[
                1
            ]
        )

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))


def read_page(path, *sets: ReportSet, title: str = "a run") -> Page:
    write_report(path, title, sets)
    return Page(path.read_text(encoding="utf-8"))


def test_page_loads_nothing(tmp_path):
    page = read_page(tmp_path / "report.html", report_set("test", decoded()))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\"'\s]+", text)) == {
        "http://www.w3.org/1999/xhtml",
        "http://www.w3.org/2000/svg",
    }
    assert not [
        (tag, a)
        for tag, a in page.elements
        if {"src", "data", "srcset"} & a.keys() or tag in ("link", "img", "iframe", "base")
    ]
    assert all(a["href"].startswith("#") for _, a in page.elements if "href" in a)
    assert not re.search(r"@import|url\((?!#)", text)
    (policy,) = [
        a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_texts_and_names_are_not_interpreted_as_markup(tmp_path):
    scored = score(
        [
            transcript(ATTACK, ATTACK, "one", speaker=ATTACK),
            transcript("k2", "one", ATTACK, speaker="s"),
        ]
    )
    plain = read_page(tmp_path / "plain.html", report_set("test", decoded()))
    page = read_page(tmp_path / "report.html", report_set(ATTACK, scored), title=ATTACK)
    assert page.elements == plain.elements, "the data adds no element"
    assert [row["ref"] for row in page.data["utterances"] if row["key"] == ATTACK] == [ATTACK]
    assert page.data["sets"][0]["name"] == ATTACK
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "\u2028" not in text.partition('id="data">')[2]
    assert "alert(1)</script>" not in text


@pytest.mark.slow
def test_data_matches_the_results_and_is_sorted_worst_first(tmp_path):
    ours, theirs = decoded(), decoded(seed=1, error_rate=0.5)
    s = report_set("test", ours, baseline=theirs)
    (shown,) = (data := read_page(tmp_path / "report.html", s).data)["sets"]
    for key in ("wer", "wer_ci95", "cer", "mer_ci95", "hallucinations", "ci95_by"):
        assert shown["model"][key] == s.entry[key]
        assert shown["baseline"][key] == theirs.entry()[key]
    assert shown["about"] | {"unreadable": shown["unreadable"]} == ABOUT
    assert [row["name"] for row in shown["by_speaker"]] == list(s.entry["by_speaker"])
    assert {row["name"]: row["baseline"] for row in shown["by_duration"]} == {
        n: of["wer"] for n, of in theirs.by_duration().items()
    }
    assert shown["comparison"]["difference"] == pytest.approx(
        ours.main.rate - theirs.main.rate, abs=1e-3
    )
    rows = data["utterances"]
    assert [row["errors"] for row in rows] == sorted((row["errors"] for row in rows), reverse=True)
    assert (
        sum(row["errors"] for row in rows)
        == sum(row["ins"] + row["del"] + row["sub"] for row in rows)
        == ours.main.total.sum()
    )
    assert sum(row["baseline"]["errors"] for row in rows) == theirs.main.total.sum()
    assert [row["key"] for row in rows[:5]] == [
        ours.transcripts[i].key for i in choose_audio(ours, 5)
    ]


def test_several_sets_are_also_pooled(tmp_path):
    spoken = [
        transcript(f"z{i}", "今天天气好", "今天气真好", raw_reference="今天天气好。")
        for i in range(30)
    ]
    english, chinese = decoded(), score(spoken)
    sets = [report_set("en", english), report_set("zh", chinese)]
    data = read_page(tmp_path / "report.html", *sets).data
    assert [(s["name"], s["metric"], s.get("pooled")) for s in data["sets"]] == [
        ("en", "wer", None),
        ("zh", "cer", None),
        ("all sets", "mer", True),
    ]
    assert [s["unreadable"] for s in data["sets"]] == [2, 2, 4]
    total = english.errors["mer"].total.sum() + chinese.errors["mer"].total.sum()
    units = english.errors["mer"].units.sum() + chinese.errors["mer"].units.sum()
    assert data["sets"][2]["model"]["mer"] == pytest.approx(100 * total / units, abs=1e-3)
    row = next(row for row in data["utterances"] if row["set"] == 1)
    assert row["aligned"] == ["今天", [["天", ""]], "气", [["", "真"]], "好"]
    assert row["ref"] == "今天天气好。"


def test_page_without_baseline_speakers_or_audio(tmp_path):
    data = read_page(tmp_path / "report.html", report_set("test", decoded(speakers=0))).data
    (shown,) = data["sets"]
    assert (shown["baseline"], shown["comparison"], shown["by_speaker"], shown["speakers"]) == (
        None,
        None,
        [],
        0,
    )
    assert not [row for row in data["utterances"] if {"baseline", "audio"} & row.keys()]


def test_audio_is_an_mp3_of_the_utterance(tmp_path):
    wave = tone("three", 1.5)
    info = soundfile.info(io.BytesIO(encode_audio(wave)))
    assert (info.format, info.samplerate, info.channels) == ("MP3", 16000, 1)
    assert info.duration == pytest.approx(1.5, abs=0.1)
    data = read_page(
        tmp_path / "report.html",
        report_set("test", decoded(), audio={"utt003": encode_audio(wave)}),
    ).data
    (row,) = [row for row in data["utterances"] if "audio" in row]
    assert row["key"] == "utt003"
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(row["audio"])))
    pitch = np.argmax(np.abs(np.fft.rfft(samples))) * rate / len(samples)
    assert pitch == pytest.approx(200 * 1.25**3, rel=0.01)


def test_alignment_is_grouped_into_runs():
    reference, hypothesis = (
        ["one", "two", "three", "four", "five"],
        ["one", "too", "three", "five", "six"],
    )
    pairs = align(reference, hypothesis)
    found = alignment_runs(pairs, "wer")
    assert found == ["one", [("two", "too")], "three", [("four", "")], "five", [("", "six")]]
    assert join_units(["今", "天", "hello", "world", "好"], "mer") == "今天hello world好"
    assert join_units(["今", "a", "b"], "cer") == "今ab"


def test_rates_are_counted_in_their_bins():
    units = np.array([10, 10, 10, 10, 0, 0])
    errors = Errors(
        ins=np.array([0, 1, 10, 11, 0, 2]),
        dels=np.zeros(6, int),
        subs=np.zeros(6, int),
        units=units,
    )
    assert {n: c for n, c in zip(rate_names(), rate_counts(errors), strict=True) if c} == {
        "0": 2,
        "0-10": 1,
        "90-100": 1,
        "over 100": 2,
    }


@pytest.mark.slow
def test_wandb_run_has_numbers_and_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    exp, s = (
        tmp_path / "exp",
        report_set("test", decoded(), audio={"utt003": encode_audio(tone("one", 0.5))}),
    )
    s.entry["baseline"] = {
        "wer": 30.0,
        "wer_ci95": [25.0, 35.0],
        "paired": {"difference": -3.0, "by": "speaker"},
    }
    exp.mkdir()
    other = report_set("other", decoded(seed=1, error_rate=0.5))
    log_to_wandb(WandbConfig(mode="offline", project="p", name=None), exp, [s, other])
    (path,) = (exp / "wandb").rglob("run-*.wandb")
    wait_for(
        lambda: any(record.HasField("exit") for record in wandb_records(path))
    )  # another process writes it
    logged, runs_found, files = {}, [], []
    for record in wandb_records(path):
        if record.HasField("history"):
            logged |= {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
        if record.HasField("run"):
            runs_found.append(record.run)
        if record.HasField("artifact"):
            files += [entry.path for entry in record.artifact.manifest.contents]
    assert (runs_found[0].display_name, runs_found[0].run_group, runs_found[0].job_type) == (
        "exp-evaluate",
        "exp",
        "evaluate",
    )
    assert logged["test/wer"] == s.entry["wer"]
    assert [logged["test/wer_low"], logged["test/wer_high"]] == s.entry["wer_ci95"]
    assert {key: value for key, value in logged.items() if key.startswith("test/baseline/")} == {
        "test/baseline/wer": 30.0,
        "test/baseline/wer_low": 25.0,
        "test/baseline/wer_high": 35.0,
        "test/baseline/paired/difference": -3.0,
    }
    assert sum(name.endswith(".mp3") for name in files) == 1
    (table,) = (path.parent / "files" / "media").rglob("*.table.json")
    rows = json.loads(table.read_text())
    assert rows["columns"] == list(TABLE_COLUMNS)
    errors = [row[TABLE_COLUMNS.index("errors")] for row in rows["data"]]
    assert errors == sorted(errors, reverse=True)
    for each in (s, other):
        assert [row[1] for row in rows["data"] if row[0] == each.name] == [
            each.scored.transcripts[i].key for i in choose_audio(each.scored, 40)
        ]
    assert len(errors) == len(s.scored.transcripts) + len(other.scored.transcripts)
    names = {
        "/".join(key.split("/")[:2]) for key in logged if not key.startswith(("test/", "other/"))
    }
    assert {name for name in names if not name.startswith("_")} == {"evaluation/samples"}
