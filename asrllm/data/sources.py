"""Where utterances come from before they are shards: Lhotse cuts and Kaldi directories."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from asrllm.config import read_text
from asrllm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One utterance of a source. `load()` gives (waveform (samples,) float32 mono, sampling rate in Hz)."""

    key: str
    text: str
    load: Callable[[], tuple[np.ndarray, int]]
    duration: float | None = None  # in seconds, where the source says one
    fields: dict[str, Any] = field(default_factory=dict)  # speaker, lang, ...


def read_cuts(path: str | Path) -> Iterator[Utterance]:
    """Lhotse cuts (jsonl or jsonl.gz); a cut of several supervisions gives one utterance each."""
    from lhotse import CutSet

    path = Path(path)
    if not path.is_file():
        raise UserError(f"the cuts manifest {str(path)!r} does not exist: check the path")
    if path.stat().st_size == 0:
        raise UserError(f"the cuts manifest {str(path)!r} is empty: make it again")
    for cut in _iterate_cuts(CutSet, path):
        parts = cut.trim_to_supervisions(keep_overlapping=False) if len(cut.supervisions) > 1 else [cut]
        for part in parts:
            supervision = part.supervisions[0] if part.supervisions else None
            fields = {"speaker": supervision.speaker, "lang": supervision.language} if supervision else {}
            yield Utterance(
                key=supervision.id if supervision and len(cut.supervisions) > 1 else part.id,
                text=(supervision.text if supervision else "") or "",
                load=_CutAudio(part),
                duration=part.duration,
                fields={k: v for k, v in fields.items() if v},
            )


def _iterate_cuts(cut_set: Any, path: Path) -> Iterator[Any]:
    try:
        yield from cut_set.from_file(path) or ()  # None: a compressed file without a line
    except GeneratorExit:
        raise
    except Exception as error:  # Lhotse raises what its parsers happen to
        raise UserError(f"the cuts manifest {str(path)!r} cannot be read: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class _CutAudio:
    cut: Any

    def __call__(self) -> tuple[np.ndarray, int]:
        return self.cut.load_audio().mean(0, dtype=np.float32), self.cut.sampling_rate


def read_kaldi(folder: str | Path) -> Iterator[Utterance]:
    """A Kaldi data directory: wav.scp (paths, relative ones to the directory), text, optionally segments and utt2spk."""
    folder = Path(folder)
    recordings, texts = _table(folder, "wav.scp"), _table(folder, "text")
    speakers = _table(folder, "utt2spk") if (folder / "utt2spk").is_file() else {}
    for recording, where in recordings.items():
        if where.endswith("|"):
            raise UserError(f"{folder / 'wav.scp'}: recording {recording!r} is a pipe, which would run a command: write a file path")
    segments: dict[str, tuple[str, float, float | None]] = {key: (key, 0.0, None) for key in recordings}
    if (folder / "segments").is_file():
        segments = {key: _segment(folder, key, value) for key, value in _table(folder, "segments").items()}
    for key, (recording, start, end) in segments.items():
        if recording not in recordings:
            raise UserError(f"{folder / 'segments'}: {key!r} names the recording {recording!r}, which wav.scp lacks: add it there")
        fields = {"speaker": speakers[key]} if key in speakers else {}
        load = _Stretch(folder / recordings[recording], start, end)
        duration = None if end is None else end - start
        yield Utterance(key=key, text=texts.get(key, ""), load=load, duration=duration, fields=fields)
    for key in sorted(texts.keys() - segments.keys()):
        yield Utterance(key=key, text=texts[key], load=_NoAudio(folder))


@dataclass(frozen=True)
class _Stretch:
    path: Path
    start: float
    end: float | None

    def __call__(self) -> tuple[np.ndarray, int]:
        with soundfile.SoundFile(self.path) as file:
            file.seek(round(self.start * file.samplerate))
            frames = -1 if self.end is None else round((self.end - self.start) * file.samplerate)
            wave = file.read(frames, dtype="float32", always_2d=True)
            return wave.mean(1), file.samplerate


@dataclass(frozen=True)
class _NoAudio:
    folder: Path

    def __call__(self) -> tuple[np.ndarray, int]:
        raise FileNotFoundError(f"the text has a key that {self.folder}/wav.scp (or segments) lacks")


def _table(folder: Path, name: str) -> dict[str, str]:
    path = folder / name
    if not path.is_file():
        raise UserError(f"{str(folder)!r} is no Kaldi data directory: the file {name} is missing")
    rows = [line.split(maxsplit=1) for line in read_text(path, "the Kaldi table").splitlines() if line.strip()]
    if not rows:
        raise UserError(f"{str(path)!r} is empty: write one line an utterance")
    table = {row[0]: row[1].strip() if len(row) > 1 else "" for row in rows}
    if len(table) < len(rows):
        raise UserError(f"{str(path)!r} names {len(rows) - len(table)} keys more than once: give each a line of its own")
    return table


def _segment(folder: Path, key: str, value: str) -> tuple[str, float, float | None]:
    try:
        recording, start, end = value.split()
        return recording, float(start), float(end)
    except ValueError as error:
        raise UserError(f"{folder / 'segments'}: the line of {key!r} is not 'utterance recording start end'") from error
