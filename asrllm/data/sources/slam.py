"""SLAM-LLM's manifests."""

from collections.abc import Iterator
from pathlib import Path

from asrllm.data.sources.files import Row, sample_fields, take, take_words, utterances
from asrllm.data.sources.utterance import Stretch, Utterance

WHAT = "the SLAM-LLM manifest"


def read_slam(path: str | Path) -> Iterator[Utterance]:
    """One JSON object a line: key, source (an audio file), target (its text), optionally prompt, task, lang, speaker.

    Relative paths start at the manifest, or at the current directory where the first files lie there.
    """
    yield from utterances(Path(path), WHAT, names=_names, make=_utterance)


def _names(row: Row, where: str) -> list[str]:
    return [take(row, where, "source")]


def _utterance(row: Row, where: str, root: Path) -> Utterance:
    file = root / take(row, where, "source")
    key, text = take_words(row, where, "key"), take_words(row, where, "target")
    return Utterance(key=key, text=text, load=Stretch(file), fields=sample_fields(row), file=file)
