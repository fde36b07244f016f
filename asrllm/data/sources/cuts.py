"""Lhotse cuts."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from asrllm.data.sources.files import (
    UNREADABLE,
    ahead,
    find_root,
    raw_lines,
    read_json_lines,
    sample_fields,
)
from asrllm.data.sources.utterance import RejectedError, Utterance
from asrllm.data.storage import check_scheme
from asrllm.errors import UserError

WHAT = "the cuts manifest"
CUSTOM = (
    "prompt",
    "task",
    "hotwords",
)  # custom fields of a supervision, or of its cut, that samples keep
EXACT = 1e-3  # seconds by which a supervision may differ from its cut without being trimmed
OVERSHOOT = 0.5  # seconds beyond the end that are cut off, as by Kaldi's extract-segments
SHOWN = 80  # characters of a command in a message


def read_cuts(
    path: str | Path, *, allow_pipes: bool = False, allow_urls: bool = False
) -> Iterator[Utterance]:
    """Read Lhotse cuts (jsonl or jsonl.gz), one utterance for each supervision.

    Relative paths start at the working directory, or beside the manifest if the first files are
    there. A supervision that is not exactly its cut is trimmed out of it.

    Args:
        path: the manifest.
        allow_pipes: run the shell commands of recordings whose source has `type: command`.
        allow_urls: download recordings whose source has `type: url`.

    Raises:
        UserError: the file is not a manifest of cuts, or a recording is a command or a URL that
            was not allowed. A cut that cannot be used is an utterance with a `problem`.
    """
    rows = read_json_lines(Path(path), WHAT)
    where, row = next(rows)
    if "type" not in row:
        advice = "combine recordings and supervisions with 'lhotse cut simple'"
        raise UserError(f"{WHAT} {where} is not a cut: {advice}")
    first, rows = ahead(itertools.chain([(where, row)], rows))
    files = [s["source"] for _, row in first for s in _sources(row) if _is_file(s)]
    root = find_root(files, [Path.cwd(), Path(path).absolute().parent])
    for where, row in rows:
        for source in _sources(row):
            _restrict(source, f"{WHAT} {where}", root, allow_pipes, allow_urls)
        yield from _utterances(row, where)


# --- where the audio comes from ---


def _sources(value: Any) -> Iterator[dict[str, Any]]:
    """Yield the audio sources of a cut's JSON at any depth: of tracks, of impulse responses, ..."""
    if isinstance(value, dict):
        sources = value.get("sources")
        if isinstance(sources, list):
            yield from (source for source in sources if isinstance(source, dict))
    children = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    )
    for child in children:
        yield from _sources(child)


def _is_file(source: dict[str, Any]) -> bool:
    return source.get("type") == "file" and isinstance(source.get("source"), str)


def _restrict(
    source: dict[str, Any], where: str, root: Path, allow_pipes: bool, allow_urls: bool
) -> None:
    """Let an audio source name files and memory, and what the user allowed, in place.

    Commands and URLs become files of a type of their own, which `cut_audio` reads: Lhotse would
    run a command without a time limit, and a URL that begins with `pipe:` as a command.
    """
    kind, content = source.get("type"), source.get("source")
    if kind == "command" and not allow_pipes:
        raise UserError(
            f"{where}: a recording's source is a shell command ({str(content)[:SHOWN]!r}). Use a "
            "file, or run 'asrllm shards make --cuts' with --allow-pipes if you trust the manifest."
        )
    if kind == "url" and not allow_urls:
        raise UserError(
            f"{where}: a recording's source is a URL ({str(content)[:SHOWN]!r}). Use a file, or run "
            "'asrllm shards make --cuts' with --allow-urls if you trust the manifest."
        )
    if _is_file(source):
        source["source"] = str(root / str(content))
    if kind in ("command", "url"):
        from asrllm.data.sources.cut_audio import Command, Url

        if kind == "url":
            check_scheme(str(content))
        source["type"] = "file"
        source["source"] = Command(content) if kind == "command" else Url(content)


# --- utterances ---


