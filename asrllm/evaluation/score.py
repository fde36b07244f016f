"""Error rates from exact alignments, with their confidence intervals."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import kaldialign
import numpy as np

from asrllm.data.scripts import UNSPACED

BOOTSTRAP_SAMPLES = 1000
FEWEST_GROUPS = 5  # speakers or recordings; intervals over fewer are meaningless
NOTHING = ""  # the missing unit of an insertion or deletion in an alignment
STRAY = 0.02  # ratio of units in another script up to which they do not change the metric


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """The reference and hypothesis of an utterance.

    Attributes:
        key: the utterance's key.
        reference: the normalized reference.
        hypothesis: the normalized hypothesis.
        raw_reference: the reference before normalization.
        raw_hypothesis: the hypothesis before normalization.
        duration: seconds of audio.
        speaker: "" if unknown.
        recording: "" if unknown.
        corpus: "" if unknown.
        end: what ended the hypothesis, see generation.Answer.
        row: row in the corpus's index; -1 if unknown.
    """

    key: str
    reference: str
    hypothesis: str
    raw_reference: str
    raw_hypothesis: str
    duration: float
    speaker: str = ""
    recording: str = ""
    corpus: str = ""
    end: str = "stop"
    row: int = -1


def words(text: str) -> list[str]:
    """Split a text at spaces."""
    return text.split()


def characters(text: str) -> list[str]:
    """Split a text into characters without spaces."""
    return list(text.replace(" ", ""))


def mixed(text: str) -> list[str]:
    """Split a text into the units of the mixed error rate.

    These are characters in scripts without spaces and words in all others, as is usual for the
    Mandarin-English corpus SEAME.
    """
    return re.findall(rf"[{UNSPACED}]|[^\s{UNSPACED}]+", text)


UNITS: dict[str, Callable[[str], list[str]]] = {
    "wer": words,
    "cer": characters,
    "mer": mixed,
}


def fitting_metric(references: Sequence[str]) -> str:
    """Return the metric that fits the script of the references.

    It is "wer" for scripts with spaces between words, "cer" for scripts without, and "mer" for a
    mixture. A few letters of another script do not count.
    """
    spaced = 0
    unspaced = 0
    for reference in references:
        for unit in mixed(reference):
            if not re.search(r"[^\W\d]", unit):  # no letter
                continue
            if re.match(f"[{UNSPACED}]", unit):
                unspaced += 1
            else:
                spaced += 1
    ratio = unspaced / max(spaced + unspaced, 1)
    if ratio < STRAY:
        return "wer"
    if ratio > 1 - STRAY:
        return "cer"
    return "mer"


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Error counts of utterances.

    Attributes:
        ins: (utterances,) insertions.
        dels: (utterances,) deletions.
        subs: (utterances,) substitutions.
        units: (utterances,) units of the references: words, characters or both.
    """

    ins: np.ndarray
    dels: np.ndarray
    subs: np.ndarray
    units: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """All errors, (utterances,)."""
        return self.ins + self.dels + self.subs

    @property
    def rate(self) -> float:
        """Error rate over all utterances in per cent."""
        return self.percentage(self.total)

    def percentage(self, counts: np.ndarray) -> float:
        """Return the sum of counts (utterances,) in per cent of the reference units."""
        units = max(float(self.units.sum()), 1.0)
        return 100 * float(counts.sum()) / units

    def select(self, rows: Sequence[int]) -> "Errors":
        """Return the errors of some of the utterances."""
        i = np.asarray(rows, dtype=int)
        return Errors(
            ins=self.ins[i],
            dels=self.dels[i],
            subs=self.subs[i],
            units=self.units[i],
        )

    def confidence_interval(self, groups: np.ndarray | None = None) -> tuple[float, float]:
        """Return the 95 % bootstrap interval of the rate.

        Utterances are drawn with replacement (Bisani and Ney, "Bootstrap Estimates for Confidence
        Intervals", 2004), or whole groups of them (Liu and Peng, "Statistical Testing on ASR
        Performance via Blockwise Bootstrap", 2020). Without errors, the upper bound is 3 errors in
        all units (Hanley and Lippman-Hand, "If Nothing Goes Wrong, Is Everything All Right?",
        1983). A single utterance or group gives no bound.

        Args:
            groups: (utterances,) number of the speaker or recording, None to draw utterances.
        """
        total = sum_by(groups, self.total)
        units = sum_by(groups, self.units)
        if len(units) < 2:
            return 0.0, max(100.0, self.rate)
        if not total.any():
            return 0.0, min(100.0, 300 / max(float(units.sum()), 1.0))
        return bootstrap_interval(total, units)


def bootstrap_interval(total: np.ndarray, units: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of 100 * sum(total) / sum(units), drawn with replacement.

    Args:
        total: (n,) errors of each utterance or group.
        units: (n,) reference units of each utterance or group.
    """
    # a fixed seed, so that the same results always have the same interval
    rng = np.random.default_rng(0)
    rates = np.empty(BOOTSTRAP_SAMPLES)
    for i in range(BOOTSTRAP_SAMPLES):
        drawn = rng.integers(len(units), size=len(units))
        drawn_units = max(units[drawn].sum(), 1)
        rates[i] = 100 * total[drawn].sum() / drawn_units
    ends: np.ndarray = np.percentile(rates, [2.5, 97.5])
    return float(ends[0]), float(ends[1])


def sum_by(groups: np.ndarray | None, counts: np.ndarray) -> np.ndarray:
    """Sum counts (utterances,) over the utterances of each group, (groups,)."""
    if groups is None:
        return counts
    return np.bincount(groups, weights=counts)


def groups_of(transcripts: Sequence[Transcript]) -> tuple[str, np.ndarray | None]:
    """Choose what the bootstrap draws.

    Returns:
        "speaker", "recording" or "utterance", and the (utterances,) group of each utterance, which
        is None for "utterance".
    """
    for kind in ("speaker", "recording"):
        names = [getattr(transcript, kind) for transcript in transcripts]
        if all(names) and len(set(names)) >= FEWEST_GROUPS:
            return kind, np.unique(names, return_inverse=True)[1]
    return "utterance", None


def errors(transcripts: Sequence[Transcript], metric: str = "wer") -> Errors:
    """Count the errors of utterances in the units of a metric of UNITS."""
    split = UNITS[metric]
    return count_errors([(split(t.reference), split(t.hypothesis)) for t in transcripts])


def count_errors(pairs: Sequence[tuple[list[str], list[str]]]) -> Errors:
    """Count the errors in pairs of reference units and hypothesis units."""
    counts = [kaldialign.edit_distance(reference, hypothesis) for reference, hypothesis in pairs]
    return Errors(
        ins=np.array([count["ins"] for count in counts], dtype=int),
        dels=np.array([count["del"] for count in counts], dtype=int),
        subs=np.array([count["sub"] for count in counts], dtype=int),
        units=np.array([len(reference) for reference, _ in pairs], dtype=int),
    )


def align(reference: list[str], hypothesis: list[str]) -> list[tuple[str, str]]:
    """Return aligned pairs (reference unit, hypothesis unit). A missing unit is NOTHING."""
    return kaldialign.align(reference, hypothesis, NOTHING)
