"""Decode a test set on all ranks, in batches of similar length, and resume after a kill."""

import sys
import time
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from asrllm import distributed
from asrllm.audio.reader import Reader, Sample, SampleError
from asrllm.data.cache import ShardCache
from asrllm.data.corpora import Corpus
from asrllm.data.plan import Item
from asrllm.defaults import RATE
from asrllm.escape import escape
from asrllm.evaluation.engine import Engine, HalvingEngine
from asrllm.evaluation.journal import DecodedUtterance, Journal
from asrllm.evaluation.references import check_unreadable
from asrllm.evaluation.score import Transcript
from asrllm.models.asr_llm.generation import Answer, make_batches
from asrllm.models.asr_llm.parallel_batches import map_batches
from asrllm.progress import ProgressBar
from asrllm.watchdog import Watchdog

# about this many batches per rank and thread; with fewer, one may have twice the work of another
FEWEST_BATCHES = 4
# factors of the batches' size, tried until there are equally many for each rank and thread
LARGER = np.linspace(1, 1.25, 11)
# Prompt and answer of an utterance take about as long as these seconds of audio. Without them the
# last batches, of many short utterances, would be the longest.
TEXT_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """How to decode a test set.

    Attributes:
        prompt: prompt of every utterance.
        max_batch_duration: seconds of audio in a batch, padding included.
        max_bad_share: largest ratio of utterances that cannot be read.
    """

    prompt: str
    max_batch_duration: float
    max_bad_share: float


class Batch(NamedTuple):
    """Utterances that are decoded together.

    Attributes:
        rows: rows in the index of the utterances that could be read.
        samples: what was read from them.
        problems: why the others could not be read.
    """

    rows: list[int]
    samples: list[Sample]
    problems: list[str]


class Decoded(NamedTuple):
    """A decoded test set.

    Attributes:
        transcripts: transcripts in the order of the corpus.
        rtfx: seconds of audio per second of decoding, of the slowest rank.
        unreadable: number of utterances that could not be read, and have no transcript.
    """

    transcripts: list[Transcript]
    rtfx: float
    unreadable: int


def decode_corpus(
    engine: Engine,
    corpus: Corpus,
    options: CorpusOptions,
    normalize: Callable[[str], str],
    cache: ShardCache,
    journal: Journal,
    watchdog: Watchdog | None = None,
) -> Decoded:
    """Decode the utterances of a test set that the journal does not have yet.

    Args:
        engine: decodes the batches.
        corpus: the test set.
        options: prompt and batch size.
        normalize: the normalizer.
        cache: cache of remote shards.
        journal: where decoded utterances are recorded.
        watchdog: reports hangs; None reports none.

    Returns:
        The whole test set, on every rank.

    Raises:
        UserError: more utterances than options.max_bad_share cannot be read.
    """
    watchdog = watchdog or Watchdog()
    engine = HalvingEngine(engine)
    done = {utterance.row: utterance for utterance in journal.read()}
    batches = batches_of_rank(engine, corpus, options, skip=done)
    reader = Reader([corpus], limits=engine.limits, cache=cache)
    decoded: list[DecodedUtterance] = []
    problems: list[str] = []
    total = sum(map(len, batches))
    shows_progress = distributed.rank() == 0 and bool(batches)
    bar = ProgressBar(f"decoding {corpus.name}", total, enabled=shows_progress)
    with bar, journal:
        start = time.monotonic()
        watchdog.beat(f"reading {corpus.name}")

        def decode(batch: Batch) -> tuple[Batch, list[Answer]]:
            if not batch.samples:
                return batch, []
            watchdog.beat(f"decoding {corpus.name}", [sample.key for sample in batch.samples])
            waves = [sample.wave for sample in batch.samples]
            return batch, engine.answer(waves, [options.prompt] * len(waves))

        read = read_ahead(reader, batches)
        for batch, answers in map_batches(decode, read, engine.parallel):
            took = (time.monotonic() - start) / max(len(answers), 1)
            new = []
            for row, sample, answer in zip(batch.rows, batch.samples, answers, strict=True):
                new.append(make_utterance(row, sample, answer, took))
            journal.write(new)
            decoded += new
            for problem in batch.problems:
                print(escape(f"unreadable: {problem}"), file=sys.stderr, flush=True)
            problems += batch.problems
            check_unreadable(corpus, problems, options.max_bad_share)
            bar.advance(len(new) + len(batch.problems))
            start = time.monotonic()
    watchdog.beat(f"waiting for the other ranks to decode {corpus.name}")
    utterances = list(done.values())
    unreadable: list[str] = []
    for of_rank, problems_of_rank in distributed.gather_objects((decoded, problems)):
        utterances += of_rank
        unreadable += problems_of_rank
    check_unreadable(corpus, unreadable, options.max_bad_share)
    utterances.sort(key=lambda utterance: utterance.row)
    transcripts = [make_transcript(utterance, normalize) for utterance in utterances]
    return Decoded(transcripts, rtfx(utterances), len(unreadable))


