"""report.html: one file that shows the errors of test sets in any browser, without a network."""

import base64
import hashlib
import html
import io
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from asrllm.atomic import write_whole
from asrllm.data.index import RATE
from asrllm.evaluation.compare import compare
from asrllm.evaluation.files import most_wrong
from asrllm.evaluation.score import UNSPACED, Errors, Transcript
from asrllm.evaluation.summary import HALLUCINATION_FLAGS, Pairs, Scored, score

ABOUT = ("normalizer", "rtfx", "prompt", "weights", "lang")
RATES = (0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)  # per cent; the borders of the distribution
SPEAKERS, WRONG = 30, 15  # how many are shown
STYLES, SCRIPTS = (
    ("report.css",),
    ("dom.js", "charts.js", "sections.js", "utterances.js", "report.js"),
)


@dataclass(frozen=True, kw_only=True)
class ReportSet:
    """A test set in the report. entry: its entry of results.json.

    baseline: another's texts of the same utterances in the same order; the entry's "baseline" then has their comparison as "paired".

    audio: {key: file of encode_audio} of the utterances that can be heard.
    """

    name: str
    scored: Scored
    entry: dict[str, Any]
    baseline: Scored | None = None
    audio: dict[str, bytes] = field(default_factory=dict)


def encode_audio(wave: np.ndarray) -> bytes:
    """wave: (samples,) float32 at 16 kHz. An MP3 file of some 4 kB a second, which every browser plays."""
    out = io.BytesIO()
    soundfile.write(out, wave, RATE, format="MP3")
    return out.getvalue()


def choose_audio(scored: Scored, count: int) -> list[int]:
    """Which utterances are worth hearing: the `count` worst."""
    return worst_first(scored.main)[:count]


def worst_first(errors: Errors) -> list[int]:
    """Utterances by their errors, those with as many by their rate."""
    return np.lexsort((-errors.total / np.maximum(errors.units, 1), -errors.total)).tolist()


def write_report(path: Path, title: str, sets: Sequence[ReportSet]) -> None:
    """The file appears whole."""
    write_whole(path, page(title, report_data(sets)))


# --- the page ---


def page(title: str, data: dict[str, Any]) -> str:
    """It says itself that nothing may be loaded and no script but its own may run."""
    folder = resources.files("asrllm.evaluation") / "page"
    style, script = (
        "".join((folder / name).read_text(encoding="utf-8") for name in names)
        for names in (STYLES, SCRIPTS)
    )
    parts = {
        "title": html.escape(title),
        "policy": f"default-src 'none'; img-src data:; media-src data:; style-src {digest(style)}; script-src {digest(script)}",
        "style": style,
        "script": script,
        "data": script_json(data),
    }
    template = (folder / "report.html").read_text(encoding="utf-8")
    return re.sub(r"{{(\w+)}}", lambda match: parts[match[1]], template)


def digest(text: str) -> str:
    """As a content security policy names a script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def script_json(data: Any) -> str:
    """JSON that cannot end the script element that it stands in, nor a line of it."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


# --- what the page shows ---


def report_data(sets: Sequence[ReportSet]) -> dict[str, Any]:
    """sets: with all together as the last where there are several; utterances: of all sets, worst first."""
    shown = [set_data(s.name, s.scored, s.entry, s.baseline) for s in sets]
    if len(sets) > 1:
        shown.append(pooled_data(sets))
    rows = [row for i, s in enumerate(sets) for row in utterance_rows(i, s)]
    rows.sort(key=lambda row: (-row["errors"], -row["errors"] / max(row["units"], 1)))
    return {"signs": HALLUCINATION_FLAGS, "sets": shown, "utterances": rows}


def pooled_data(sets: Sequence[ReportSet]) -> dict[str, Any]:
    """Of all sets as one, whose metric may be another than theirs."""
    scored = score([t for s in sets for t in s.scored.transcripts])
    others = [s.baseline for s in sets if s.baseline is not None]
    baseline = (
        score([t for other in others for t in other.transcripts])
        if len(others) == len(sets)
        else None
    )
    entry = scored.entry()
    if baseline is not None:
        entry["baseline"] = {
            "paired": compare(baseline.transcripts, scored.transcripts, normalizer="").entry()
        }
    return set_data("all sets", scored, entry, baseline) | {"pooled": True}


