"""Lhotse cuts."""

import base64
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from asrllm.data.audio_files import OVERSHOOT
from asrllm.data.sources.cut_fields import channel_list, check_cut, check_source, fill_channels
from asrllm.data.sources.detect import FIELDS_OF_FORMATS
from asrllm.data.sources.files import (
    UNREADABLE,
    Row,
    find_root,
    peek,
    raw_lines,
    sample_fields,
    text_or_int_field,
)
from asrllm.data.sources.json_rows import json_rows
from asrllm.data.sources.utterance import RejectedError, Utterance, check_installed
from asrllm.data.storage import check_scheme, is_url
from asrllm.errors import UserError

if TYPE_CHECKING:
    from lhotse import AudioSource, SupervisionSegment
    from lhotse.cut import Cut

ROLE = "the cuts manifest"
# custom fields of a supervision, or of its cut, that become fields of the sample
CUSTOM_FIELDS = ("prompt", "task", "hotwords")
TOLERANCE = 1e-3  # seconds by which a supervision may differ from its cut without being trimmed
SHOWN_LENGTH = 80  # characters of a command in a message


def read_cuts(
    path: str | Path, *, allow_pipes: bool = False, allow_urls: bool = False
) -> Iterator[Utterance]:
    """Yield the utterances of Lhotse cuts (jsonl or jsonl.gz), one per supervision.

    Relative paths start at the working directory, or at the manifest's directory if the first files
    are there. A supervision that does not cover its cut is trimmed out of it. A cut that cannot be
    used becomes an utterance with a `problem`.

    Args:
        path: the manifest.
        allow_pipes: run the shell commands of recordings whose source has `type: command`.
        allow_urls: download recordings whose source has `type: url`.

    Raises:
        UserError: the file is not a manifest of cuts.
    """
    first, rows = peek(json_rows(Path(path), ROLE))
    objects = [(where, row) for where, row in first if isinstance(row, dict)]
    if objects and all("type" not in row for _, row in objects):
        place, other = objects[0]
        fix = "Combine recordings and supervisions with 'lhotse cut simple'."
        for kind, fields in FIELDS_OF_FORMATS.items():
            if other.keys() >= set(fields):
                fix = f"Read it with --{kind}."
        raise UserError(f"{ROLE} {place} is not a cut. {fix}")
    folders = [Path.cwd(), Path(path).absolute().parent]
    root = find_root(_file_names(objects), folders)
    for where, row in rows:
        if isinstance(row, RejectedError):
            yield Utterance(key=where, text="", problem=row.args)
            continue
        try:
            check_cut(row, where)
            fill_channels(row)
            for source in _sources(row):
                check_source(source, where)
                _restrict(source, f"{ROLE} {where}", root, allow_pipes, allow_urls)
        except RejectedError as error:
            yield _rejected(row, where, error.args)
            continue
        yield from _utterances(row, where)


# --- audio sources ---


def _file_names(rows: list[tuple[str, Row]]) -> list[str]:
    """Return the audio files that rows name."""
    names = []
    for _, row in rows:
        names += [source["source"] for source in _sources(row) if _is_file(source)]
    return names


def _sources(value: object) -> Iterator[Row]:
    """Yield the audio sources at any depth of a cut's JSON: of tracks, impulse responses, ..."""
    if isinstance(value, dict):
        sources = value.get("sources")
        if isinstance(sources, list):
            yield from (source for source in sources if isinstance(source, dict))
        children = list(value.values())
    elif isinstance(value, list):
        children = value
    else:
        return
    for child in children:
        yield from _sources(child)


def _is_file(source: Row) -> bool:
    return source.get("type") == "file" and isinstance(source.get("source"), str)


def _without_bar(source: Row) -> object:
    """Return the type of an audio source, and remove the "|" at the end of a command in place.

    Lhotse gives the type "file" to URLs and Kaldi's pipes too.
    """
    kind = source.get("type")
    name = source.get("source")
    if kind != "file" or not isinstance(name, str):
        return kind
    if name.rstrip().endswith("|"):
        source["source"] = name.rstrip().removesuffix("|")
        return "command"
    return "url" if is_url(name) else kind


