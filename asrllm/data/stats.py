"""Statistics of shards from their index alone: hours, lengths, speaking rate, languages."""

import base64
import html
import importlib.util
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from asrllm.atomic import check_text_output, write_whole
from asrllm.data.index import Index
from asrllm.defaults import RATE
from asrllm.errors import UserError
from asrllm.escape import escape

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
MAX_BINS = 20
# measures with a histogram, and the labels of their axes
HISTOGRAM_LABELS = {
    "seconds": "duration in seconds",
    "characters_per_second": "characters per second",
}
EIGHTHS = " ▏▎▍▌▋▊▉"
STYLE = """
body {font-family: sans-serif; margin: 2em} table {margin: 1em 0} img {max-width: 100%}
td, th {padding: .2em .8em; text-align: right} td:first-child, th:first-child {text-align: left}
"""
TextTable = list[list[str]]
Groups = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """A histogram with bins of equal width.

    Attributes:
        edges: (bins + 1,).
        counts: (bins,). The last bin includes all larger values.
    """

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Statistics of one or more directories of shards.

    Attributes:
        name: the directories.
        utterances: number of utterances.
        hours: hours of audio.
        shards: number of shards.
        speakers: sum of the directories' numbers of speakers; 0 if samples name none.
        percentiles: {measure: {percent: value}}.
        histograms: {measure: histogram}.
        corpora: {name: {"utterances", "hours"}}. The name of samples without one is "".
        languages: the same by language.
    """

    name: str
    utterances: int
    hours: float
    shards: int
    speakers: int
    percentiles: dict[str, dict[str, float]]
    histograms: dict[str, Histogram]
    corpora: Groups = field(default_factory=dict)
    languages: Groups = field(default_factory=dict)


def collect_statistics(name: str, indexes: Sequence[Index]) -> Statistics:
    """Return the statistics of several indexes together."""
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
        percentiles={measure: _percentiles(v) for measure, v in values.items()},
        histograms={measure: _histogram(values[measure]) for measure in HISTOGRAM_LABELS},
        corpora=_sum_groups([index.about.get("corpora", {}) for index in indexes]),
        languages=_sum_groups([index.about.get("languages", {}) for index in indexes]),
    )


def _percentiles(values: np.ndarray) -> dict[str, float]:
    found = np.percentile(values, PERCENTILES)
    return {
        str(percent): round(float(value), 3)
        for percent, value in zip(PERCENTILES, found, strict=True)
    }


def _histogram(values: np.ndarray) -> Histogram:
    """Return a histogram whose edges end near the 99.5th percentile.

    Otherwise a few outliers would leave all other values in one bin.
    """
    high = max(float(np.percentile(values, 99.5)), 1e-3)
    step = _bin_width(high)
    last = int(np.ceil(high / step - 1e-9)) - 1
    places = np.minimum((values / step).astype(np.int64), last)
    first = int(places.min())
    edges = [round(step * i, 6) for i in range(first, last + 2)]
    counts = np.bincount(places - first, minlength=last - first + 1)
    return Histogram(edges=edges, counts=counts.tolist())


def _bin_width(high: float) -> float:
    """Return the smallest round width with which MAX_BINS bins reach `high`."""
    for exponent in range(-4, 9):
        for factor in (1, 2, 2.5, 5):
            width = factor * 10.0**exponent
            if width * MAX_BINS >= high:
                return width
    raise ValueError(f"{high} is too large for a histogram")


def _sum_groups(parts: Sequence[Mapping[str, Mapping[str, float]]]) -> Groups:
    """Add up the utterances and hours of groups, and sort them by decreasing hours."""
    total: Groups = {}
    for part in parts:
        for name, counts in part.items():
            entry = total.setdefault(name, {"utterances": 0, "hours": 0.0})
            for unit in entry:
                entry[unit] = round(entry[unit] + counts[unit], 4)
    return dict(sorted(total.items(), key=lambda item: -item[1]["hours"]))


# --- text ---


def statistics_json(statistics: Statistics) -> str:
    """Return statistics as JSON."""
    return json.dumps(asdict(statistics), ensure_ascii=False, indent=1)


def statistics_text(statistics: Statistics, width: int = 80) -> str:
    """Return tables and bars for a terminal of `width` columns."""
    blocks = [escape(f"{statistics.name}: {_totals(statistics)}")]
    for _, rows in _tables(statistics):
        blocks.append(_align(rows))
    for measure, histogram in statistics.histograms.items():
        blocks.append(f"{HISTOGRAM_LABELS[measure]}\n{_bars(histogram, width)}")
    return "\n\n".join(blocks)


def _totals(statistics: Statistics) -> str:
    parts = [
        f"{statistics.utterances} utterances",
        f"{statistics.hours:.2f} h",
        f"{statistics.shards} shards",
    ]
    if statistics.speakers:
        parts.append(f"{statistics.speakers} speakers")
    return ", ".join(parts)


def _tables(statistics: Statistics) -> list[tuple[str, TextTable]]:
    """Return (title, rows with a header) of the percentiles, the corpora and the languages."""
    percentiles = [["percentile", *(f"{percent}%" for percent in PERCENTILES)]]
    for measure, values in statistics.percentiles.items():
        cells = [f"{value:.4g}" for value in values.values()]
        percentiles.append([measure.replace("_per_", "/"), *cells])
    tables = [("percentiles", percentiles)]
    for title, groups in (("corpus", statistics.corpora), ("language", statistics.languages)):
        if groups.keys() - {""}:
            tables.append((title, _group_rows(title, groups)))
    return tables


def _group_rows(title: str, groups: Groups) -> TextTable:
    rows = [[title, "utterances", "hours"]]
    for name, group in groups.items():
        label = escape(name) or "(none)"
        rows.append([label, f"{group['utterances']:.0f}", f"{group['hours']:.2f}"])
    return rows


def _align(rows: TextTable) -> str:
    """Return rows as lines of aligned columns."""
    columns = zip(*rows, strict=True)
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        for cell, width in zip(row[1:], widths[1:], strict=True):
            cells.append(cell.rjust(width))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _bars(histogram: Histogram, width: int) -> str:
    """Return a histogram as lines of `width` columns: the bin, its count, and a bar."""
    edges = histogram.edges
    labels = [f"{low:g} - {high:g}" for low, high in itertools.pairwise(edges)]
    labels[-1] = f"from {edges[-2]:g}"
    counts = [str(count) for count in histogram.counts]
    label_width = max(map(len, labels))
    count_width = max(map(len, counts))
    bar_width = max(width - label_width - count_width - 4, 10)
    highest = max(histogram.counts)
    lines = []
    for label, count in zip(labels, histogram.counts, strict=True):
        eighths = round(8 * bar_width * count / highest)
        bar = "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()
        lines.append(f"{label:>{label_width}}  {count:>{count_width}}  {bar}".rstrip())
    return "\n".join(lines)


# --- PNG and HTML ---


def check_drawing(path: Path) -> None:
    """Check that `draw` can write to a path, before the statistics are collected.

    Raises:
        UserError: the file name has another extension, the file cannot be written, or matplotlib
            is not installed.
    """
    if path.suffix.lower() not in (".png", ".html"):
        raise UserError(
            f"--output {str(path)!r} has an unknown extension. "
            "Use a name that ends in .png or .html."
        )
    check_text_output(path)
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("drawing needs matplotlib. Run: pip install 'asrllm[plot]'")


def draw(statistics: Statistics, path: Path) -> None:
    """Write the histograms as a PNG, or together with the tables as a self-contained HTML page.

    Raises:
        UserError: the file cannot be written.
    """
    picture = _picture(statistics)
    is_page = path.suffix.lower() == ".html"
    write_whole(path, _page(statistics, picture) if is_page else picture)


def _picture(statistics: Statistics) -> bytes:
    """Return the histograms as a PNG."""
    from matplotlib.figure import Figure

    figure: Figure = Figure(figsize=(10, 4), layout="constrained")
    all_axes = figure.subplots(1, len(statistics.histograms))
    for axes, (measure, histogram) in zip(all_axes, statistics.histograms.items(), strict=True):
        axes.bar(
            histogram.edges[:-1],
            histogram.counts,
            width=np.diff(histogram.edges),
            align="edge",
            edgecolor="white",
        )
        axes.set(xlabel=HISTOGRAM_LABELS[measure], ylabel="utterances")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


def _page(statistics: Statistics, picture: bytes) -> str:
    """Return an HTML page with the tables and a PNG."""
    name = html.escape(statistics.name)
    totals = html.escape(_totals(statistics))
    tables = "".join(f"<table>{_html_rows(rows)}</table>" for _, rows in _tables(statistics))
    encoded = base64.b64encode(picture).decode()
    parts = [
        '<!doctype html><html lang="en">',
        f'<meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>',
        f"<h1>{name}</h1><p>{totals}</p>",
        tables,
        f'<img alt="histograms" src="data:image/png;base64,{encoded}">',
        "</html>\n",
    ]
    return "".join(parts)


def _html_rows(rows: TextTable) -> str:
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        cells = [f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "".join(lines)
