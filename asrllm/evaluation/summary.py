"""What is said of a decoded test set: rates, signs of hallucination, and both by duration and speaker."""

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
from asrllm.models.asr_llm.generation import first_loop

DURATIONS = (2, 5, 10, 15, 20, 30)  # seconds; the borders of the breakdown
BURST = 5  # units inserted in a row
LOOP = 8  # units; a text whose same few units last longer is a loop
FAR_OFF, FEWEST = (
    2.0,
    5,
)  # a text that is so many times as long or short as the reference, and so many units longer or shorter
HALLUCINATION_FLAGS = {
    "empty": "nothing was heard, something was said",
    "invented": "something was heard, nothing was said",
    "loop": "a few units over and over",
    "burst": f"at least {BURST} units inserted in a row",
    "long": f"more than {FAR_OFF:g} times as long as the reference",
    "short": f"less than 1/{FAR_OFF:g} as long as the reference",
    "limit": "cut off at the length limit",
}
Pairs = list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A decoded test set. metric: the one of UNITS that fits its references, which pairs (alignments) and signs are of."""

    transcripts: Sequence[Transcript]
    metric: str
    errors: dict[str, Errors]
    pairs: list[Pairs]
    signs: list[list[str]]
    interval_by: str
    groups: np.ndarray | None

    @property
    def main(self) -> Errors:
        return self.errors[self.metric]

    def rates(self) -> dict[str, Any]:
        """wer, cer, mer and their intervals, with what the intervals are over."""
        said: dict[str, Any] = {"metric": self.metric}
        for name, counts in self.errors.items():
            said[name] = round(counts.rate, 3)
            said[f"{name}_ci95"] = [round(x, 3) for x in counts.confidence_interval(self.groups)]
        said["ci95_by"] = self.interval_by
        return said

    def shares(self) -> dict[str, dict[str, float]]:
        """Insertions, deletions and substitutions in per cent of the reference's units."""
        parts = {
            name: {"ins": e.ins, "del": e.dels, "sub": e.subs} for name, e in self.errors.items()
        }
        return {
            name: {kind: round(self.errors[name].share(n), 3) for kind, n in part.items()}
            for name, part in parts.items()
        }

    def hallucinations(self) -> dict[str, Any]:
        """Utterances with each sign, and units heard to units said, over all utterances."""
        counts = Counter(itertools.chain.from_iterable(self.signs))
        heard = sum(hyp != NOTHING for pairs in self.pairs for _, hyp in pairs)
        ratio = heard / max(int(self.main.units.sum()), 1)
        return {sign: counts[sign] for sign in HALLUCINATION_FLAGS} | {
            "length_ratio": round(ratio, 4)
        }

    def by_duration(self) -> dict[str, dict[str, Any]]:
        borders = [0, *DURATIONS, float("inf")]
        names = [
            f"{low:g}-{high:g} s" if high < float("inf") else f"over {low:g} s"
            for low, high in itertools.pairwise(borders)
        ]
        bins = [bisect.bisect_right(DURATIONS, t.duration) for t in self.transcripts]
        return self._by(lambda i: names[bins[i]], order=names)

    def by_speaker(self) -> dict[str, dict[str, Any]]:
        """Worst first; empty where no speaker is known."""
        found = self._by(lambda i: self.transcripts[i].speaker)
        return (
            dict(sorted(found.items(), key=lambda item: -item[1][self.metric]))
            if found.keys() - {""}
            else {}
        )

    def by_corpus(self) -> dict[str, dict[str, Any]]:
        """Empty where the test set is of one."""
        found = self._by(lambda i: self.transcripts[i].corpus)
        return found if len(found) > 1 else {}

    def _by(self, of: Callable[[int], str], order: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
        chosen: dict[str, list[int]] = {name: [] for name in order}
        for i in range(len(self.transcripts)):
            chosen.setdefault(of(i), []).append(i)
        return {
            name: {
                "utterances": len(rows),
                "hours": round(sum(self.transcripts[i].duration for i in rows) / 3600, 4),
                self.metric: round(self.main.of(rows).rate, 3),
            }
            for name, rows in chosen.items()
            if rows
        }

    def entry(self) -> dict[str, Any]:
        """For results.json."""
        words = self.errors["wer"]
        return {
            **self.rates(),
            "utterances": len(self.transcripts),
            "hours": round(sum(t.duration for t in self.transcripts) / 3600, 4),
            "words": int(words.units.sum()),
            "insertions": int(words.ins.sum()),
            "deletions": int(words.dels.sum()),
            "substitutions": int(words.subs.sum()),
            "shares": self.shares(),
            "empty_references": sum(not t.reference for t in self.transcripts),
            "hallucinations": self.hallucinations(),
            "by_duration": self.by_duration(),
            "by_speaker": self.by_speaker(),
            "by_corpus": self.by_corpus(),
        }


def score(transcripts: Sequence[Transcript]) -> Scored:
    metric = fitting_metric([t.reference for t in transcripts])
    units = UNITS[metric]
    pairs = [align(units(t.reference), units(t.hypothesis)) for t in transcripts]
    kind, groups = groups_of(transcripts)
    return Scored(
        transcripts=transcripts,
        metric=metric,
        errors={name: errors(transcripts, name) for name in UNITS},
        pairs=pairs,
        signs=[signs_of(t, aligned) for t, aligned in zip(transcripts, pairs, strict=True)],
        interval_by=kind,
        groups=groups,
    )


def signs_of(transcript: Transcript, pairs: Pairs) -> list[str]:
    """The HALLUCINATION_FLAGS that a hypothesis bears."""
    reference = [ref for ref, _ in pairs if ref != NOTHING]
    hypothesis = [hyp for _, hyp in pairs if hyp != NOTHING]
    inserted = [
        len(list(run))
        for is_inserted, run in itertools.groupby(ref == NOTHING for ref, _ in pairs)
        if is_inserted
    ]
    longer = len(hypothesis) - len(reference)
    loops = first_loop(hypothesis, LOOP) is not None and first_loop(reference, LOOP) is None
    found = {
        "empty": bool(reference) and not hypothesis,
        "invented": bool(hypothesis) and not reference,
        "loop": loops or transcript.end == "loop",
        "burst": max(inserted, default=0) >= BURST,
        "long": longer >= FEWEST and len(hypothesis) > FAR_OFF * len(reference),
        "short": bool(hypothesis)
        and -longer >= FEWEST
        and FAR_OFF * len(hypothesis) < len(reference),
        "limit": transcript.end == "limit",
    }
    return [sign for sign, is_there in found.items() if is_there]
