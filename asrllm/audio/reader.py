"""Read one utterance from a tar as a waveform at 16 kHz with its fields, or any audio file."""

import contextlib
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from asrllm.audio.augment import NO_MASKS, Augmenter
from asrllm.data.audio_files import LOUDEST, PADDED, open_audio, read_blocks
from asrllm.data.cache import ShardCache
from asrllm.data.corpora import Corpus
from asrllm.data.index import MAX_DURATION_ERROR, Index
from asrllm.data.plan import Item
from asrllm.data.prompts import Prompt
from asrllm.data.storage import is_url
from asrllm.data.tars import BLOCK, TarSample, read_sample
from asrllm.data.waveforms import resample, to_mono
from asrllm.defaults import RATE
from asrllm.errors import UserError

FETCH_ATTEMPTS = 3  # because the cache may evict a shard before it is open
MAX_OPEN = 128  # files; a process may have 1024


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An utterance that has been read.

    Attributes:
        key: its name in the shard.
        wave: (samples,) float32 at RATE.
        text: the normalized transcript.
        lang: its language, or that of its corpus.
        fields: its JSON (lang, task, prompt, hotwords, ...).
        prompts: the prompts of its corpus.
        corpus: the number of its corpus in the reader.
        pass_index: how many passes over its corpus precede this one.
        is_filler: whether it only prevents an empty batch, and has no loss.
        masks: (masks, 2) float32 from Augmenter.masks, or (0, 2).
    """

    key: str
    wave: np.ndarray
    text: str
    lang: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[Prompt, ...] = ()
    corpus: int = 0
    pass_index: int = 0
    is_filler: bool = False
    masks: np.ndarray = field(default_factory=lambda: NO_MASKS)


class SampleError(Exception):
    """An utterance cannot be read. The message gives its key, its shard and the reason."""


class Reader:
    """Reads the utterances of a plan.

    Files stay open. A reader belongs to one process and to those that are forked from it.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        *,
        limits: tuple[int, int] = (1, 1 << 40),
        cache: ShardCache | None = None,
        augment: Augmenter | None = None,
        normalize: Callable[[str], str] = str,
    ) -> None:
        """
        Args:
            corpora: the corpora of the plan, in its order.
            limits: minimum and maximum number of samples at RATE that the model accepts.
            cache: cache of remote shards; only needed if there are any.
            augment: changes the waveforms; None leaves them unchanged.
            normalize: maps a transcript to the text that is trained on.
        """
        self.corpora = corpora
        self.limits = limits
        self.cache = cache
        self.augment = augment
        self.normalize = normalize
        self._files: dict[tuple[int, int], io.FileIO] = {}

    def read(self, item: Item) -> Sample:
        """Read an utterance.

        Raises:
            SampleError: this utterance cannot be read.
            UserError: its shard or the source of an augmentation cannot be read.
        """
        corpus = self.corpora[item.corpus]
        row = corpus.index.rows[item.row]
        shard = corpus.index.shards[row["shard"]]
        try:
            found = self.tar_sample(item)
        except (OSError, ValueError, tarfile.TarError) as error:
            raise SampleError(
                f"utterance {item.row} of {corpus.name} in {shard}: {error}"
            ) from error
        try:
            wave = decode_sample(found, int(row["samples"]))
        except UserError as error:
            raise SampleError(f"{found.key} in {shard}: {error}") from error
        text = self.normalize(found.fields["text"])
        problem = self._problem(wave, int(row["samples"]), text, found)
        if problem:
            raise SampleError(f"{found.key} in {shard}: {problem}")
        masks = NO_MASKS
        if self.augment is not None:
            wave = self.augment(wave, key=found.key, pass_index=item.pass_index)
            masks = self.augment.masks(found.key, item.pass_index)
        lang = found.fields.get("lang")
        if not isinstance(lang, str) or not lang:
            lang = corpus.lang
        return Sample(
            key=found.key,
            wave=wave,
            text=text,
            lang=lang,
            fields=found.fields,
            prompts=corpus.prompts,
            corpus=item.corpus,
            pass_index=item.pass_index,
            is_filler=item.is_filler,
            masks=masks,
        )

    def _problem(self, wave: np.ndarray, expected: int, text: str, found: TarSample) -> str | None:
        """Return what is wrong with a decoded utterance, or None if nothing is."""
        if abs(len(wave) - expected) > MAX_DURATION_ERROR * RATE:
            return f"the audio has {len(wave)} samples, but {expected} in the index"
        fewest, most = self.limits
        if not fewest <= len(wave) <= most:
            limits = f"{fewest / RATE:.2f} to {most / RATE:.2f} s"
            return f"the audio is {len(wave) / RATE:.2f} s long, but the model accepts {limits}"
        if found.fields["text"] and not text:
            return f"its transcript {found.fields['text']!r} is empty after normalization"
        return None

    def tar_sample(self, item: Item) -> TarSample:
        """Return the files of an utterance without decoding them.

        Raises:
            OSError, ValueError, tarfile.TarError: the utterance cannot be read, or its bytes do not
                match the index.
        """
        row = self.corpora[item.corpus].index.rows[item.row]
        file = self._file(item.corpus, int(row["shard"]))
        offset = int(row["offset"]) * BLOCK
        size = int(row["size"]) * BLOCK
        data = os.pread(file.fileno(), size, offset)
        if zlib.crc32(data) != row["crc32"]:
            raise ValueError("its bytes do not match the index, so the shard is corrupted")
        return read_sample(data)

    def _file(self, corpus: int, shard: int) -> io.FileIO:
        """Return an open file. If too many are open, the one that was opened first is closed."""
        if (corpus, shard) not in self._files:
            if len(self._files) >= MAX_OPEN:
                self._files.pop(next(iter(self._files))).close()
            self._files[corpus, shard] = self._open(self.corpora[corpus].index, shard)
        return self._files[corpus, shard]

    def _open(self, index: Index, shard: int) -> io.FileIO:
        if not is_url(index.shards[shard]):
            return io.FileIO(index.shards[shard])
        assert self.cache is not None
        for _ in range(FETCH_ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):  # evicted before it was opened
                return io.FileIO(self.cache.fetch(index.file(shard)))
        raise UserError(
            f"the cache evicted {index.shards[shard]!r} {FETCH_ATTEMPTS} times right after the "
            "download. Raise data.cache.max_gb."
        )


