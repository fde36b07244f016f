"""Two results on the same utterances: is one better, and by how much?"""

import ast
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asrllm.data.text import normalizer
from asrllm.errors import UserError
from asrllm.escape import escape
from asrllm.evaluation.score import (
    Errors,
    Transcript,
    bootstrap_interval,
    characters,
    errors,
    fitting_metric,
    groups_of,
    sum_by,
)
from asrllm.text_files import parse_json, read_json_object, read_text

PERMUTATIONS = 10_000
RECOGS_LINE = re.compile(
    r"(?P<key>.*):\t(?P<what>ref|hyp|timestamp_ref|timestamp_hyp)=(?P<units>\[.*\])"
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """b against a. difference: points of the rate, b - a, with its 95 % interval; p: how often chance alone would give one as large.

    better, worse: utterances with fewer and with more errors in b. by: what is drawn and exchanged as a whole. normalizer: of both.
    """

    metric: str
    normalizer: str
    a: float
    b: float
    difference: float
    difference_ci95: list[float]
    p: float
    better: int
    worse: int
    utterances: int
    by: str

    def entry(self) -> dict[str, Any]:
        return asdict(self)


def compare(a: Sequence[Transcript], b: Sequence[Transcript], *, normalizer: str) -> Comparison:
    """a, b: of the same utterances in the same order. The metric is the one that fits a's references."""
    metric = fitting_metric([t.reference for t in a])
    first, second = errors(a, metric), errors(b, metric)
    by, groups = groups_of(a)
    if groups is None:  # recogs-*.txt do not say who speaks
        by, groups = groups_of(b)
    low, high = difference_interval(first, second, groups)
    return Comparison(
        metric=metric,
        normalizer=normalizer,
        a=round(first.rate, 3),
        b=round(second.rate, 3),
        difference=round(second.rate - first.rate, 3),
        difference_ci95=[round(low, 3), round(high, 3)],
        p=round(p_value(first, second, groups), 5),
        better=int((second.total < first.total).sum()),
        worse=int((second.total > first.total).sum()),
        utterances=len(a),
        by=by,
    )


def difference_interval(a: Errors, b: Errors, groups: np.ndarray | None) -> tuple[float, float]:
    """95 % bootstrap interval of b's rate less a's, both over the same drawn utterances or groups (Bisani and Ney, 2004).

    One of them alone bounds nothing; where none differs it is the rule of three's.
    """
    more, units = sum_by(groups, b.total - a.total), sum_by(groups, a.units)
    if len(units) < 2:
        return -max(100.0, a.rate), max(100.0, b.rate)
    if not more.any():
        most = min(100.0, 300 / max(float(units.sum()), 1.0))
        return -most, most
    return bootstrap_interval(more, units)


def p_value(a: Errors, b: Errors, groups: np.ndarray | None) -> float:
    """Two-sided, of the paired permutation test: a's and b's errors of an utterance, or of a group, are exchanged by chance.

    Fisher's randomisation test as in Noreen, "Computer-Intensive Methods for Testing Hypotheses", 1989.
    """
    more = sum_by(groups, b.total - a.total)
    more = more[more != 0]
    rng, found = np.random.default_rng(0), 0
    for _ in range(PERMUTATIONS):
        signs = rng.integers(2, size=len(more)) * 2 - 1
        found += abs(int((signs * more).sum())) >= abs(int(more.sum()))
    return (found + 1) / (PERMUTATIONS + 1)


# --- results on the disk ---


def compare_results(a: Path, b: Path) -> dict[str, Comparison]:
    """Compare two results on every test set that both have.

    Args:
        a: a directory of `asrllm evaluate`, of which the newest evaluation is taken, or a file
            generations-*.jsonl or recogs-*.txt.
        b: the same.

    Raises:
        UserError: a place has no results, or they have no test set in common.
    """
    if a.is_file() and b.is_file():
        return {a.stem: compare_files(a, b)}
    of_a, of_b = find_sets(a, like=b), find_sets(b, like=a)
    names = [name for name in of_a if name in of_b]
    if not names:
        raise UserError(
            f"{str(a)!r} (sets: {', '.join(of_a)}) and {str(b)!r} (sets: {', '.join(of_b)}) have no test set in common"
        )
    return {name: compare_files(of_a[name], of_b[name]) for name in names}


def find_sets(place: Path, *, like: Path | None = None) -> dict[str, Path]:
    """Return the files of generations by test set.

    Args:
        place: a directory, or a file, which is one set.
        like: the directory whose set has the name of the file.
    """
    if place.is_file():
        name = re.sub("^(generations|recogs)-", "", place.stem)
        sets = find_sets(like) if like is not None else {}
        return {
            next(
                (known for known in sets if name == known or name.startswith(f"{known}-")), name
            ): place
        }
    folders = [place, *sorted(path.parent for path in place.glob("*/results.json"))]
    found = [sets for folder in folders if (sets := newest_sets(folder))]
    if len(found) != 1:
        what = "has several decodings" if found else "holds no generations-*.jsonl"
        raise UserError(
            f"{str(place)!r} {what}: give such as EXP/greedy_search, or a file generations-*.jsonl or recogs-*.txt"
        )
    return found[0]


def newest_sets(folder: Path) -> dict[str, Path]:
    """Return the files of the evaluation that results.json is of, by test set."""
    path = folder / "results.json"
    if not path.is_file():
        return {}
    results = read_json_object(path, "the results")
    named = {
        name: entry.get("generations") for name, entry in results.items() if isinstance(entry, dict)
    }
    return {name: folder / file for name, file in named.items() if isinstance(file, str)}


def compare_files(a: Path, b: Path) -> Comparison:
    """Raises UserError where they are not of the same utterances with the same references, or were scored by other normalisers."""
    rows, others = read_rows(a), read_rows(b)
    name = one_normalizer(a, rows, b, others)
    first, second = by_key(rows, name), by_key(others, name)
    if is_recogs(a) != is_recogs(
        b
    ):  # those of an evaluation are normalised, and most normalisers change their own results
        if is_recogs(a) and same_references(as_written := by_key(rows, "none"), second):
            first = as_written
        elif is_recogs(b) and same_references(first, as_written := by_key(others, "none")):
            second = as_written
    if only := sorted(first.keys() ^ second.keys()):
        raise UserError(
            f"{str(a)!r} and {str(b)!r} are of other utterances: {len(only)}, such as {only[0]!r}, are in one of them alone"
        )
    if other := [key for key in first if not same_reference(first[key], second[key])]:
        pair = f"{first[other[0]].reference!r} and {second[other[0]].reference!r}"
        raise UserError(
            f"{str(a)!r} and {str(b)!r} have different references for {len(other)} utterances, such as {other[0]!r}: {pair}"
        )
    return compare(list(first.values()), [second[key] for key in first], normalizer=name)


def by_key(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Transcript]:
    """Return the normalised transcripts by their keys as recogs-*.txt write them."""
    return {escape(transcript.key): transcript for transcript in transcripts(rows, name)}


def same_reference(a: Transcript, b: Transcript) -> bool:
    """recogs-*.txt of a character error rate have a space between any two characters."""
    return characters(a.reference) == characters(b.reference)


def same_references(a: Mapping[str, Transcript], b: Mapping[str, Transcript]) -> bool:
    return a.keys() == b.keys() and all(same_reference(a[key], b[key]) for key in a)


def one_normalizer(
    a: Path, rows: Sequence[dict[str, Any]], b: Path, others: Sequence[dict[str, Any]]
) -> str:
    """Return the name of the normaliser that both were scored by; recogs-*.txt do not say any."""
    named = {
        str(row["normalizer"]): str(path)
        for path, found in ((a, rows), (b, others))
        for row in found
        if "normalizer" in row
    }
    if len(named) > 1:
        said = " and ".join(f"{path!r} by {name!r}" for name, path in named.items())
        raise UserError(
            f"two normalizers are no comparison, {said}: evaluate one of them again with normalizer="
        )
    return next(iter(named), "none")


def transcripts(rows: Sequence[dict[str, Any]], name: str) -> list[Transcript]:
    """Of read_rows, normalised by `name`."""
    normalize = normalizer(name)
    return [
        Transcript(
            key=row["key"], reference=normalize(row["ref"]), hypothesis=normalize(row["hyp"]), raw_reference=row["ref"],
            raw_hypothesis=row["hyp"], duration=row["duration"], speaker=str(row.get("speaker", "")),
            recording=str(row.get("recording", "")),
        )
        for row in rows
    ]  # fmt: skip


def read_rows(path: Path) -> list[dict[str, Any]]:
    """{"key", "ref", "hyp", ...} of each utterance in a generations-*.jsonl or a recogs-*.txt (icefall's too)."""
    lines = read_text(path, "the results").split("\n")  # not splitlines(): texts may hold U+2028
    try:
        rows = (
            _read_recogs(lines) if is_recogs(path) else [parse_json(line) for line in lines if line]
        )
        rows = [
            row
            | {name: row[name] for name in ("key", "ref", "hyp")}
            | {"duration": float(row.get("duration", 0))}
            for row in rows
        ]
        if not all(isinstance(row[name], str) for row in rows for name in ("key", "ref", "hyp")):
            raise ValueError("key, ref and hyp must be texts")
    except (ValueError, SyntaxError, KeyError, TypeError) as error:
        raise UserError(
            f"{str(path)!r} is no file generations-*.jsonl or recogs-*.txt: {type(error).__name__}: {error}"
        ) from error
    counts = Counter(row["key"] for row in rows)
    if repeated := [key for key, count in counts.items() if count > 1]:
        raise UserError(
            f"{str(path)!r} has {len(repeated)} repeated keys, such as {repeated[0]!r}. "
            "Give every utterance a key of its own, and evaluate again."
        )
    if not rows:
        raise UserError(
            f"{str(path)!r} holds no utterance: give a file generations-*.jsonl or recogs-*.txt"
        )
    return rows


def _read_recogs(lines: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for each reference with its hypothesis; a key that is repeated has several rows."""
    rows: list[dict[str, Any]] = []
    last_of: dict[str, dict[str, Any]] = {}
    for line in filter(str.strip, lines):
        match = RECOGS_LINE.fullmatch(line)
        if not match:
            raise ValueError(f"{line[:80]!r} is neither a reference nor a hypothesis")
        key, what, units = match["key"], match["what"], match["units"]
        if what.startswith("timestamp"):
            continue
        if what in last_of.get(key, {what: None}):
            last_of[key] = {"key": key}
            rows.append(last_of[key])
        last_of[key][what] = " ".join(ast.literal_eval(units))
    return rows


def is_recogs(path: Path) -> bool:
    return path.name.startswith("recogs")


def as_text(name: str, found: Comparison) -> str:
    low, high = found.difference_ci95
    what = found.metric.upper()
    return (
        f"{name}: {what} {found.a:.2f} % -> {found.b:.2f} %, {found.difference:+.2f} points (95 %: {low:+.2f} to {high:+.2f}), "
        f"p = {found.p:.2g} (permutations by {found.by}); of {found.utterances} utterances {found.better} better, {found.worse} worse; "
        f"normalizer {found.normalizer}"
    )