def _utterances(row: dict[str, Any], where: str) -> Iterator[Utterance]:
    from lhotse.serialization import deserialize_item

    try:
        cut = deserialize_item(row)
        utterances = [_utterance(cut, supervision) for supervision in cut.supervisions or [None]]
    except Exception as error:  # whatever Lhotse's parsers happen to raise
        problem = ("broken_cut", f"{where}: {type(error).__name__}: {error}")
        utterances = [Utterance(key=str(row.get("id") or where), text="", problem=problem)]
    yield from utterances


def _utterance(cut: Any, supervision: Any) -> Utterance:
    about = {}
    if supervision:
        about = {"speaker": supervision.speaker, "lang": supervision.language}
    problem, part = None, cut
    if not cut.has_recording:
        problem = ("missing_audio", "the cut has no recording")
    elif supervision and not _is_whole(supervision, cut):
        try:
            part = _trimmed(cut, supervision)
        except RejectedError as error:
            problem = error.args
    file = _whole_file(part)
    recording = getattr(cut, "recording", None)  # a mixed cut has none of its own
    if file is None and recording is not None:
        about["recording"] = recording.id
    for custom in (getattr(cut, "custom", None), supervision and supervision.custom):
        about |= {name: custom[name] for name in CUSTOM if name in custom} if custom else {}
    several = len(cut.supervisions) > 1
    return Utterance(
        key=str(supervision.id if supervision and several else cut.id),
        text=(supervision.text if supervision else "") or "",
        load=_CutAudio(part),
        duration=part.duration,
        fields=sample_fields(about),
        file=file,
        problem=problem,
    )


def _is_whole(supervision: Any, cut: Any) -> bool:
    """Whether a supervision covers its cut, and all of the cut's channels."""
    starts = math.isclose(supervision.start, 0, abs_tol=EXACT)
    ends = math.isclose(supervision.duration, cut.duration, abs_tol=EXACT)
    return starts and ends and _channels(supervision) >= _channels(cut)


def _channels(part: Any) -> set[int]:
    channel = getattr(part, "channel", None)  # a mixed cut has none
    return set(channel if isinstance(channel, list) else [] if channel is None else [channel])


def _trimmed(cut: Any, supervision: Any) -> Any:
    """The part of a cut that a supervision describes.

    Raises:
        RejectedError: a part of what was said lies outside of the cut.
    """
    from lhotse.cut import MultiCut

    start, end = supervision.start, supervision.start + supervision.duration
    if start < -EXACT or end > cut.duration + OVERSHOOT or start >= cut.duration:
        span = f"{start:.3f} s to {end:.3f} s of a cut of {cut.duration:.3f} s"
        raise RejectedError("outside_cut", f"the supervision {supervision.id!r} spans {span}")
    start = max(start, 0.0)
    duration = min(end, cut.duration) - start
    part = cut.truncate(offset=start, duration=duration, keep_excessive_supervisions=False)
    if isinstance(part, MultiCut):
        part = replace(part, channel=sorted(_channels(supervision) & _channels(cut)))
    return part


def _whole_file(cut: Any) -> Path | None:
    """The cut's file, where the cut is all of it, with every channel and as it was recorded."""
    recording = getattr(cut, "recording", None)
    if recording is None or recording.transforms or len(recording.sources) != 1:
        return None
    source = recording.sources[0]
    if source.type != "file" or type(source.source) is not str:
        return None
    channels = cut.channel if isinstance(cut.channel, list) else [cut.channel]
    whole = cut.start == 0 and math.isclose(cut.duration, recording.duration, abs_tol=1e-3)
    return Path(source.source) if whole and channels == recording.channel_ids else None


@dataclass(frozen=True)
class _CutAudio:
    """Lhotse reads only the cut's part of a long file."""

    cut: Any

    def __call__(self) -> tuple[np.ndarray, int]:
        from asrllm.data.sources.cut_audio import load_cut

        return load_cut(self.cut)


def count_cuts(path: str | Path, **options: bool) -> int | None:
    """Supervisions, counted by the word that stands once in each of them and once in their cut: enough for a progress bar."""
    try:
        return sum(max(1, line.count(b'"channel":') - 1) for line in raw_lines(Path(path)))
    except UNREADABLE:
        return None
