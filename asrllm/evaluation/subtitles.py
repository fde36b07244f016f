"""A file's transcript as text, JSON, SubRip and WebVTT."""

import html
import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

from asrllm.defaults import TRANSCRIPT_FORMATS
from asrllm.escape import escape
from asrllm.evaluation.score import UNSPACED
from asrllm.evaluation.transcription import FileTranscript, Spoken

LINE = 42  # columns; a Chinese character takes two
LINES = 2  # of a cue
OPENING = "「『（《〈【“‘(["
# where a line may begin: a character of a script without spaces, or a run of others, each with the signs that stand at it
PIECE = re.compile(
    rf"[{re.escape(OPENING)}]*(?:[{UNSPACED}]|[^\s{UNSPACED}{re.escape(OPENING)}]+)[^\w\s{re.escape(OPENING)}]*|\S+"
)
Cue = tuple[int, int, list[str]]  # begin and end in milliseconds, lines


def as_txt(transcript: FileTranscript, language: str | None) -> str:
    return escape(transcript.text, keep="\n") + "\n"


def as_json(transcript: FileTranscript, language: str | None, indent: int | None = 2) -> str:
    """end_reason stands where a text did not end by itself."""
    segments: list[dict[str, Any]] = []
    for spoken in transcript.segments:
        segments.append(
            {"start": round(spoken.start, 3), "end": round(spoken.end, 3), "text": spoken.text}
        )
        if spoken.end_reason != "stop":
            segments[-1]["end_reason"] = spoken.end_reason
    fields = {
        "audio": transcript.audio,
        "duration": round(transcript.duration, 3),
        "language": language,
        "text": transcript.text,
    }
    return json.dumps(fields | {"segments": segments}, ensure_ascii=False, indent=indent) + "\n"


def as_srt(transcript: FileTranscript, language: str | None) -> str:
    return "".join(numbered(transcript, ","))


def as_vtt(transcript: FileTranscript, language: str | None) -> str:
    return "WEBVTT\n\n" + "".join(numbered(transcript, ".", as_html=True))


def numbered(transcript: FileTranscript, point: str, *, as_html: bool = False) -> Iterator[str]:
    """The cues as both forms write them. point: before the milliseconds."""
    for number, (begin, end, lines) in enumerate(
        itertools.chain.from_iterable(map(cues_of, transcript.segments)), 1
    ):
        text = "\n".join(map(escape, lines))
        text = html.escape(text, quote=False) if as_html else text
        yield f"{number}\n{clock(begin, point)} --> {clock(end, point)}\n{text}\n\n"


Format = Callable[[FileTranscript, str | None], str]
FORMATS: dict[str, Format] = dict(
    zip(TRANSCRIPT_FORMATS, (as_txt, as_json, as_srt, as_vtt), strict=True)
)


def cues_of(spoken: Spoken) -> Iterator[Cue]:
    """Cues of at most LINES lines; the segment's time is shared out by the columns of their texts. None for an empty text."""
    lines = balanced(spoken.text)
    cues = [lines[i : i + LINES] for i in range(0, len(lines), LINES)]
    sums = [0, *itertools.accumulate(sum(map(columns, cue)) for cue in cues)]
    begin, length = spoken.start * 1000, (spoken.end - spoken.start) * 1000
    times = [round(begin + length * total / max(sums[-1], 1)) for total in sums]
    for cue, (start, end) in zip(cues, itertools.pairwise(times), strict=True):
        yield start, max(end, start + 1), cue


def balanced(text: str) -> list[str]:
    """As few lines as LINE columns need, and no longer than these few need."""
    pieces = list(pieces_of(text))
    fewest = len(wrapped(pieces, LINE))
    width = next(width for width in range(1, LINE + 1) if len(wrapped(pieces, width)) <= fewest)
    return wrapped(pieces, width)


def pieces_of(text: str) -> Iterator[str]:
    """What may stand on lines of its own, with the space before it if there is one."""
    for i, word in enumerate(text.split()):
        for j, piece in enumerate(PIECE.findall(word)):
            space = " " if i and not j else ""
            while columns(piece) > LINE:
                part = next(n for n in range(len(piece), 0, -1) if columns(piece[:n]) <= LINE)
                yield space + piece[:part]
                piece, space = piece[part:], ""
            yield space + piece


def wrapped(pieces: list[str], width: int) -> list[str]:
    """A piece that is wider than a line is a line by itself."""
    lines: list[str] = []
    for piece in pieces:
        if lines and columns(lines[-1] + piece) <= width:
            lines[-1] += piece
        else:
            lines.append(piece.lstrip())
    return lines


def columns(text: str) -> int:
    return sum(
        2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text
    )


def clock(milliseconds: int, point: str) -> str:
    seconds, milliseconds = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}{point}{milliseconds:03d}"
