"""Decoding a test set: batches of similar length, dealt out to the ranks, gathered by utterance."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from asrllm.audio.reader import Reader, SampleError
from asrllm.data.cache import ShardCache
from asrllm.data.corpora import Corpus
from asrllm.data.index import RATE
from asrllm.data.plan import Item
from asrllm.errors import UserError
from asrllm.evaluation.score import Transcript
from asrllm.models.model import AsrLlmModel
from asrllm.progress import ProgressBar
from asrllm.training import distributed


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """prompt: of every utterance. generation: options of AsrLlmModel.generate. max_batch_duration: seconds of audio in a batch."""

    prompt: str
    generation: dict[str, Any]
    max_batch_duration: float


def decode_corpus(
    model: AsrLlmModel,
    corpus: Corpus,
    options: DecodingOptions,
    normalize: Callable[[str], str],
    cache: ShardCache,
) -> tuple[list[Transcript], float]:
    """Every rank's share of the corpus decoded: (transcripts in the corpus's order, seconds of audio decoded in a second)."""
    batches = make_batches(corpus, options.max_batch_duration)
    mine = batches[distributed.rank() :: distributed.world_size()]
    reader, began = Reader([corpus], limits=model.config.sample_limits(), cache=cache), time.monotonic()
    decoded: list[tuple[int, Transcript]] = []
    with ProgressBar(f"decoding {corpus.name}", sum(map(len, mine)), enabled=distributed.rank() == 0) as bar:
        for batch in mine:
            decoded += zip(batch, decode_batch(model, reader, batch, options, normalize), strict=True)
            bar.advance(len(batch))
    everything = [pair for rank in distributed.gather_objects(decoded) for pair in rank]
    transcripts = [transcript for _, transcript in sorted(everything, key=lambda pair: pair[0])]
    _check_keys(corpus, transcripts)
    return transcripts, sum(t.duration for t in transcripts) / max(time.monotonic() - began, 1e-9)


def make_batches(corpus: Corpus, max_duration: float) -> list[list[int]]:
    """Rows of the index, longest first, in batches of at most `max_duration` seconds, padding included."""
    seconds = corpus.index.rows["samples"] / RATE
    batches: list[list[int]] = []
    longest = 0.0
    for i in (-seconds).argsort(kind="stable"):
        if not batches or longest * (len(batches[-1]) + 1) > max_duration:
            batches.append([])
            longest = float(seconds[i])
        batches[-1].append(int(i))
    return batches


def decode_batch(
    model: AsrLlmModel, reader: Reader, rows: Sequence[int], options: DecodingOptions, normalize: Callable[[str], str]
) -> list[Transcript]:
    try:
        samples = [reader.read(Item(corpus=0, row=row)) for row in rows]
    except SampleError as error:
        raise UserError(f"an utterance of the test set cannot be decoded: {error}; leave it out of the set") from error
    assert model.processor is not None
    messages = [model.processor.renderer.user_messages(options.prompt)] * len(samples)
    texts = model.generate([s.wave for s in samples], messages, **options.generation)
    return [
        Transcript(
            key=s.key,
            reference=normalize(s.text),
            hypothesis=normalize(text),
            raw_reference=s.text,
            raw_hypothesis=text,
            duration=len(s.wave) / RATE,
        )
        for s, text in zip(samples, texts, strict=True)
    ]


def _check_keys(corpus: Corpus, transcripts: Sequence[Transcript]) -> None:
    keys = {t.key for t in transcripts}
    if len(keys) != len(transcripts):
        raise UserError(f"the test set {corpus.name!r} has {len(transcripts) - len(keys)} repeated keys: index each utterance once")
    if not any(t.reference for t in transcripts):
        raise UserError(f"the references of the test set {corpus.name!r} are all empty after normalisation: choose normalizer=none")
