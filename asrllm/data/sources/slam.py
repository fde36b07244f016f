"""SLAM-LLM's manifests."""

from collections.abc import Iterator
from pathlib import Path

from asrllm.data.sources.files import audio_rows, sample_fields, take
from asrllm.data.sources.utterance import Stretch, Utterance

WHAT = "the SLAM-LLM manifest"


def read_slam(path: str | Path) -> Iterator[Utterance]:
    """One JSON object a line: key, source (an audio file), target (its text), optionally prompt, task, lang, speaker.

    Relative paths start at the manifest, or at the current directory where the first files lie there.
    """
    for where, row, file in audio_rows(Path(path), WHAT, "source"):
        key, text = take(row, where, "key"), take(row, where, "target")
        yield Utterance(key=key, text=text, load=Stretch(file), fields=sample_fields(row), file=file)
