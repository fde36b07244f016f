"""Error rates by exact alignment, with their confidence intervals."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import kaldialign
import numpy as np

BOOTSTRAP_SAMPLES = 1000
FEWEST_GROUPS = 5  # speakers or recordings; intervals over fewer say little
NOTHING = ""  # in an alignment
STRAY = 0.02  # of the units: so few of another script change nothing about what is counted
# kana, Chinese characters, Thai, Lao, Myanmar, Khmer
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """One utterance's reference and hypothesis after normalisation, as they were before it, and its audio's length in seconds.

    speaker, recording, corpus: "" where they are not known. end: what ended the hypothesis, as in generation.Answer. row: in the index.
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
    return text.split()


def characters(text: str) -> list[str]:
    """Spaces do not count."""
    return list(text.replace(" ", ""))


def mixed(text: str) -> list[str]:
    """The units of the mixed error rate: characters of scripts without spaces, words of the others (as for SEAME's Mandarin-English)."""
    return re.findall(rf"[{UNSPACED}]|[^\s{UNSPACED}]+", text)


UNITS: dict[str, Callable[[str], list[str]]] = {"wer": words, "cer": characters, "mer": mixed}


def fitting_metric(references: Sequence[str]) -> str:
    """wer for scripts with spaces between words, cer for those without, mer for both together; a letter here and there is no other."""
    units = [unit for text in references for unit in mixed(text) if re.search(r"[^\W\d]", unit)]
    share = sum(bool(re.match(f"[{UNSPACED}]", unit)) for unit in units) / max(len(units), 1)
    return "wer" if share < STRAY else "cer" if share > 1 - STRAY else "mer"


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Counts over utterances, arrays (utterances,): insertions, deletions, substitutions, reference units (words or characters)."""

    ins: np.ndarray
    dels: np.ndarray
    subs: np.ndarray
    units: np.ndarray

    @property
    def total(self) -> np.ndarray:
        return self.ins + self.dels + self.subs

    @property
    def rate(self) -> float:
        """Per cent of the reference's units."""
        return self.share(self.total)

    def share(self, counts: np.ndarray) -> float:
        return 100 * float(counts.sum()) / max(float(self.units.sum()), 1.0)

    def of(self, chosen: Sequence[int]) -> "Errors":
        """Of some of the utterances."""
        i = np.asarray(chosen, dtype=int)
        return Errors(ins=self.ins[i], dels=self.dels[i], subs=self.subs[i], units=self.units[i])

    def confidence_interval(self, groups: np.ndarray | None = None) -> tuple[float, float]:
        """95 % bootstrap interval of the rate over utterances (Bisani and Ney, "Bootstrap Estimates for Confidence Intervals", 2004).

        groups: (utterances,) numbers of the speaker or recording, which are then drawn as a whole (Liu and Peng, "Statistical Testing on
        ASR Performance via Blockwise Bootstrap", 2020). Without an error: up to 3 in all units (Hanley and Lippman-Hand, "If Nothing Goes
        Wrong, Is Everything All Right?", 1983). One utterance or group alone bounds nothing.
        """
        total, units = sum_by(groups, self.total), sum_by(groups, self.units)
        if len(units) < 2:
            return 0.0, max(100.0, self.rate)
        if not total.any():
            return 0.0, min(100.0, 300 / max(float(units.sum()), 1.0))
        return bootstrap_interval(total, units)


def bootstrap_interval(total: np.ndarray, units: np.ndarray) -> tuple[float, float]:
    """95 % interval of 100 * sum(total) / sum(units) over utterances or groups drawn with replacement; total, units: (drawn,)."""
    rng, rates = np.random.default_rng(0), np.empty(BOOTSTRAP_SAMPLES)
    for i in range(BOOTSTRAP_SAMPLES):
        drawn = rng.integers(len(units), size=len(units))
        rates[i] = 100 * total[drawn].sum() / max(units[drawn].sum(), 1)
    ends: np.ndarray = np.percentile(rates, [2.5, 97.5])
    return float(ends[0]), float(ends[1])


def sum_by(groups: np.ndarray | None, counts: np.ndarray) -> np.ndarray:
    """(utterances,) -> (groups,)"""
    return counts if groups is None else np.bincount(groups, weights=counts)


def groups_of(transcripts: Sequence[Transcript]) -> tuple[str, np.ndarray | None]:
    """What is drawn as a whole: ("speaker" | "recording" | "utterance", (utterances,) the group of each; None of utterances)."""
    for kind in ("speaker", "recording"):
        names = [getattr(t, kind) for t in transcripts]
        if all(names) and len(set(names)) >= FEWEST_GROUPS:
            return kind, np.unique(names, return_inverse=True)[1]
    return "utterance", None


def errors(transcripts: Sequence[Transcript], metric: str = "wer") -> Errors:
    """metric: of UNITS"""
    units = UNITS[metric]
    return count_errors([(units(t.reference), units(t.hypothesis)) for t in transcripts])


def count_errors(pairs: Sequence[tuple[list[str], list[str]]]) -> Errors:
    counts = [kaldialign.edit_distance(reference, hypothesis) for reference, hypothesis in pairs]
    columns = {key: np.array([c[key] for c in counts], dtype=int) for key in ("ins", "del", "sub")}
    units = np.array([len(reference) for reference, _ in pairs], dtype=int)
    return Errors(ins=columns["ins"], dels=columns["del"], subs=columns["sub"], units=units)


def align(reference: list[str], hypothesis: list[str]) -> list[tuple[str, str]]:
    """Pairs of (reference unit, hypothesis unit); NOTHING where there is none."""
    return kaldialign.align(reference, hypothesis, NOTHING)
