"""NeMo manifests."""

from collections.abc import Iterator
from pathlib import Path

from asrllm.data.sources.files import audio_rows, key_of, sample_fields, take, take_number
from asrllm.data.sources.utterance import Stretch, Utterance

WHAT = "the NeMo manifest"


def read_nemo(path: str | Path) -> Iterator[Utterance]:
    """One JSON object a line: audio_filepath, duration, text, optionally offset, lang, speaker, prompt, task, hotwords.

    Relative paths start at the manifest, or at the current directory where the first files lie there. Keys are made of the paths, and of
    the offsets in milliseconds.
    """
    for where, row, file in audio_rows(Path(path), WHAT, "audio_filepath"):
        duration, offset = take_number(row, where, "duration"), take_number(row, where, "offset")
        end = None if offset is None or duration is None else offset + duration
        yield Utterance(
            key=key_of(take(row, where, "audio_filepath"), offset),
            text=take(row, where, "text"),
            load=Stretch(file, offset or 0.0, end),
            duration=duration,
            fields=sample_fields(row),
            file=file if offset is None else None,
        )
