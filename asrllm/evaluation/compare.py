"""Compare two results on the same utterances: is one better, and by how much?"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asrllm.data.text import normalizer
from asrllm.errors import UserError
from asrllm.escape import escape
from asrllm.evaluation.result_files import ResultRow, find_sets, is_recogs, read_rows
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

PERMUTATIONS = 10_000


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Result b compared with result a.

    Attributes:
        metric: "wer", "cer" or "mer".
        normalizer: normalizer of both results.
        a: error rate of a in per cent.
        b: error rate of b in per cent.
        difference: b - a in percentage points.
        difference_ci95: 95 % confidence interval of the difference.
        p: probability of a difference at least this large by chance.
        better: utterances with fewer errors in b.
        worse: utterances with more errors in b.
        utterances: number of utterances.
        by: what is drawn and exchanged: "speaker", "recording" or "utterance".
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
        """Return the comparison as JSON for results.json."""
        return asdict(self)


def compare_transcripts(
    a: Sequence[Transcript], b: Sequence[Transcript], *, normalizer: str
) -> Comparison:
    """Compare transcripts in the metric that fits the references of a.

    Args:
        a: the first result.
        b: the second result on the same utterances in the same order.
        normalizer: name of the normalizer.
    """
    metric = fitting_metric([transcript.reference for transcript in a])
    first = errors(a, metric)
    second = errors(b, metric)
    by, groups = groups_of(a)
    if groups is None:  # recogs-*.txt have no speakers
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
    """Return the 95 % bootstrap interval of b's rate minus a's.

    Both rates are over the same drawn utterances or groups (Bisani and Ney, 2004). A single
    utterance or group gives no bound. Without any difference, the rule of three applies.

    Args:
        a: errors of each utterance under the first system.
        b: errors of the same utterances under the second.
        groups: (n,) number of the speaker or recording of each utterance; None: each is its own.

    Returns:
        The bounds in percentage points.
    """
    difference = sum_by(groups, b.total - a.total)
    units = sum_by(groups, a.units)
    if len(units) < 2:
        return -max(100.0, a.rate), max(100.0, b.rate)
    if not difference.any():
        most = min(100.0, 300 / max(float(units.sum()), 1.0))
        return -most, most
    return bootstrap_interval(difference, units)


def p_value(a: Errors, b: Errors, groups: np.ndarray | None) -> float:
    """Return the two-sided p value of the paired permutation test.

    The errors of a and b are exchanged at random for each utterance or group. This is Fisher's
    randomization test as in Noreen, "Computer-Intensive Methods for Testing Hypotheses", 1989.
    Arguments are those of `difference_interval`.
    """
    difference = sum_by(groups, b.total - a.total)
    # Exchanging equal errors changes nothing.
    difference = difference[difference != 0]
    observed = abs(int(difference.sum()))
    rng = np.random.default_rng(0)
    at_least = 0
    for _ in range(PERMUTATIONS):
        signs = rng.integers(2, size=len(difference)) * 2 - 1
        if abs(int((signs * difference).sum())) >= observed:
            at_least += 1
    # The observed order is one of the permutations, so p is never 0.
    return (at_least + 1) / (PERMUTATIONS + 1)


def compare_results(a: Path, b: Path) -> dict[str, Comparison]:
    """Compare two results on every test set that both have.

    Args:
        a: a directory of `asrllm evaluate`, whose newest evaluation is used, or a file
            generations-*.jsonl or recogs-*.txt.
        b: the same.

    Raises:
        UserError: a path has no results, or they have no test set in common.
    """
    if a.is_file() and b.is_file():
        return {a.stem: compare_files(a, b)}
    sets_a = find_sets(a, like=b)
    sets_b = find_sets(b, like=a)
    names = [name for name in sets_a if name in sets_b]
    if not names:
        raise UserError(
            f"{str(a)!r} (sets: {', '.join(sets_a)}) and {str(b)!r} (sets: {', '.join(sets_b)}) "
            "have no test set in common. Evaluate both on the same sets."
        )
    return {name: compare_files(sets_a[name], sets_b[name]) for name in names}


def compare_files(a: Path, b: Path) -> Comparison:
    """Compare two result files.

    Raises:
        UserError: they have different utterances, references or normalizers.
    """
    rows_a = read_rows(a)
    rows_b = read_rows(b)
    name = common_normalizer(a, rows_a, b, rows_b)
    first = rows_by_key(rows_a, name)
    second = rows_by_key(rows_b, name)
    # recogs-*.txt of an evaluation are normalized, and most normalizers change their own output
    if is_recogs(a) and not is_recogs(b):
        first = _as_written(rows_a, first, second)
    elif is_recogs(b) and not is_recogs(a):
        second = _as_written(rows_b, second, first)
    only_one = sorted(first.keys() ^ second.keys())
    if only_one:
        raise UserError(
            f"{str(a)!r} and {str(b)!r} have different utterances: {len(only_one)} are in only one "
            f"of them, for example {only_one[0]!r}. Evaluate both on the same set."
        )
    different = [key for key in first if not same_reference(first[key], second[key])]
    if different:
        key = different[0]
        raise UserError(
            f"{str(a)!r} and {str(b)!r} have different references for {len(different)} utterances, "
            f"for example {key!r}: {first[key].reference!r} and {second[key].reference!r}. "
            "Evaluate both on the same set."
        )
    return compare_transcripts(
        list(first.values()), [second[key] for key in first], normalizer=name
    )


def rows_by_key(rows: Sequence[ResultRow], name: str) -> dict[str, Transcript]:
    """Return the normalized transcripts by their keys as recogs-*.txt write them.

    Args:
        rows: return value of `read_rows`.
        name: name of the normalizer.
    """
    return {escape(transcript.key): transcript for transcript in transcripts(rows, name)}


def _as_written(
    rows: Sequence[ResultRow], normalized: dict[str, Transcript], other: Mapping[str, Transcript]
) -> dict[str, Transcript]:
    """Return the transcripts as written if their references are then those of the other result.

    Args:
        rows: rows of a recogs-*.txt.
        normalized: the normalized transcripts of these rows.
        other: the normalized transcripts of a generations-*.jsonl.
    """
    as_written = rows_by_key(rows, "none")
    if as_written.keys() != other.keys():
        return normalized
    # Other references show that the file is not normalized, or by another normalizer.
    if not all(same_reference(as_written[key], other[key]) for key in as_written):
        return normalized
    return as_written


def same_reference(a: Transcript, b: Transcript) -> bool:
    """Return whether two references have the same characters.

    Spaces are ignored: for character error rates, recogs-*.txt have one between all characters.
    """
    return characters(a.reference) == characters(b.reference)


def common_normalizer(
    a: Path, rows_a: Sequence[ResultRow], b: Path, rows_b: Sequence[ResultRow]
) -> str:
    """Return the name of the normalizer of both results. The recogs-*.txt do not contain it.

    Raises:
        UserError: the results have different normalizers.
    """
    paths = {}
    for path, rows in ((a, rows_a), (b, rows_b)):
        for row in rows:
            if "normalizer" in row:
                paths[str(row["normalizer"])] = str(path)
    if len(paths) > 1:
        used = " and ".join(f"{path!r} with {name!r}" for name, path in paths.items())
        raise UserError(
            f"the results have different normalizers: {used}. "
            "Evaluate one of them again with the same normalizer=."
        )
    return next(iter(paths), "none")


def transcripts(rows: Sequence[ResultRow], name: str) -> list[Transcript]:
    """Normalize the rows of a result file.

    Args:
        rows: return value of `read_rows`.
        name: name of the normalizer.
    """
    normalize = normalizer(name)
    found = []
    for row in rows:
        transcript = Transcript(
            key=row["key"],
            reference=normalize(row["ref"]),
            hypothesis=normalize(row["hyp"]),
            raw_reference=row["ref"],
            raw_hypothesis=row["hyp"],
            duration=row["duration"],
            speaker=str(row.get("speaker", "")),
            recording=str(row.get("recording", "")),
        )
        found.append(transcript)
    return found


def comparison_text(name: str, found: Comparison) -> str:
    """Return the comparison of a test set as one line."""
    low, high = found.difference_ci95
    rates = f"{found.metric.upper()} {found.a:.2f} % -> {found.b:.2f} %"
    return (
        f"{name}: {rates}, {found.difference:+.2f} points (95 % CI {low:+.2f} to {high:+.2f}), "
        f"p = {found.p:.2g} (permutation test by {found.by}); "
        f"{found.better} of {found.utterances} utterances better, {found.worse} worse; "
        f"normalizer {found.normalizer}"
    )
