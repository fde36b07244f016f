"""NeMo manifests."""

from collections.abc import Iterator
from pathlib import Path

from asrllm.data.sources.files import ahead, find_root, key_of, read_json_lines, sample_fields, take, take_number
from asrllm.data.sources.utterance import Stretch, Utterance

WHAT = "the NeMo manifest"


def read_nemo(path: str | Path) -> Iterator[Utterance]:
    """One JSON object a line: audio_filepath, duration, text, optionally offset, lang, speaker, prompt, task, hotwords.

    Relative paths start at the manifest, or at the current directory where the first files lie there. Keys are made of the paths, and of
    the offsets in milliseconds.
    """
    path = Path(path)
    first, rows = ahead(read_json_lines(path, WHAT))
    root = find_root([take(row, f"{WHAT} {where}", "audio_filepath") for where, row in first], [path.parent, Path.cwd()])
    for place, row in rows:
        where = f"{WHAT} {place}"
        name, duration = take(row, where, "audio_filepath"), take_number(row, where, "duration")
        offset = take_number(row, where, "offset")
        end = None if offset is None or duration is None else offset + duration
        yield Utterance(
            key=key_of(name, offset),
            text=take(row, where, "text"),
            load=Stretch(root / name, offset or 0.0, end),
            duration=duration,
            fields=sample_fields(row),
            file=root / name if offset is None else None,
        )
