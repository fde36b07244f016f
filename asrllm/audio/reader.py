"""Reading one utterance: a stretch of a tar -> waveform at 16 kHz and its fields; any audio file likewise."""

import contextlib
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr

from asrllm.audio.augment import NO_MASKS, Augmenter
from asrllm.audio.stream import open_audio, read_blocks, said
from asrllm.data.cache import ShardCache
from asrllm.data.corpora import Corpus
from asrllm.data.index import BLOCK, MAX_DURATION_ERROR, RATE, Index, TarSample, read_sample
from asrllm.data.plan import Item
from asrllm.data.prompts import Prompt
from asrllm.data.storage import is_url
from asrllm.errors import UserError

EVICTED_AGAIN = 3  # tries
MAX_OPEN = 128  # files; a process may have 1024


@dataclass(frozen=True, kw_only=True)
class Sample:
    """wave: (samples,) float32 at RATE; fields: of its JSON (lang, task, prompt, hotwords, ...); prompts: of its corpus.

    corpus: its number among the reader's. round: how often it was dealt before. weight: 0 for a filler, else 1.
    masks: (masks, 2) float32 of Augmenter.masks, or (0, 2).
    """

    key: str
    wave: np.ndarray
    text: str
    lang: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[Prompt, ...] = ()
    corpus: int = 0
    pass_index: int = 0
    weight: int = 1
    masks: np.ndarray = field(default_factory=lambda: NO_MASKS)


class SampleError(Exception):
    """An utterance that cannot be read: its key, where it lies and why."""


class Reader:
    """Reads the utterances that a plan names. Files stay open; one reader belongs to one process and to what is forked from it."""

    def __init__(
        self,
        corpora: Sequence[Corpus],
        *,
        limits: tuple[int, int] = (1, 1 << 40),
        cache: ShardCache | None = None,
        augment: Augmenter | None = None,
        normalize: Callable[[str], str] = str,
    ) -> None:
        """limits: the fewest and the most samples at RATE that the model takes; cache: of remote shards; normalize: the transcript."""
        self.corpora, self.limits, self.cache, self.augment, self.normalize = (
            corpora,
            limits,
            cache,
            augment,
            normalize,
        )
        self._files: dict[tuple[int, int], io.FileIO] = {}

    def read(self, item: Item) -> Sample:
        """Raises SampleError for what is wrong with this utterance, UserError for what is wrong with more than it."""
        corpus = self.corpora[item.corpus]
        row = corpus.index.rows[item.row]
        where = corpus.index.shards[row["shard"]]
        try:
            found = self.tar_sample(item)
        except (OSError, ValueError, tarfile.TarError) as error:  # ValueError: not one sample
            raise SampleError(
                f"utterance {item.row} of {corpus.name} in {where}: {error}"
            ) from error
        try:
            wave = decode(BytesIO(found.audio))
        except (OSError, RuntimeError) as error:
            raise SampleError(f"{found.key} in {where}: {said(error)}") from error
        text = self.normalize(found.fields["text"])
        if problem := self._problem(wave, int(row["samples"]), text, found):
            raise SampleError(f"{found.key} in {where}: {problem}")
        masks, lang = NO_MASKS, found.fields.get("lang")
        if self.augment is not None:
            wave = self.augment(wave, key=found.key, pass_index=item.pass_index)
            masks = self.augment.masks(found.key, item.pass_index)
        return Sample(
            key=found.key,
            wave=wave,
            text=text,
            lang=lang if isinstance(lang, str) and lang else corpus.lang,
            fields=found.fields,
            prompts=corpus.prompts,
            corpus=item.corpus,
            pass_index=item.pass_index,
            weight=0 if item.filler else 1,
            masks=masks,
        )

    def _problem(self, wave: np.ndarray, expected: int, text: str, found: TarSample) -> str | None:
        if abs(len(wave) - expected) > MAX_DURATION_ERROR * RATE:
            return f"the index says {expected} samples, the audio has {len(wave)}"
        if not self.limits[0] <= len(wave) <= self.limits[1]:
            low, high = (n / RATE for n in self.limits)
            return f"{len(wave) / RATE:.2f} s of audio, the model takes {low:.2f} to {high:.2f} s"
        if found.fields["text"] and not text:
            return f"nothing is left of its transcript {found.fields['text']!r} after normalisation"
        return None

    def tar_sample(self, item: Item) -> TarSample:
        """Return the files of a sample, not decoded.

        Raises:
            OSError, ValueError, tarfile.TarError: the sample cannot be read, or its bytes are not
                those that were indexed.
        """
        row = self.corpora[item.corpus].index.rows[item.row]
        file = self._file(item.corpus, int(row["shard"]))
        stretch = os.pread(file.fileno(), int(row["size"]) * BLOCK, int(row["offset"]) * BLOCK)
        if zlib.crc32(stretch) != row["crc32"]:
            raise ValueError("its bytes do not match the index, so the shard is corrupted")
        return read_sample(stretch)

    def _file(self, corpus: int, shard: int) -> io.FileIO:
        """An open file; the one that was opened first is closed when there are too many."""
        if (corpus, shard) not in self._files:
            if len(self._files) >= MAX_OPEN:
                self._files.pop(next(iter(self._files))).close()
            self._files[corpus, shard] = self._open(self.corpora[corpus].index, shard)
        return self._files[corpus, shard]

    def _open(self, index: Index, shard: int) -> io.FileIO:
        if not is_url(index.shards[shard]):
            return io.FileIO(index.shards[shard])
        assert self.cache is not None
        for _ in range(EVICTED_AGAIN):
            with contextlib.suppress(FileNotFoundError):  # evicted between the two calls
                return io.FileIO(self.cache.fetch(index.file(shard)))
        raise UserError(
            f"{index.shards[shard]!r} was removed from the cache as soon as it was there: raise data.cache.max_gb"
        )


def decode(file: BinaryIO | str | Path) -> np.ndarray:
    """(samples,) float32 mono at RATE; channels are averaged. Raises what soundfile raises for unreadable audio."""
    wave, rate = soundfile.read(file, dtype="float32", always_2d=True)
    mono = wave[:, 0] if wave.shape[1] == 1 else wave.mean(1)
    return resample(mono, rate)


def resample(wave: np.ndarray, rate: int) -> np.ndarray:
    return wave if rate == RATE else soxr.resample(wave, rate, RATE)


def read_audio(path: str | Path) -> np.ndarray:
    """An audio file of any rate and format -> (samples,) float32 mono at RATE. Raises UserError as open_audio and read_blocks do."""
    return np.concatenate(list(read_blocks(open_audio(str(path)))))
