"""SLAM-LLM manifests."""

from collections.abc import Iterator
from pathlib import Path

from asrllm.data.sources.files import Row, audio_field, key_field, sample_fields, text_or_int_field
from asrllm.data.sources.json_rows import read_json_manifest
from asrllm.data.sources.utterance import AudioSegment, Utterance

ROLE = "the SLAM-LLM manifest"


def read_slam(path: str | Path) -> Iterator[Utterance]:
    """Yield the utterances of a SLAM-LLM manifest.

    Each line is a JSON object with key, source (an audio file), target (its text), and optionally
    prompt, task, lang and speaker. Relative paths start at the manifest's directory, or at the
    current directory if the first files are there.
    """
    yield from read_json_manifest(Path(path), ROLE, names=_names, make=_utterance)


def _names(row: Row, where: str) -> list[str]:
    return [audio_field(row, where, "source")]


def _utterance(row: Row, where: str, root: Path) -> Utterance:
    file = root / audio_field(row, where, "source")
    return Utterance(
        key=key_field(row, where, "key"),
        text=text_or_int_field(row, where, "target"),
        load=AudioSegment(file),
        fields=sample_fields(row),
        file=file,
    )
