"""Summarize a decoded test set: error rates and hallucination flags, by duration and speaker."""

import bisect
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from asrllm.evaluation.score import (
    NOTHING,
    UNITS,
    Errors,
    Transcript,
    align,
    errors,
    fitting_metric,
    groups_of,
)
from asrllm.models.asr_llm.answers import first_loop

DURATIONS = (2, 5, 10, 15, 20, 30)  # seconds; the borders of the breakdown
BURST = 5  # consecutive inserted units
LOOP = 8  # units; a longer repetition of the same few units is a loop
LENGTH_FACTOR = 2.0  # ratio of lengths from which a text is too long or too short
LENGTH_UNITS = 5  # the smallest difference of such a text in units
HALLUCINATION_FLAGS = {
    "empty": "the reference has text, the hypothesis has none",
    "invented": "the hypothesis has text, the reference has none",
    "loop": "a few units are repeated over and over",
    "burst": f"at least {BURST} consecutive units are inserted",
    "long": f"more than {LENGTH_FACTOR:g} times as long as the reference",
    "short": f"less than 1/{LENGTH_FACTOR:g} as long as the reference",
    "limit": "truncated at the length limit",
}
Pairs = list[tuple[str, str]]
Entry = dict[str, Any]  # a JSON object of results.json


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A decoded and scored test set.

    Attributes:
        transcripts: one per utterance.
        metric: the metric of UNITS that fits the references.
        errors: counts by metric.
        pairs: the alignment of each utterance in units of `metric`.
        flags: the hallucination flags of each utterance.
        interval_by: what the bootstrap draws: "speaker", "recording" or "utterance".
        groups: (utterances,) group of each utterance, see groups_of.
    """

    transcripts: Sequence[Transcript]
    metric: str
    errors: dict[str, Errors]
    pairs: list[Pairs]
    flags: list[list[str]]
    interval_by: str
    groups: np.ndarray | None

    @property
    def main(self) -> Errors:
        """The errors in units of `metric`."""
        return self.errors[self.metric]

    def rates(self) -> Entry:
        """Return wer, cer and mer with their intervals, and what the bootstrap draws."""
        entry: Entry = {"metric": self.metric}
        for name, counts in self.errors.items():
            low, high = counts.confidence_interval(self.groups)
            entry[name] = round(counts.rate, 3)
            entry[f"{name}_ci95"] = [round(low, 3), round(high, 3)]
        entry["ci95_by"] = self.interval_by
        return entry

    def percentages(self) -> dict[str, dict[str, float]]:
        """Return insertions, deletions and substitutions in per cent of the reference units."""
        found = {}
        for name, counts in self.errors.items():
            found[name] = {
                "ins": round(counts.percentage(counts.ins), 3),
                "del": round(counts.percentage(counts.dels), 3),
                "sub": round(counts.percentage(counts.subs), 3),
            }
        return found

    def hallucinations(self) -> dict[str, float]:
        """Return the number of utterances with each flag, and the length ratio.

        The length ratio is the number of hypothesis units divided by that of reference units.
        """
        counts = Counter(itertools.chain.from_iterable(self.flags))
        found: dict[str, float] = {flag: counts[flag] for flag in HALLUCINATION_FLAGS}
        hypothesis_units = 0
        for pairs in self.pairs:
            hypothesis_units += sum(hypothesis != NOTHING for _, hypothesis in pairs)
        ratio = hypothesis_units / max(int(self.main.units.sum()), 1)
        found["length_ratio"] = round(ratio, 4)
        return found

    def by_duration(self) -> dict[str, Entry]:
        """Return the results by ranges of duration, shortest first."""
        names = [f"{low:g}-{high:g} s" for low, high in itertools.pairwise([0, *DURATIONS])]
        names.append(f"over {DURATIONS[-1]:g} s")

        def name_of(transcript: Transcript) -> str:
            return names[bisect.bisect_right(DURATIONS, transcript.duration)]

        return self._by(name_of, order=names)

    def by_speaker(self) -> dict[str, Entry]:
        """Return the results by speaker, worst first, or nothing if no speaker is known."""
        found = self._by(lambda transcript: transcript.speaker)
        if not found.keys() - {""}:
            return {}
        return dict(sorted(found.items(), key=lambda item: -item[1][self.metric]))

    def by_corpus(self) -> dict[str, Entry]:
        """Return the results by corpus, or nothing if there is only one."""
        found = self._by(lambda transcript: transcript.corpus)
        if len(found) < 2:
            return {}
        return found

    def _by(
        self, name_of: Callable[[Transcript], str], order: Sequence[str] = ()
    ) -> dict[str, Entry]:
        rows_of: dict[str, list[int]] = {name: [] for name in order}
        for i, transcript in enumerate(self.transcripts):
            rows_of.setdefault(name_of(transcript), []).append(i)
        found = {}
        for name, rows in rows_of.items():
            if rows:
                seconds = sum(self.transcripts[i].duration for i in rows)
                found[name] = {
                    "utterances": len(rows),
                    "hours": round(seconds / 3600, 4),
                    self.metric: round(self.main.select(rows).rate, 3),
                }
        return found

    def entry(self) -> Entry:
        """Return the test set's entry of results.json."""
        word_errors = self.errors["wer"]
        seconds = sum(transcript.duration for transcript in self.transcripts)
        return {
            **self.rates(),
            "utterances": len(self.transcripts),
            "hours": round(seconds / 3600, 4),
            "words": int(word_errors.units.sum()),
            "insertions": int(word_errors.ins.sum()),
            "deletions": int(word_errors.dels.sum()),
            "substitutions": int(word_errors.subs.sum()),
            "percentages": self.percentages(),
            "empty_references": sum(not transcript.reference for transcript in self.transcripts),
            "hallucinations": self.hallucinations(),
            "by_duration": self.by_duration(),
            "by_speaker": self.by_speaker(),
            "by_corpus": self.by_corpus(),
        }


