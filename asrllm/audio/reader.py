"""Reading one utterance: a stretch of a tar -> waveform at 16 kHz and its fields; any audio file likewise."""

import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from asrllm.data.corpora import Corpus
from asrllm.data.index import RATE, iterate_tar
from asrllm.data.plan import Item
from asrllm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sample:
    """wave: (samples,) float32 at RATE; weight: 0 for a filler, else 1."""

    key: str
    wave: np.ndarray
    text: str
    corpus: Corpus
    weight: int = 1


class SampleError(Exception):
    """An utterance that cannot be read: its key, where it lies and why."""


class Reader:
    """Reads the utterances that a plan names. Files stay open; one reader belongs to one process."""

    def __init__(self, corpora: Sequence[Corpus], *, limits: tuple[int, int] = (1, 1 << 40)) -> None:
        """limits: the fewest and the most samples at RATE that the model takes."""
        self.corpora, self.limits = corpora, limits
        self._files: dict[Path, int] = {}

    def read(self, item: Item) -> Sample:
        corpus = self.corpora[item.corpus]
        row = corpus.index.rows[item.row]
        shard = corpus.index.shards[row["shard"]]
        if shard not in self._files:
            self._files[shard] = os.open(shard, os.O_RDONLY)
        try:
            data = os.pread(self._files[shard], int(row["size"]), int(row["offset"]))
            (sample,) = iterate_tar(BytesIO(data), str(shard))
            wave = decode(BytesIO(sample.audio))
        except (OSError, ValueError, RuntimeError, tarfile.TarError, UserError) as error:  # ValueError: broken JSON, or not one sample
            raise SampleError(f"utterance {item.row} of {corpus.name} in {shard}: {error}") from error
        if abs(len(wave) - int(row["samples"])) > 0.1 * RATE:
            raise SampleError(f"{sample.key} in {shard}: the index says {row['samples']} samples, the audio has {len(wave)}")
        if not self.limits[0] <= len(wave) <= self.limits[1]:
            low, high = (n / RATE for n in self.limits)
            raise SampleError(f"{sample.key} in {shard}: {len(wave) / RATE:.2f} s of audio, the model takes {low:.2f} to {high:.2f} s")
        text = sample.fields["text"]
        return Sample(key=sample.key, wave=wave, text=text, corpus=corpus, weight=0 if item.filler else 1)


def decode(file: BinaryIO | str | Path) -> np.ndarray:
    """(samples,) float32 mono at RATE; channels are averaged. Raises what soundfile raises for unreadable audio."""
    wave, rate = soundfile.read(file, dtype="float32", always_2d=True)
    mono = wave[:, 0] if wave.shape[1] == 1 else wave.mean(1)
    return resample(mono, rate)


def resample(wave: np.ndarray, rate: int) -> np.ndarray:
    return wave if rate == RATE else soxr.resample(wave, rate, RATE)


def read_audio(path: str | Path) -> np.ndarray:
    """An audio file of any rate and format -> (samples,) float32 at RATE; a user's mistake is one sentence."""
    try:
        wave = decode(path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"the audio file {str(path)!r} cannot be read: {error}") from error
    if not len(wave):
        raise UserError(f"the audio file {str(path)!r} holds no sample")
    if not np.isfinite(wave).all():
        raise UserError(f"the audio file {str(path)!r} holds NaN or infinite values")
    return wave
