"""Write the transcript of a file as text, JSON, SubRip and WebVTT."""

import html
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterator

from asrllm.data.scripts import UNSPACED
from asrllm.defaults import TRANSCRIPT_FORMATS
from asrllm.escape import escape
from asrllm.evaluation.transcription import FileTranscript, TextSegment

LINE = 42  # columns; a Chinese character has two
LINES = 2  # maximum number of lines of a cue
OPENING = "「『（《〈【“‘(["
_OPENING = re.escape(OPENING)
# a line may begin with a character of a script without spaces, or with a run of other characters,
# each together with the punctuation that belongs to it
UNBREAKABLE = re.compile(
    rf"[{_OPENING}]*(?:[{UNSPACED}]|[^\s{UNSPACED}{_OPENING}]+)[^\w\s{_OPENING}]*|\S+"
)
Cue = tuple[int, int, list[str]]  # begin and end in milliseconds, lines


def as_txt(transcript: FileTranscript, language: str | None) -> str:
    """Return the text."""
    return escape(transcript.text, keep="\n") + "\n"


def as_json(transcript: FileTranscript, language: str | None, indent: int | None = 2) -> str:
    """Return the transcript as JSON.

    A segment has an "end_reason" if its text did not end by itself.
    """
    segments = []
    for segment in transcript.segments:
        row: dict[str, str | float] = {
            "start": round(segment.start, 3),
            "end": round(segment.end, 3),
            "text": segment.text,
        }
        if segment.end_reason != "stop":
            row["end_reason"] = segment.end_reason
        segments.append(row)
    fields = {
        # a name that is not UTF-8 has its bytes escaped
        "audio": os.fsencode(transcript.audio).decode("utf-8", "backslashreplace"),
        "duration": round(transcript.duration, 3),
        "language": language,
        "text": transcript.text,
        "segments": segments,
    }
    return json.dumps(fields, ensure_ascii=False, indent=indent) + "\n"


def as_srt(transcript: FileTranscript, language: str | None) -> str:
    """Return the transcript as SubRip."""
    return "".join(numbered_cues(transcript, ","))


def as_vtt(transcript: FileTranscript, language: str | None) -> str:
    """Return the transcript as WebVTT."""
    return "WEBVTT\n\n" + "".join(numbered_cues(transcript, ".", as_html=True))


def numbered_cues(
    transcript: FileTranscript, point: str, *, as_html: bool = False
) -> Iterator[str]:
    """Yield the cues in the form that SubRip and WebVTT share.

    Args:
        transcript: transcript of the file.
        point: the decimal point of seconds.
        as_html: whether to escape HTML in the text.
    """
    cues = itertools.chain.from_iterable(map(cues_of, transcript.segments))
    for number, (begin, end, lines) in enumerate(cues, 1):
        text = "\n".join(map(escape, lines))
        if as_html:
            text = html.escape(text, quote=False)
        yield f"{number}\n{timestamp(begin, point)} --> {timestamp(end, point)}\n{text}\n\n"


Format = Callable[[FileTranscript, str | None], str]
TRANSCRIPT_WRITERS: dict[str, Format] = dict(
    zip(TRANSCRIPT_FORMATS, (as_txt, as_json, as_srt, as_vtt), strict=True)
)


def cues_of(segment: TextSegment) -> Iterator[Cue]:
    """Yield the cues of a segment, none for an empty text.

    A cue has at most LINES lines. The time of the segment is divided in proportion to the widths.
    """
    lines = balanced_lines(segment.text)
    cues = [lines[i : i + LINES] for i in range(0, len(lines), LINES)]
    widths = [0]  # cumulative
    for cue in cues:
        widths.append(widths[-1] + sum(map(display_width, cue)))
    begin = segment.start * 1000
    length = (segment.end - segment.start) * 1000
    times = [round(begin + length * width / max(widths[-1], 1)) for width in widths]
    for cue, (start, end) in zip(cues, itertools.pairwise(times), strict=True):
        yield start, max(end, start + 1), cue


def balanced_lines(text: str) -> list[str]:
    """Wrap a text in as few lines of LINE columns as possible, of similar widths."""
    pieces = list(split_pieces(text))
    lines = wrap(pieces, LINE)
    for width in range(1, LINE):
        narrower = wrap(pieces, width)
        if len(narrower) <= len(lines):
            return narrower
    return lines


def split_pieces(text: str) -> Iterator[str]:
    """Yield the pieces between which a line may break, with the space before them if any."""
    for i, word in enumerate(text.split()):
        for j, piece in enumerate(UNBREAKABLE.findall(word)):
            space = " " if i and not j else ""
            while display_width(piece) > LINE:
                part = _longest_prefix(piece)
                yield space + piece[:part]
                piece = piece[part:]
                space = ""
            yield space + piece


def _longest_prefix(piece: str) -> int:
    """Return how many characters of a piece fit in a line."""
    n = len(piece)
    while display_width(piece[:n]) > LINE:
        n -= 1
    return n


def wrap(pieces: list[str], width: int) -> list[str]:
    """Join pieces to lines of at most `width` columns. A wider piece gets its own line."""
    lines: list[str] = []
    for piece in pieces:
        if lines and display_width(lines[-1] + piece) <= width:
            lines[-1] += piece
        else:
            lines.append(piece.lstrip())
    return lines


def display_width(text: str) -> int:
    """Return the number of columns of a text."""
    width = 0
    for character in text:
        if unicodedata.east_asian_width(character) in "WF":
            width += 2
        elif not unicodedata.combining(character):
            width += 1
    return width


def timestamp(milliseconds: int, point: str) -> str:
    """Return a time as HH:MM:SS.mmm with the given decimal point."""
    seconds, milliseconds = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}{point}{milliseconds:03d}"
