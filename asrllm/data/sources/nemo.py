"""NeMo manifests."""

from collections.abc import Iterator
from pathlib import Path

from asrllm.data.sources.files import (
    Row,
    audio_field,
    key_from_path,
    sample_fields,
    seconds_field,
    text_or_int_field,
)
from asrllm.data.sources.json_rows import read_json_manifest
from asrllm.data.sources.utterance import AudioSegment, Utterance

ROLE = "the NeMo manifest"


def read_nemo(path: str | Path) -> Iterator[Utterance]:
    """Yield the utterances of a NeMo manifest.

    Each line is a JSON object with audio_filepath, duration, text, and optionally offset, lang,
    speaker, prompt, task and hotwords. Relative paths start at the manifest's directory, or at the
    current directory if the first files are there. Keys consist of the path and of the offset in
    milliseconds.
    """
    yield from read_json_manifest(Path(path), ROLE, names=_names, make=_utterance)


def _names(row: Row, where: str) -> list[str]:
    return [audio_field(row, where, "audio_filepath")]


def _utterance(row: Row, where: str, root: Path) -> Utterance:
    name = audio_field(row, where, "audio_filepath")
    duration = seconds_field(row, where, "duration")
    offset = seconds_field(row, where, "offset")
    end = None if offset is None or duration is None else offset + duration
    return Utterance(
        key=key_from_path(name, offset),
        text=text_or_int_field(row, where, "text"),
        load=AudioSegment(root / name, offset or 0.0, end),
        duration=duration,
        fields=sample_fields(row),
        file=root / name if offset is None else None,
    )
