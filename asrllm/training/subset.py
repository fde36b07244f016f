"""Utterances of a validation set that are decoded during training."""

import math
import sys
from collections.abc import Iterator

import numpy as np

from asrllm.audio.reader import Reader, Sample, SampleError
from asrllm.collator.batch import Collator
from asrllm.data.corpora import Corpus
from asrllm.data.plan import Item
from asrllm.defaults import RATE
from asrllm.escape import escape

BATCH_SIZE = 8  # utterances
PADDING_KEY = ""  # key of silence that fills up a batch


class DecodingSubset:
    """`count` utterances spread evenly over a corpus, the longest first."""

    def __init__(self, corpus: Corpus, reader: Reader, collator: Collator, *, count: int) -> None:
        """Choose the utterances.

        Args:
            corpus: validation set, after its filters.
            reader: reads the audio.
            collator: chooses the prompts.
            count: number of utterances, or more than the corpus has for all of them.
        """
        self.reader = reader
        self.collator = collator
        rows = corpus.index.rows
        passing = np.flatnonzero(corpus.passes(rows[:]))
        spread = np.linspace(0, len(passing) - 1, min(count, len(passing)))
        chosen = passing[np.unique(spread.round().astype(int))]
        lengths = rows["samples"][chosen].astype(np.int64)
        self.rows = chosen[np.argsort(-lengths, kind="stable")].tolist()

    def batches(self, rank: int, ranks: int) -> Iterator[list[tuple[Sample, str]]]:
        """Yield the batches of a rank as lists of (utterance, prompt).

        All ranks get the same number of batches of the same sizes. Silence with the key
        PADDING_KEY replaces utterances that cannot be read or that a rank has fewer of.
        """
        per_rank = -(-len(self.rows) // ranks)
        own_rows: list[int | None] = [*self.rows[rank::ranks]]
        own_rows += [None] * (per_rank - len(own_rows))
        for start in range(0, per_rank, BATCH_SIZE):
            samples = [self._read(row) for row in own_rows[start : start + BATCH_SIZE]]
            yield [(sample, self._prompt(sample)) for sample in samples]

    def num_batches(self, ranks: int) -> int:
        """Return the number of batches of each rank."""
        per_rank = math.ceil(len(self.rows) / ranks)
        return math.ceil(per_rank / BATCH_SIZE)

    def _prompt(self, sample: Sample) -> str:
        if sample.key == PADDING_KEY:
            return self.collator.prompts[0].text
        return self.collator.prompt(sample)

    def _read(self, row: int | None) -> Sample:
        """Return the utterance of an index row, or silence."""
        if row is not None:
            try:
                return self.reader.read(Item(corpus=0, row=row))
            except SampleError as error:
                print(escape(f"unreadable: {error}"), file=sys.stderr, flush=True)
        shortest, longest = self.reader.limits
        samples = min(max(RATE, shortest), longest)
        return Sample(key=PADDING_KEY, wave=np.zeros(samples, np.float32), text="")
