"""The utterances of a validation set that are decoded in the course of training."""

import sys
from collections.abc import Iterator

import numpy as np

from asrllm.audio.reader import Reader, Sample, SampleError
from asrllm.collator.batch import Collator
from asrllm.data.corpora import Corpus
from asrllm.data.index import RATE
from asrllm.data.plan import Item
from asrllm.escape import escape

TOGETHER = 8  # utterances in a batch
SILENCE = ""  # the key of what fills up a batch


class Subset:
    """`count` utterances spread evenly over a corpus, the longest first."""

    def __init__(self, corpus: Corpus, reader: Reader, collator: Collator, *, count: int) -> None:
        self.reader, self.collator, rows = reader, collator, corpus.index.rows
        kept = np.flatnonzero(corpus.passes(rows[:]))
        chosen = kept[
            np.unique(np.linspace(0, len(kept) - 1, min(count, len(kept))).round().astype(int))
        ]
        self.rows = chosen[
            np.argsort(-rows["samples"][chosen].astype(np.int64), kind="stable")
        ].tolist()

    def batches(self, rank: int, ranks: int) -> Iterator[list[tuple[Sample, str]]]:
        """Utterances with their prompts: every rank's share, in as many batches of as many. Silence without a key stands in for what
        cannot be read, and where a rank has fewer than others."""
        each = -(-len(self.rows) // ranks)
        mine: list[int | None] = [*self.rows[rank::ranks]]
        mine += [None] * (each - len(mine))
        for start in range(0, each, TOGETHER):
            samples = [self._read(row) for row in mine[start : start + TOGETHER]]
            first = self.collator.prompts[0].text
            yield [(s, first if s.key == SILENCE else self.collator.prompt(s)) for s in samples]

    def _read(self, row: int | None) -> Sample:
        if row is not None:
            try:
                return self.reader.read(Item(corpus=0, row=row))
            except SampleError as error:
                print(escape(f"unreadable: {error}"), file=sys.stderr, flush=True)
        fewest, most = self.reader.limits
        return Sample(key=SILENCE, wave=np.zeros(min(max(RATE, fewest), most), np.float32), text="")
