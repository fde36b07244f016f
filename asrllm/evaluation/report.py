"""Write report.html: one file that shows the errors of test sets in any browser, offline."""

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
from asrllm.data.scripts import UNSPACED
from asrllm.defaults import RATE
from asrllm.evaluation.compare import compare_transcripts
from asrllm.evaluation.result_files import count_confusions
from asrllm.evaluation.score import Errors
from asrllm.evaluation.summary import HALLUCINATION_FLAGS, Entry, Pairs, Scored, score

DESCRIBING_FIELDS = ("normalizer", "rtfx", "prompt", "weights", "lang")
RATES = (0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)  # per cent; the borders of the histogram
MAX_SPEAKERS = 30  # shown
MAX_CONFUSIONS = 15  # shown of each kind
PAGE_STYLES = ("report.css",)
PAGE_SCRIPTS = ("dom.js", "charts.js", "sections.js", "utterances.js", "report.js")

Data = dict[str, Any]  # a JSON object of the page


@dataclass(frozen=True, kw_only=True)
class ReportSet:
    """A test set in the report.

    Attributes:
        name: name of the test set.
        scored: the results of the model.
        entry: the set's entry of results.json.
        baseline: the results of the baseline on the same utterances in the same order. The entry's
            "baseline" then has their comparison as "paired".
        audio: encode_audio's MP3 by key, of the utterances that the page can play.
    """

    name: str
    scored: Scored
    entry: Entry
    baseline: Scored | None = None
    audio: dict[str, bytes] = field(default_factory=dict)


def encode_audio(wave: np.ndarray) -> bytes:
    """Encode a waveform as an MP3, which every browser plays, of about 4 kB per second.

    Args:
        wave: (samples,) float32 at RATE.
    """
    out = io.BytesIO()
    soundfile.write(out, wave, RATE, format="MP3")
    return out.getvalue()


def choose_audio(scored: Scored, count: int) -> list[int]:
    """Return the `count` worst utterances, which are worth listening to."""
    return worst_first(scored.main)[:count]


def worst_first(errors: Errors) -> list[int]:
    """Sort utterances by number of errors, and by error rate if that is equal."""
    rates = errors.total / np.maximum(errors.units, 1)
    return np.lexsort((-rates, -errors.total)).tolist()


def write_report(path: Path, title: str, sets: Sequence[ReportSet]) -> None:
    """Write the report atomically."""
    write_whole(path, page(title, report_data(sets)))


# --- the page ---


def page(title: str, data: Data) -> str:
    """Return the page. Its security policy allows only its own scripts, and no requests."""
    folder = resources.files("asrllm.evaluation") / "page"
    style = "".join((folder / name).read_text(encoding="utf-8") for name in PAGE_STYLES)
    script = "".join((folder / name).read_text(encoding="utf-8") for name in PAGE_SCRIPTS)
    policy = (
        "default-src 'none'; img-src data:; media-src data:; "
        f"style-src {csp_hash(style)}; script-src {csp_hash(script)}"
    )
    parts = {
        "title": html.escape(title),
        "policy": policy,
        "style": style,
        "script": script,
        "data": script_json(data),
    }
    template = (folder / "report.html").read_text(encoding="utf-8")
    return re.sub(r"{{(\w+)}}", lambda match: parts[match[1]], template)


def csp_hash(text: str) -> str:
    """Return the hash of a script or style in the syntax of a content security policy."""
    sha256 = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(sha256).decode()}'"


