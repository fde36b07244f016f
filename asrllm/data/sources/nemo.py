"""NeMo manifests."""

from collections.abc import Iterator
from pathlib import Path

from asrllm.data.sources.files import (
    Row,
    key_of,
    sample_fields,
    take,
    take_number,
    take_words,
    utterances,
)
from asrllm.data.sources.utterance import Stretch, Utterance

WHAT = "the NeMo manifest"


def read_nemo(path: str | Path) -> Iterator[Utterance]:
    """One JSON object a line: audio_filepath, duration, text, optionally offset, lang, speaker, prompt, task, hotwords.

    Relative paths start at the manifest, or at the current directory where the first files lie there. Keys are made of the paths, and of
    the offsets in milliseconds.
    """
    yield from utterances(Path(path), WHAT, names=_names, make=_utterance)


def _names(row: Row, where: str) -> list[str]:
    return [take(row, where, "audio_filepath")]


def _utterance(row: Row, where: str, root: Path) -> Utterance:
    name = take(row, where, "audio_filepath")
    duration, offset = take_number(row, where, "duration"), take_number(row, where, "offset")
    end = None if offset is None or duration is None else offset + duration
    return Utterance(
        key=key_of(name, offset),
        text=take_words(row, where, "text"),
        load=Stretch(root / name, offset or 0.0, end),
        duration=duration,
        fields=sample_fields(row),
        file=root / name if offset is None else None,
    )
