"""Error rates by exact alignment, with their confidence intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import kaldialign
import numpy as np

BOOTSTRAP_SAMPLES = 1000
EPSILON = "*"  # stands for nothing in an alignment


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """One utterance's reference and hypothesis after normalisation, as they were before it, and its audio's length in seconds."""

    key: str
    reference: str
    hypothesis: str
    raw_reference: str
    raw_hypothesis: str
    duration: float


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
        return 100 * float(self.total.sum()) / max(float(self.units.sum()), 1.0)

    def confidence_interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of the rate over utterances (Bisani and Ney, "Bootstrap Estimates for Confidence Intervals", 2004)."""
        draws = np.random.default_rng(0).integers(len(self.units), size=(BOOTSTRAP_SAMPLES, len(self.units)))
        rates = 100 * self.total[draws].sum(1) / np.maximum(self.units[draws].sum(1), 1)
        low, high = np.percentile(rates, [2.5, 97.5])
        return float(low), float(high)


def word_errors(transcripts: Sequence[Transcript]) -> Errors:
    return count_errors([(t.reference.split(), t.hypothesis.split()) for t in transcripts])


def character_errors(transcripts: Sequence[Transcript]) -> Errors:
    """Spaces do not count."""
    return count_errors([(list(t.reference.replace(" ", "")), list(t.hypothesis.replace(" ", ""))) for t in transcripts])


def count_errors(pairs: Sequence[tuple[list[str], list[str]]]) -> Errors:
    counts = [kaldialign.edit_distance(reference, hypothesis) for reference, hypothesis in pairs]
    columns = {key: np.array([c[key] for c in counts]) for key in ("ins", "del", "sub")}
    units = np.array([len(reference) for reference, _ in pairs])
    return Errors(ins=columns["ins"], dels=columns["del"], subs=columns["sub"], units=units)


def align(reference: list[str], hypothesis: list[str]) -> list[tuple[str, str]]:
    """Pairs of (reference word, hypothesis word); EPSILON where there is none."""
    return kaldialign.align(reference, hypothesis, EPSILON)