def script_json(data: Data) -> str:
    """Return JSON that cannot end the script element or the line that contains it."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


# --- the data of the page ---


def report_data(sets: Sequence[ReportSet]) -> Data:
    """Return the data of the page.

    The last of several sets is all of them together. Utterances of all sets are sorted worst first.
    """
    shown = [set_data(s.name, s.scored, s.entry, s.baseline) for s in sets]
    if len(sets) > 1:
        shown.append(pooled_data(sets))
    rows: list[Data] = []
    for number, report_set in enumerate(sets):
        rows += utterance_rows(number, report_set)
    rows.sort(key=_worst_first)
    return {"flags": HALLUCINATION_FLAGS, "sets": shown, "utterances": rows}


def _worst_first(row: Data) -> tuple[float, float]:
    """Return a sorting key for rows of the table of utterances, worst first."""
    errors = row["errors"]
    return -errors, -errors / max(row["units"], 1)


def pooled_data(sets: Sequence[ReportSet]) -> Data:
    """Return the data of all sets together. The metric may differ from that of each set."""
    scored = _pool([report_set.scored for report_set in sets])
    entry = scored.entry() | {"unreadable": sum(each.entry["unreadable"] for each in sets)}
    baseline = None
    baselines = [s.baseline for s in sets if s.baseline is not None]
    if len(baselines) == len(sets):
        baseline = _pool(baselines)
        comparison = compare_transcripts(baseline.transcripts, scored.transcripts, normalizer="")
        entry["baseline"] = {"paired": comparison.entry()}
    return set_data("all sets", scored, entry, baseline) | {"pooled": True}


def _pool(parts: Sequence[Scored]) -> Scored:
    return score(list(itertools.chain.from_iterable(part.transcripts for part in parts)))


def set_data(name: str, scored: Scored, entry: Entry, baseline: Scored | None) -> Data:
    """Return the data of one test set.

    Args:
        name: name of the set.
        scored: the results of the model.
        entry: the set's entry of results.json.
        baseline: the results of the baseline, if there is one.
    """
    system = None
    comparison = None
    other: Entry = {}
    if baseline is not None:
        other = baseline.entry()
        system = system_data(baseline, other)
        comparison = entry["baseline"]["paired"]
    rows = {}
    for key in ("by_duration", "by_corpus", "by_speaker"):
        rows[key] = breakdown(scored.metric, entry[key], other.get(key))
    confusions = {}
    for kind, counter in count_confusions(scored.pairs).items():
        confusions[kind] = counter.most_common(MAX_CONFUSIONS)
    return {
        "name": name,
        "metric": scored.metric,
        "about": {key: entry[key] for key in DESCRIBING_FIELDS if entry.get(key) is not None},
        "model": system_data(scored, entry),
        "baseline": system,
        "comparison": comparison,
        "utterances": entry["utterances"],
        "hours": entry["hours"],
        "unreadable": entry["unreadable"],
        "empty_references": entry["empty_references"],
        "units": int(scored.main.units.sum()),
        "by_duration": rows["by_duration"],
        "by_corpus": rows["by_corpus"],
        "by_speaker": rows["by_speaker"][:MAX_SPEAKERS],
        "speakers": len(rows["by_speaker"]),
        "rate_bins": rate_names(),
        "wrong": confusions,
    }


def system_data(scored: Scored, entry: Entry) -> Data:
    """Return the numbers that the page shows for both the model and the baseline."""
    main = scored.main
    data: Data = {}
    for metric in scored.errors:
        data[metric] = entry[metric]
        data[f"{metric}_ci95"] = entry[f"{metric}_ci95"]
    data["ci95_by"] = entry["ci95_by"]
    data["percentages"] = entry["percentages"][scored.metric]
    data["counts"] = {
        "ins": int(main.ins.sum()),
        "del": int(main.dels.sum()),
        "sub": int(main.subs.sum()),
    }
    data["hallucinations"] = entry["hallucinations"]
    data["rates"] = rate_counts(main)
    return data


def breakdown(metric: str, ours: dict[str, Entry], baseline: dict[str, Entry] | None) -> list[Data]:
    """Return the rows of a breakdown, for example Scored.by_duration.

    Args:
        metric: the metric to show.
        ours: the model's entries by name.
        baseline: the baseline's entries by name, if there is a baseline.
    """
    rows = []
    for name, entry in ours.items():
        row = {"name": name, "utterances": entry["utterances"], "rate": entry[metric]}
        row["baseline"] = baseline[name][metric] if baseline else None
        rows.append(row)
    return rows


def rate_names() -> list[str]:
    """Return the names of the histogram's bins."""
    ranges = [f"{low}-{high}" for low, high in itertools.pairwise(RATES)]
    return ["0", *ranges, f"over {RATES[-1]}"]


def rate_counts(errors: Errors) -> list[int]:
    """Return the number of utterances in each bin of rate_names().

    The first bin has no errors, and each other bin excludes its lower border. Insertions in an
    empty reference are in the last bin.
    """
    rates = 100 * errors.total / np.maximum(errors.units, 1e-9)
    bins = np.searchsorted(RATES, rates, side="left")
    return np.bincount(bins, minlength=len(RATES) + 1).tolist()


def utterance_rows(number: int, report_set: ReportSet) -> list[Data]:
    """Return the rows of a set in the table of utterances.

    Args:
        number: index of the set.
        report_set: the set.
    """
    scored = report_set.scored
    baseline = report_set.baseline
    if baseline is not None:
        keys = [transcript.key for transcript in baseline.transcripts]
        assert keys == [transcript.key for transcript in scored.transcripts]
    rows = []
    for i, transcript in enumerate(scored.transcripts):
        row = utterance_row(scored, i) | {"set": number}
        if baseline is not None:
            row["baseline"] = hypothesis_data(baseline, i)
        if transcript.key in report_set.audio:
            row["audio"] = base64.b64encode(report_set.audio[transcript.key]).decode()
        rows.append(row)
    return rows


def utterance_row(scored: Scored, i: int) -> Data:
    """Return the row of an utterance without the baseline."""
    transcript = scored.transcripts[i]
    errors = scored.main
    return hypothesis_data(scored, i) | {
        "key": transcript.key,
        "speaker": transcript.speaker,
        "recording": transcript.recording,
        "duration": round(transcript.duration, 2),
        "units": int(errors.units[i]),
        "ins": int(errors.ins[i]),
        "del": int(errors.dels[i]),
        "sub": int(errors.subs[i]),
        "flags": scored.flags[i],
        "ref": transcript.raw_reference,
    }


def hypothesis_data(scored: Scored, i: int) -> Data:
    """Return what an utterance's row shows for both the model and the baseline."""
    return {
        "errors": int(scored.main.total[i]),
        "hyp": scored.transcripts[i].raw_hypothesis,
        "end": scored.transcripts[i].end,
        "aligned": alignment_runs(scored.pairs[i], scored.metric),
    }


def alignment_runs(pairs: Pairs, metric: str) -> list[str | Pairs]:
    """Group an alignment into runs: correct ones as text, and the pairs of incorrect ones."""
    runs: list[str | Pairs] = []
    for is_correct, group in itertools.groupby(pairs, key=lambda pair: pair[0] == pair[1]):
        run = list(group)
        if is_correct:
            runs.append(join_units([reference for reference, _ in run], metric))
        else:
            runs.append(run)
    return runs


def join_units(units: Sequence[str], metric: str) -> str:
    """Join the units of a metric, without spaces next to characters of scripts without them."""
    if metric == "cer":
        return "".join(units)
    return re.sub(f"(?<=[{UNSPACED}]) | (?=[{UNSPACED}])", "", " ".join(units))
