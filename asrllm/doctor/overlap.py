"""Validation utterances that training has seen."""

import hashlib
from collections.abc import Iterator

import numpy as np

from asrllm.audio.reader import Reader
from asrllm.data.corpora import Corpus
from asrllm.data.plan import Item
from asrllm.data.tars import TarSample
from asrllm.doctor.findings import Finding, ok, warning
from asrllm.training.data import TrainingData

MAX_VALID = 1000  # utterances of each validation set that are compared
MAX_TRAIN = 20_000  # training utterances that are read, for a few seconds on a local disk
HIGH_TEXT_RATIO = 0.5  # small vocabularies, for example digits, reach it without a mistake


def check_overlap(data: TrainingData) -> list[Finding]:
    """Compare each validation set with the training data, by audio and by text."""
    return [finding for corpus in data.valid for finding in compare(data, corpus)]


def compare(data: TrainingData, valid: Corpus) -> list[Finding]:
    """Compare one validation set with the training data.

    Equal recordings have equal lengths, and equal texts too, which the index knows. So only
    training utterances with the lengths of a validation utterance are read.
    """
    rows = np.flatnonzero(valid.passes(valid.index.rows[:]))[:MAX_VALID]
    samples = list(read(data.reader([valid]), 0, rows))
    audio = {audio_hash(sample.audio): sample.key for sample in samples}
    texts = [str(sample.fields["text"]).strip() for sample in samples]
    chosen = valid.index.rows[rows]
    reader = data.reader(data.corpora)
    same_audio: dict[str, str] = {}  # training key by validation key
    same_text: set[str] = set()
    remaining = MAX_TRAIN
    for number, corpus in enumerate(data.corpora):
        train = corpus.index.rows
        same_length = np.isin(train["samples"], chosen["samples"])
        same_text_length = np.isin(train["text_bytes"], chosen["text_bytes"]) & ~same_length
        # those that may have the same audio first, because the number is limited
        candidates = np.concatenate([same_length.nonzero()[0], same_text_length.nonzero()[0]])
        candidates = candidates[:remaining]
        remaining -= len(candidates)
        for sample in read(reader, number, candidates):
            key = audio.get(audio_hash(sample.audio))
            if key is not None:
                same_audio[key] = sample.key
            same_text.add(str(sample.fields["text"]).strip())
    return [
        audio_finding(valid, same_audio, len(samples)),
        text_finding(valid, sum(text in same_text for text in texts), len(samples)),
    ]


def read(reader: Reader, corpus: int, rows: np.ndarray) -> Iterator[TarSample]:
    """Yield the samples of some rows of a corpus, except those that cannot be read."""
    for row in rows.tolist():
        try:
            yield reader.tar_sample(Item(corpus=corpus, row=row))
        except ValueError:  # `check_readable` and 'asrllm shards verify' report it
            continue


def audio_hash(audio: bytes) -> bytes:
    """Return a hash of the bytes of an audio file."""
    return hashlib.sha256(audio).digest()


def audio_finding(valid: Corpus, same: dict[str, str], total: int) -> Finding:
    """Report validation utterances whose audio is in the training data."""
    text = f"{valid.name}: the audio of {len(same)} of {total} utterances is in the training data"
    if not same:
        return ok("overlap of audio", text)
    key, train_key = next(iter(same.items()))
    text = f"{text} (first: {key!r}, there {train_key!r})"
    fix = "Remove them from one of the two, or the error rate in validation is too low."
    return warning("overlap of audio", text, fix)


def text_finding(valid: Corpus, same: int, total: int) -> Finding:
    """Report how many validation texts are also texts of the training data."""
    text = f"{valid.name}: the text of {same} of {total} utterances is in the training data"
    if same > HIGH_TEXT_RATIO * total:
        fix = "If the texts are not of a small vocabulary, choose other validation data."
        return warning("overlap of text", text, fix)
    return ok("overlap of text", text)
