"""What a corpus is like, from its index alone: hours, lengths, speed of speech, corpora and languages."""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from asrllm.data.index import RATE, Index
from asrllm.errors import UserError
from asrllm.escape import escape

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
BINS = 20
MEASURES = {
    "seconds": "s",
    "characters": "",
    "characters_per_second": "/s",
}  # what the percentiles are of, and its unit
DRAWN = {"seconds": "duration in seconds", "characters_per_second": "characters a second"}
EIGHTHS = " ▏▎▍▌▋▊▉"
STYLE = """
body {font-family: sans-serif; margin: 2em} table {margin: 1em 0} img {max-width: 100%}
td, th {padding: .2em .8em; text-align: right} td:first-child, th:first-child {text-align: left}
"""


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """edges: (bins + 1,); counts: (bins,); the last bin also holds what lies above it."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """percentiles: {measure: {percent: value}}; corpora, languages: {name: {"utterances", "hours"}}, name "" where samples have none.

    speakers: of all directories, each counted by itself; 0 where samples name none.
    """

    name: str
    utterances: int
    hours: float
    shards: int
    speakers: int
    percentiles: dict[str, dict[str, float]]
    histograms: dict[str, Histogram]
    corpora: dict[str, dict[str, float]] = field(default_factory=dict)
    languages: dict[str, dict[str, float]] = field(default_factory=dict)


def describe(name: str, indexes: Sequence[Index]) -> Statistics:
    """Of all the indexes together."""
    seconds = np.concatenate([index.rows["samples"] for index in indexes]) / RATE
    characters = np.concatenate([index.rows["text_chars"] for index in indexes])
    values = {
        "seconds": seconds,
        "characters": characters,
        "characters_per_second": characters / np.maximum(seconds, 1 / RATE),
    }
    return Statistics(
        name=name,
        utterances=len(seconds),
        hours=float(seconds.sum()) / 3600,
        shards=sum(len(index.shards) for index in indexes),
        speakers=sum(int(index.about.get("speakers", 0)) for index in indexes),
        percentiles={m: _percentiles(v) for m, v in values.items()},
        histograms={measure: _histogram(values[measure]) for measure in DRAWN},
        corpora=_sum([index.about.get("corpora", {}) for index in indexes]),
        languages=_sum([index.about.get("languages", {}) for index in indexes]),
    )


def _percentiles(values: np.ndarray) -> dict[str, float]:
    return {
        str(p): round(float(v), 3)
        for p, v in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)
    }


def _histogram(values: np.ndarray) -> Histogram:
    """Up to the 99.5th percentile, so that a few outliers do not press all others into one bin."""
    high = max(float(np.percentile(values, 99.5)), 1e-3)
    step = next(
        s for s in (m * 10.0**e for e in range(-4, 9) for m in (1, 2, 2.5, 5)) if s * BINS >= high
    )
    last = int(np.ceil(high / step - 1e-9)) - 1
    places = np.minimum((values / step).astype(np.int64), last)
    first = int(places.min())
    edges = [round(step * i, 6) for i in range(first, last + 2)]
    return Histogram(
        edges=edges, counts=np.bincount(places - first, minlength=last - first + 1).tolist()
    )


def _sum(parts: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    total: dict[str, dict[str, float]] = {}
    for part in parts:
        for name, counts in part.items():
            entry = total.setdefault(name, {"utterances": 0, "hours": 0.0})
            for unit in entry:
                entry[unit] = round(entry[unit] + counts[unit], 4)
    return dict(sorted(total.items(), key=lambda item: -item[1]["hours"]))


# --- showing ---


def as_json(statistics: Statistics) -> str:
    return json.dumps(asdict(statistics), ensure_ascii=False, indent=1)


def as_text(statistics: Statistics, width: int = 80) -> str:
    """Tables and bars for a terminal of `width` columns."""
    blocks = [escape(f"{statistics.name}: {_totals(statistics)}")]
    blocks += [_columns(rows) for _, rows in _tables(statistics)]
    blocks += [
        f"{DRAWN[measure]}\n{_bars(h, width)}" for measure, h in statistics.histograms.items()
    ]
    return "\n\n".join(blocks)


def _totals(statistics: Statistics) -> str:
    speakers = f", {statistics.speakers} speakers" if statistics.speakers else ""
    return f"{statistics.utterances} utterances, {statistics.hours:.2f} h, {statistics.shards} shards{speakers}"


def _tables(statistics: Statistics) -> list[tuple[str, list[list[str]]]]:
    """(title, rows with a header) of the percentiles, the corpora and the languages."""
    percents = [["percentile", *(f"{p}%" for p in PERCENTILES)]]
    for measure, values in statistics.percentiles.items():
        percents.append(
            [measure.replace("_per_", "/"), *(f"{value:.4g}" for value in values.values())]
        )
    tables = [("percentiles", percents)]
    for title, groups in (("corpus", statistics.corpora), ("language", statistics.languages)):
        if groups.keys() - {""}:
            rows = [
                [escape(name) or "(none)", f"{g['utterances']:.0f}", f"{g['hours']:.2f}"]
                for name, g in groups.items()
            ]
            tables.append((title, [[title, "utterances", "hours"], *rows]))
    return tables


def _columns(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _bars(histogram: Histogram, width: int) -> str:
    labels = [
        f"{low:g} - {high:g}"
        for low, high in zip(histogram.edges, histogram.edges[1:], strict=False)
    ]
    labels[-1] = f"from {histogram.edges[-2]:g}"
    counts = [str(count) for count in histogram.counts]
    label_width, count_width = max(map(len, labels)), max(map(len, counts))
    room = max(width - label_width - count_width - 4, 10)
    eighths = [round(8 * room * count / max(histogram.counts)) for count in histogram.counts]
    bars = ["█" * (n // 8) + EIGHTHS[n % 8].strip() for n in eighths]
    return "\n".join(
        f"{label:>{label_width}}  {count:>{count_width}}  {bar}".rstrip()
        for label, count, bar in zip(labels, counts, bars, strict=True)
    )


# --- drawing ---


def draw(statistics: Statistics, path: str | Path) -> None:
    """The histograms as a PNG, or with the tables as an HTML page that needs no other file. Raises UserError without matplotlib."""
    path = Path(path)
    if path.suffix.lower() not in (".png", ".html"):
        raise UserError(f"--output {str(path)!r}: the name must end with .png or .html")
    picture = _picture(statistics)
    try:
        if path.suffix.lower() == ".png":
            path.write_bytes(picture)
        else:
            path.write_text(_page(statistics, picture), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written: {error}") from error


def _picture(statistics: Statistics) -> bytes:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("drawing needs matplotlib: pip install 'asrllm[plot]'") from error
    figure: Any = Figure(figsize=(10, 4), layout="constrained")
    for axes, (measure, h) in zip(
        figure.subplots(1, len(statistics.histograms)), statistics.histograms.items(), strict=True
    ):
        axes.bar(h.edges[:-1], h.counts, width=np.diff(h.edges), align="edge", edgecolor="white")
        axes.set(xlabel=DRAWN[measure], ylabel="utterances")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


def _page(statistics: Statistics, picture: bytes) -> str:
    name = html.escape(statistics.name)
    tables = "".join(f"<table>{_html_rows(rows)}</table>" for _, rows in _tables(statistics))
    image = (
        f'<img alt="histograms" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
    )
    head = f'<meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}<h1>{name}</h1><p>{html.escape(_totals(statistics))}</p>{tables}{image}</html>\n'


def _html_rows(rows: list[list[str]]) -> str:
    tags = ["th"] + ["td"] * (len(rows) - 1)
    return "".join(
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in zip(tags, rows, strict=True)
    )