def _restrict(
    source: Row,
    where: str,
    root: Path,
    allow_pipes: bool,
    allow_urls: bool,
) -> None:
    """Resolve the path of an audio source in place, and check that its type is allowed.

    Commands and URLs become files of types that `cut_audio` reads. Lhotse itself would run a
    command without a time limit, and would treat a URL that begins with `pipe:` as a command.

    Raises:
        RejectedError: the source is a command or a URL that is not allowed, or is not audio in
            base64.
    """
    kind = _without_bar(source)
    content = source.get("source")
    shown = repr(str(content)[:SHOWN_LENGTH])
    if kind == "command" and not allow_pipes:
        raise RejectedError(
            "not_allowed",
            f"{where}: a recording's source is a shell command ({shown}). Use a file, or run "
            "'asrllm shards make --cuts' with --allow-pipes if you trust the manifest",
        )
    if kind == "url" and not allow_urls:
        raise RejectedError(
            "not_allowed",
            f"{where}: a recording's source is a URL ({shown}). Use a file, or run "
            "'asrllm shards make --cuts' with --allow-urls if you trust the manifest",
        )
    if kind == "file" and isinstance(content, str):
        source["source"] = str(root / content)
    if kind == "memory":
        try:
            source["source"] = base64.b64decode(str(content), validate=True)
        except ValueError as error:
            problem = f"{where}: a recording's source in memory is {shown}, not a file in base64"
            raise RejectedError("bad_field", problem) from error
    if kind in ("command", "url"):
        from asrllm.data.sources.cut_audio import Command, Url

        if kind == "url":
            _check_scheme(str(content), where)
        source["type"] = "file"
        source["source"] = Command(content) if kind == "command" else Url(content)


def _check_scheme(url: str, where: str) -> None:
    try:
        check_scheme(url)
    except UserError as error:
        raise RejectedError("not_allowed", f"{where}: {error}") from error


# --- utterances ---


def _utterances(row: Row, where: str) -> Iterator[Utterance]:
    from lhotse.serialization import deserialize_item

    key = str(row.get("id") or where)
    try:
        cut = deserialize_item(row)
        supervisions = cut.supervisions or [None]
    except Exception as error:  # Lhotse's parsers raise many types
        yield Utterance(key=key, text="", problem=_problem(error, where))
        return
    for supervision in supervisions:
        try:
            utterance = _cut_utterance(cut, supervision)
        except Exception as error:
            named = supervision.id if len(supervisions) > 1 else key
            utterance = Utterance(key=str(named), text="", problem=_problem(error, where))
        yield utterance


def _problem(error: Exception, where: str) -> tuple[str, str]:
    """Return the reason of an error in a cut, unless it is a missing package."""
    if isinstance(error, RejectedError):
        return error.args
    check_installed(error, f"{ROLE} {where}")
    detail = f"{where} is not a cut that Lhotse reads ({type(error).__name__}: {error})"
    return ("broken_cut", detail)


def _rejected(row: Row, where: str, problem: tuple[str, str]) -> Utterance:
    return Utterance(key=str(row.get("id") or where), text="", problem=problem)


def _cut_utterance(cut: "Cut", supervision: "SupervisionSegment | None") -> Utterance:
    problem = None
    part = cut
    text = ""
    if supervision:
        fields = {"text": supervision.text}
        text = text_or_int_field(fields, f"the supervision {supervision.id!r}", "text")
    if not cut.has_recording:
        problem = ("missing_audio", "the cut has no recording")
    elif supervision and not _covers(supervision, cut):
        try:
            part = _trim(cut, supervision)
        except RejectedError as error:
            problem = error.args
    source = _whole_source(part)
    file = _file(source)
    fields = _fields(cut, supervision)
    recording = getattr(part, "recording", None)  # a mixed cut has none
    if file is None and recording is not None:
        fields["recording"] = recording.id
    # a supervision has its own key only if the cut has several
    named = supervision if supervision and len(cut.supervisions) > 1 else cut
    return Utterance(
        key=str(named.id),
        text=text,
        load=_SourceAudio(source) if source else _CutAudio(part),
        duration=part.duration,
        fields=sample_fields(fields),
        file=file,
        problem=problem,
    )