def decode_sample(sample: TarSample, expected: int) -> np.ndarray:
    """Decode the audio of a sample as (samples,) float32 at RATE; channels are averaged.

    The audio was checked when it was indexed, and its bytes have not changed. If soundfile finds
    the length of the index in it, it is decoded at once, and else as every other audio file.

    Args:
        sample: the sample.
        expected: its number of samples at RATE in the index.

    Raises:
        UserError: the audio cannot be read, or has values that are not audio.
    """
    with (
        contextlib.suppress(OSError, RuntimeError),
        soundfile.SoundFile(BytesIO(sample.audio)) as sound,
    ):
        rate = sound.samplerate
        difference = abs(sound.frames * RATE - expected * rate)
        has_length = difference <= MAX_DURATION_ERROR * RATE * rate
        if has_length and not sound.subtype.startswith(PADDED):
            wave = to_mono(sound.read(dtype="float32", always_2d=True))
            if np.abs(wave).max(initial=0) <= LOUDEST:
                return resample(wave, rate)
    file = open_audio(f"{sample.key}.{sample.extension}", sample.audio)
    return np.concatenate(list(read_blocks(file)))


def read_audio(path: str | Path) -> np.ndarray:
    """Read an audio file of any rate and format as (samples,) float32 at RATE.

    Raises:
        UserError: the file cannot be read.
    """
    return np.concatenate(list(read_blocks(open_audio(str(path)))))
