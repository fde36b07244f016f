"""Decoding a test set: batches of similar length, dealt out to the ranks, gathered by utterance; a killed decoding goes on."""

import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from asrllm import distributed
from asrllm.audio.reader import Reader, Sample, SampleError
from asrllm.data.cache import ShardCache
from asrllm.data.corpora import Corpus
from asrllm.data.index import RATE
from asrllm.data.plan import Item
from asrllm.errors import UserError
from asrllm.evaluation.engine import Engine, WithinMemory
from asrllm.evaluation.journal import DecodedUtterance, Journal
from asrllm.evaluation.score import Transcript
from asrllm.models.asr_llm.generation import Answer
from asrllm.progress import ProgressBar
from asrllm.training.watchdog import Watchdog

FEWEST_BATCHES = 4  # of a rank, about: else one of a small set may have twice the work of another


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """prompt: of every utterance. max_batch_duration: seconds of audio in a batch."""

    prompt: str
    max_batch_duration: float


class Decoded(NamedTuple):
    """Transcripts in the corpus's order; rtfx: seconds of audio decoded in a second of the rank that took longest."""

    transcripts: list[Transcript]
    rtfx: float


def decode_corpus(
    engine: Engine,
    corpus: Corpus,
    options: DecodingOptions,
    normalize: Callable[[str], str],
    cache: ShardCache,
    journal: Journal,
    watchdog: Watchdog | None = None,
) -> Decoded:
    """Every rank's share of the corpus decoded, but for what `journal` has; all of it on every rank."""
    watchdog = watchdog or Watchdog()
    engine = WithinMemory(engine)
    done = {said.row: said for said in journal.read()}
    lengths, longest = (
        np.maximum(corpus.index.rows["samples"] / RATE, engine.padded_to),
        options.max_batch_duration,
    )
    if (ranks := distributed.world_size()) > 1:
        longest = min(longest, float(lengths.sum()) / ranks / FEWEST_BATCHES)
    batches = make_batches(lengths, longest, skip=done)
    mine = batches[distributed.rank() :: distributed.world_size()]
    reader = Reader([corpus], limits=engine.limits, cache=cache)
    decoded: list[DecodedUtterance] = []
    with (
        ProgressBar(
            f"decoding {corpus.name}",
            sum(map(len, mine)),
            enabled=distributed.rank() == 0 and bool(mine),
        ) as bar,
        journal,
    ):
        began = time.monotonic()
        watchdog.beat(f"reading {corpus.name}")
        for rows, samples in read_ahead(reader, mine):
            watchdog.beat(f"decoding {corpus.name}", [sample.key for sample in samples])
            answers = engine.answer([s.wave for s in samples], [options.prompt] * len(samples))
            took = (time.monotonic() - began) / len(rows)
            said = [
                make_utterance(*each, took) for each in zip(rows, samples, answers, strict=True)
            ]
            journal.write(said)
            decoded += said
            bar.advance(len(rows))
            began = time.monotonic()
    watchdog.beat(f"waiting for what the other ranks decoded of {corpus.name}")
    everything = [
        *done.values(),
        *(said for rank in distributed.gather_objects(decoded) for said in rank),
    ]
    transcripts = [
        make_transcript(said, normalize) for said in sorted(everything, key=lambda said: said.row)
    ]
    seconds: Counter[int] = Counter()
    for said in everything:
        seconds[said.rank] += said.took
    return Decoded(transcripts, sum(t.duration for t in transcripts) / max(*seconds.values(), 1e-9))


def make_batches(
    seconds: np.ndarray, max_duration: float, skip: Container[int] = ()
) -> list[list[int]]:
    """Rows of the index, longest first, in batches of at most `max_duration` seconds, padding included. seconds: (rows,) of each."""
    batches: list[list[int]] = []
    longest = 0.0
    for i in (-seconds).argsort(kind="stable"):
        if int(i) in skip:
            continue
        if not batches or longest * (len(batches[-1]) + 1) > max_duration:
            batches.append([])
            longest = float(seconds[i])
        batches[-1].append(int(i))
    return batches


def read_ahead(
    reader: Reader, batches: Sequence[list[int]]
) -> Iterator[tuple[list[int], list[Sample]]]:
    """The next batch is read while one is decoded."""
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(read_batch, reader, rows) for rows in batches[:1]]
        for i, rows in enumerate(batches):
            samples = ahead.pop().result()
            if i + 1 < len(batches):
                ahead.append(pool.submit(read_batch, reader, batches[i + 1]))
            yield rows, samples


def read_batch(reader: Reader, rows: Sequence[int]) -> list[Sample]:
    try:
        return [reader.read(Item(corpus=0, row=row)) for row in rows]
    except SampleError as error:
        raise UserError(
            f"an utterance of the test set cannot be decoded: {error}; leave it out of the set"
        ) from error


def make_utterance(row: int, sample: Sample, answer: Answer, took: float) -> DecodedUtterance:
    speaker, recording, source = (
        str(sample.fields.get(name) or "") for name in ("speaker", "recording", "corpus")
    )
    return DecodedUtterance(
        row=row,
        key=sample.key,
        reference=sample.text,
        hypothesis=answer.text,
        end=answer.end,
        duration=len(sample.wave) / RATE,
        speaker=speaker,
        recording=recording,
        corpus=source,
        took=took,
        rank=distributed.rank(),
    )


def make_transcript(said: DecodedUtterance, normalize: Callable[[str], str]) -> Transcript:
    return Transcript(
        key=said.key,
        reference=normalize(said.reference),
        hypothesis=normalize(said.hypothesis),
        raw_reference=said.reference,
        raw_hypothesis=said.hypothesis,
        duration=said.duration,
        speaker=said.speaker,
        recording=said.recording,
        corpus=said.corpus,
        end=said.end,
        row=said.row,
    )