def _fields(cut: "Cut", supervision: "SupervisionSegment | None") -> Row:
    """Return the speaker, the language and the custom fields of a supervision and its cut."""
    fields = {}
    customs = [getattr(cut, "custom", None)]
    if supervision:
        fields = {"speaker": supervision.speaker, "lang": supervision.language}
        customs.append(supervision.custom)
    for custom in customs:
        if custom:
            fields |= {name: custom[name] for name in CUSTOM_FIELDS if name in custom}
    return fields


def _covers(supervision: "SupervisionSegment", cut: "Cut") -> bool:
    """Return whether a supervision covers its cut, and all of the cut's channels."""
    starts = math.isclose(supervision.start, 0, abs_tol=TOLERANCE)
    ends = math.isclose(supervision.duration, cut.duration, abs_tol=TOLERANCE)
    return starts and ends and _channels(supervision) >= _channels(cut)


def _channels(part: "Cut | SupervisionSegment") -> set[int]:
    channel = getattr(part, "channel", None)  # a mixed cut has none
    if channel is None:
        return set()
    return set(channel_list(channel))


def _trim(cut: "Cut", supervision: "SupervisionSegment") -> "Cut":
    """Return the part of a cut that a supervision describes.

    Raises:
        RejectedError: the supervision extends beyond the cut.
    """
    from lhotse.cut import MultiCut

    start = supervision.start
    end = supervision.start + supervision.duration
    is_outside = start < -TOLERANCE or end > cut.duration + OVERSHOOT or start >= cut.duration
    if is_outside or end <= max(start, 0.0):
        span = f"{start:.3f} s to {end:.3f} s of a cut of {cut.duration:.3f} s"
        raise RejectedError("outside_cut", f"the supervision {supervision.id!r} spans {span}")
    start = max(start, 0.0)
    duration = min(end, cut.duration) - start
    part = cut.truncate(
        offset=start,
        duration=duration,
        keep_excessive_supervisions=False,
    )
    if isinstance(part, MultiCut):
        part = replace(part, channel=sorted(_channels(supervision) & _channels(cut)))
    return part


def _whole_source(cut: "Cut") -> "AudioSource | None":
    """Return the cut's audio source if the cut is all of it, with every channel and as it is."""
    recording = getattr(cut, "recording", None)
    if recording is None or recording.transforms or len(recording.sources) != 1:
        return None
    source = recording.sources[0]
    if channel_list(cut.channel) != recording.channel_ids:
        return None
    is_whole = cut.start == 0 and math.isclose(cut.duration, recording.duration, abs_tol=1e-3)
    return source if is_whole and source.type in ("file", "memory") else None


def _file(source: "AudioSource | None") -> Path | None:
    """Return the path of an audio source that is a file."""
    if source is None or source.type != "file":
        return None
    # exactly str: commands and URLs are subclasses
    return Path(source.source) if type(source.source) is str else None


@dataclass(frozen=True)
class _SourceAudio:
    """A `load` that reads a whole audio source. Its length need not be that of the manifest."""

    source: "AudioSource"

    def __call__(self) -> tuple[np.ndarray, int]:
        from asrllm.data.sources.cut_audio import load_source

        return load_source(self.source.source, len(self.source.channels))


@dataclass(frozen=True)
class _CutAudio:
    """A `load` that reads a cut. Lhotse reads only the cut's part of a long file."""

    cut: "Cut"

    def __call__(self) -> tuple[np.ndarray, int]:
        from asrllm.data.sources.cut_audio import load_cut

        return load_cut(self.cut)


def count_cuts(path: str | Path, **options: bool) -> int | None:
    """Return the approximate number of supervisions, for a progress bar.

    They are counted by a word that occurs once in each of them, and once in their cut.
    """
    try:
        return sum(max(1, line.count(b'"channel":') - 1) for line in raw_lines(Path(path)))
    except UNREADABLE:
        return None