def batches_of_rank(
    engine: Engine, corpus: Corpus, options: CorpusOptions, skip: Container[int]
) -> list[list[int]]:
    """Return the rows of each batch that this rank decodes."""
    seconds = np.maximum(corpus.index.rows["samples"] / RATE, engine.padded_to)
    max_duration = options.max_batch_duration
    ranks = distributed.world_size()
    decoders = ranks * engine.parallel
    work = seconds + TEXT_SECONDS
    even = float(work.sum()) / decoders / FEWEST_BATCHES
    if decoders > 1 and even < max_duration:
        for factor in LARGER:
            batches = make_batches(work, min(even * factor, max_duration), skip=skip)
            if len(batches) % decoders == 0:
                break
    else:
        batches = make_batches(seconds, max_duration, skip=skip)
    return batches[distributed.rank() :: ranks]


def rtfx(utterances: Sequence[DecodedUtterance]) -> float:
    """Return the seconds of audio per second of decoding, of the slowest rank."""
    audio = sum(utterance.duration for utterance in utterances)
    seconds: dict[int, float] = {}
    for utterance in utterances:
        seconds[utterance.rank] = seconds.get(utterance.rank, 0) + utterance.took
    return audio / max(*seconds.values(), 1e-9)


def read_ahead(reader: Reader, batches: Sequence[list[int]]) -> Iterator[Batch]:
    """Yield the batches, and read the next batch in a thread meanwhile.

    Args:
        reader: reads the utterances.
        batches: rows of each batch.
    """
    with ThreadPoolExecutor(1) as pool:
        pending = [pool.submit(read_batch, reader, rows) for rows in batches[:1]]
        for i in range(len(batches)):
            batch = pending.pop().result()
            if i + 1 < len(batches):
                pending.append(pool.submit(read_batch, reader, batches[i + 1]))
            yield batch


def read_batch(reader: Reader, rows: Sequence[int]) -> Batch:
    """Read utterances.

    Args:
        reader: reads them.
        rows: their rows in the index.
    """
    batch = Batch([], [], [])
    for row in rows:
        try:
            sample = reader.read(Item(corpus=0, row=row))
        except SampleError as error:
            batch.problems.append(str(error))
        else:
            batch.rows.append(row)
            batch.samples.append(sample)
    return batch


def make_utterance(row: int, sample: Sample, answer: Answer, took: float) -> DecodedUtterance:
    """Combine an utterance with its answer.

    Args:
        row: row in the corpus's index.
        sample: the utterance.
        answer: the decoded text.
        took: seconds of decoding.
    """
    return DecodedUtterance(
        row=row,
        key=sample.key,
        reference=sample.text,
        hypothesis=answer.text,
        end=answer.end,
        duration=len(sample.wave) / RATE,
        speaker=str(sample.fields.get("speaker") or ""),
        recording=str(sample.fields.get("recording") or ""),
        corpus=str(sample.fields.get("corpus") or ""),
        took=took,
        rank=distributed.rank(),
    )


def make_transcript(utterance: DecodedUtterance, normalize: Callable[[str], str]) -> Transcript:
    """Normalize the texts of a decoded utterance."""
    return Transcript(
        key=utterance.key,
        reference=normalize(utterance.reference),
        hypothesis=normalize(utterance.hypothesis),
        raw_reference=utterance.reference,
        raw_hypothesis=utterance.hypothesis,
        duration=utterance.duration,
        speaker=utterance.speaker,
        recording=utterance.recording,
        corpus=utterance.corpus,
        end=utterance.end,
        row=utterance.row,
    )