def set_data(
    name: str, scored: Scored, entry: dict[str, Any], baseline: Scored | None
) -> dict[str, Any]:
    other = baseline.entry() if baseline else None
    speakers = breakdown(scored.metric, entry["by_speaker"], other and other["by_speaker"])
    return {
        "name": name,
        "metric": scored.metric,
        "about": {key: entry[key] for key in ABOUT if entry.get(key) is not None},
        "model": side(scored, entry),
        "baseline": side(baseline, other) if baseline and other else None,
        "comparison": entry["baseline"]["paired"] if baseline else None,
        "utterances": entry["utterances"],
        "hours": entry["hours"],
        "empty_references": entry["empty_references"],
        "units": int(scored.main.units.sum()),
        "by_duration": breakdown(
            scored.metric, entry["by_duration"], other and other["by_duration"]
        ),
        "by_corpus": breakdown(scored.metric, entry["by_corpus"], other and other["by_corpus"]),
        "by_speaker": speakers[:SPEAKERS],
        "speakers": len(speakers),
        "rate_bins": rate_names(),
        "wrong": {
            kind: counter.most_common(WRONG) for kind, counter in most_wrong(scored.pairs).items()
        },
    }


def side(scored: Scored, entry: dict[str, Any]) -> dict[str, Any]:
    """The figures that this model and the baseline both have."""
    main = scored.main
    return {
        **{key: entry[key] for name in scored.errors for key in (name, f"{name}_ci95")},
        "ci95_by": entry["ci95_by"],
        "shares": entry["shares"][scored.metric],
        "counts": {
            "ins": int(main.ins.sum()),
            "del": int(main.dels.sum()),
            "sub": int(main.subs.sum()),
        },
        "hallucinations": entry["hallucinations"],
        "rates": rate_counts(main),
    }


def breakdown(
    metric: str, ours: dict[str, Any], theirs: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Rows of Scored.by_duration or by_speaker, with the baseline's rate where there is one."""
    return [
        {
            "name": name,
            "utterances": of["utterances"],
            "rate": of[metric],
            "baseline": theirs[name][metric] if theirs else None,
        }
        for name, of in ours.items()
    ]


def rate_names() -> list[str]:
    return ["0", *(f"{low}-{high}" for low, high in itertools.pairwise(RATES)), f"over {RATES[-1]}"]


def rate_counts(errors: Errors) -> list[int]:
    """Utterances in each bin of rate_names(): no error, above one border up to the next, above the last."""
    rates = (
        100 * errors.total / np.maximum(errors.units, 1e-9)
    )  # anything heard in nothing is above the last
    return np.bincount(
        np.searchsorted(RATES, rates, side="left"), minlength=len(RATES) + 1
    ).tolist()


def utterance_rows(number: int, of: ReportSet) -> list[dict[str, Any]]:
    """number: of the set."""
    rows = [
        utterance_row(of.scored, i) | {"set": number} for i in range(len(of.scored.transcripts))
    ]
    if of.baseline is not None:
        assert [row["key"] for row in rows] == [t.key for t in of.baseline.transcripts], (
            "the baseline is of other utterances"
        )
        for i, row in enumerate(rows):
            row["baseline"] = said(of.baseline, i)
    for row in rows:
        if row["key"] in of.audio:
            row["audio"] = base64.b64encode(of.audio[row["key"]]).decode()
    return rows


def utterance_row(scored: Scored, i: int) -> dict[str, Any]:
    transcript: Transcript = scored.transcripts[i]
    errors = scored.main
    return said(scored, i) | {
        "key": transcript.key,
        "speaker": transcript.speaker,
        "recording": transcript.recording,
        "duration": round(transcript.duration, 2),
        "units": int(errors.units[i]),
        "ins": int(errors.ins[i]),
        "del": int(errors.dels[i]),
        "sub": int(errors.subs[i]),
        "signs": scored.signs[i],
        "ref": transcript.raw_reference,
    }


def said(scored: Scored, i: int) -> dict[str, Any]:
    """aligned: see runs()."""
    return {
        "errors": int(scored.main.total[i]),
        "hyp": scored.transcripts[i].raw_hypothesis,
        "end": scored.transcripts[i].end,
        "aligned": runs(scored.pairs[i], scored.metric),
    }


def runs(pairs: Pairs, metric: str) -> list[str | Pairs]:
    """What is right as text, and between it the pairs that are wrong."""
    found: list[str | Pairs] = []
    for is_right, group in itertools.groupby(pairs, key=lambda pair: pair[0] == pair[1]):
        wrong = list(group)
        found.append(joined([reference for reference, _ in wrong], metric) if is_right else wrong)
    return found


def joined(units: Sequence[str], metric: str) -> str:
    """Units of a metric as text: no spaces beside characters of scripts without them."""
    return (
        "".join(units)
        if metric == "cer"
        else re.sub(f"(?<=[{UNSPACED}]) | (?=[{UNSPACED}])", "", " ".join(units))
    )