def score(transcripts: Sequence[Transcript]) -> Scored:
    """Score a decoded test set."""
    metric = fitting_metric([transcript.reference for transcript in transcripts])
    split = UNITS[metric]
    all_pairs = []
    flags = []
    for transcript in transcripts:
        pairs = align(split(transcript.reference), split(transcript.hypothesis))
        all_pairs.append(pairs)
        flags.append(hallucination_flags(transcript, pairs))
    kind, groups = groups_of(transcripts)
    return Scored(
        transcripts=transcripts,
        metric=metric,
        errors={name: errors(transcripts, name) for name in UNITS},
        pairs=all_pairs,
        flags=flags,
        interval_by=kind,
        groups=groups,
    )


def hallucination_flags(transcript: Transcript, pairs: Pairs) -> list[str]:
    """Return the HALLUCINATION_FLAGS of an utterance.

    Args:
        transcript: the utterance.
        pairs: its alignment.
    """
    reference = [unit for unit, _ in pairs if unit != NOTHING]
    hypothesis = [unit for _, unit in pairs if unit != NOTHING]
    longer = len(hypothesis) - len(reference)
    is_loop = first_loop(hypothesis, LOOP) is not None and first_loop(reference, LOOP) is None
    is_long = len(hypothesis) > LENGTH_FACTOR * len(reference)
    is_short = 0 < LENGTH_FACTOR * len(hypothesis) < len(reference)
    found = {
        "empty": bool(reference) and not hypothesis,
        "invented": bool(hypothesis) and not reference,
        "loop": is_loop or transcript.end == "loop",
        "burst": longest_insertion(pairs) >= BURST,
        "long": is_long and longer >= LENGTH_UNITS,
        "short": is_short and -longer >= LENGTH_UNITS,
        "limit": transcript.end == "limit",
    }
    return [flag for flag, is_set in found.items() if is_set]


def longest_insertion(pairs: Pairs) -> int:
    """Return the largest number of consecutive inserted units in an alignment."""
    longest = 0
    current = 0
    for reference, _ in pairs:
        current = current + 1 if reference == NOTHING else 0
        longest = max(longest, current)
    return longest
