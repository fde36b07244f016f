"""SLAM-LLM's manifests."""

from collections.abc import Iterator
from pathlib import Path

from asrllm.data.sources.files import ahead, find_root, read_json_lines, sample_fields, take
from asrllm.data.sources.utterance import Stretch, Utterance

WHAT = "the SLAM-LLM manifest"


def read_slam(path: str | Path) -> Iterator[Utterance]:
    """One JSON object a line: key, source (an audio file), target (its text), optionally prompt, task, lang, speaker.

    Relative paths start at the manifest, or at the current directory where the first files lie there.
    """
    path = Path(path)
    first, rows = ahead(read_json_lines(path, WHAT))
    root = find_root([take(row, f"{WHAT} {where}", "source") for where, row in first], [path.parent, Path.cwd()])
    for place, row in rows:
        where = f"{WHAT} {place}"
        file = root / take(row, where, "source")
        key, text = take(row, where, "key"), take(row, where, "target")
        yield Utterance(key=key, text=text, load=Stretch(file), fields=sample_fields(row), file=file)
