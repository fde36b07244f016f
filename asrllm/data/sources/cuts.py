"""Lhotse cuts."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asrllm.data.sources.files import open_manifest, read_json_lines, sample_fields
from asrllm.data.sources.utterance import Utterance
from asrllm.errors import UserError

WHAT = "the cuts manifest"
CUSTOM = ("prompt", "task", "hotwords")  # custom fields of a supervision, or of its cut, that samples keep


def read_cuts(path: str | Path) -> Iterator[Utterance]:
    """Lhotse cuts (jsonl or jsonl.gz); a cut of several supervisions gives one utterance each."""
    from lhotse.serialization import deserialize_item

    for where, row in read_json_lines(Path(path), WHAT):
        if "type" not in row:
            raise UserError(f"{WHAT} {where} is not a cut: combine recordings and supervisions with 'lhotse cut simple'")
        try:
            cut = deserialize_item(row)
            parts = cut.trim_to_supervisions(keep_overlapping=False) if len(cut.supervisions) > 1 else [cut]
            utterances = [_utterance(part, several=len(cut.supervisions) > 1) for part in parts]
        except Exception as error:  # Lhotse raises what its parsers happen to
            raise UserError(f"{WHAT} {where} cannot be read: {type(error).__name__}: {error}") from error
        yield from utterances


def _utterance(cut: Any, several: bool) -> Utterance:
    supervision = cut.supervisions[0] if cut.supervisions else None
    about = {"speaker": supervision.speaker, "lang": supervision.language} if supervision else {}
    file, recording = _whole_file(cut), getattr(cut, "recording", None)  # a mixed cut has none of its own
    if file is None and recording is not None:
        about["recording"] = recording.id
    for custom in (getattr(cut, "custom", None), supervision and supervision.custom):
        about |= {name: custom[name] for name in CUSTOM if name in custom} if custom else {}
    return Utterance(
        key=supervision.id if supervision and several else cut.id,
        text=(supervision.text if supervision else "") or "",
        load=_CutAudio(cut),
        duration=cut.duration,
        fields=sample_fields(about),
        file=file,
        problem=None if cut.has_recording else ("missing_audio", "the cut has no recording"),
    )


def _whole_file(cut: Any) -> Path | None:
    """The cut's file, where the cut is all of it, with every channel and as it was recorded."""
    recording = getattr(cut, "recording", None)
    if recording is None or recording.transforms or len(recording.sources) != 1 or recording.sources[0].type != "file":
        return None
    channels = cut.channel if isinstance(cut.channel, list) else [cut.channel]
    whole = cut.start == 0 and math.isclose(cut.duration, recording.duration, abs_tol=1e-3)
    return Path(recording.sources[0].source) if whole and channels == recording.channel_ids else None


@dataclass(frozen=True)
class _CutAudio:
    """Lhotse reads only the cut's part of a long file."""

    cut: Any

    def __call__(self) -> tuple[np.ndarray, int]:
        return self.cut.load_audio().mean(0, dtype=np.float32), self.cut.sampling_rate


def count_cuts(path: str | Path) -> int | None:
    """Supervisions, counted by the word that stands once in each of them and once in their cut: enough for a progress bar."""
    try:
        with open_manifest(Path(path)) as file:
            return sum(max(1, line.count(b'"channel":') - 1) for line in file)
    except OSError:
        return None
