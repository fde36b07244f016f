"""Formats of transcripts, which a small parser reads back."""

import itertools
import json
import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asrllm.evaluation.subtitles import (
    LINE,
    TRANSCRIPT_WRITERS,
    as_json,
    balanced_lines,
    display_width,
    timestamp,
)
from asrllm.evaluation.transcription import FileTranscript, TextSegment

ENGLISH = (
    "Well, this is a rather long sentence that goes on and on, "
    "until somebody decides that it is quite long enough; then it stops."
)
CHINESE = (
    "今天天气很好，我们去公园散步吧。「你说得对」，他回答道："
    "我正在用GPU训练模型，然后还要继续工作很长时间才能回家吃饭呢。"
)


def transcript(*segments):
    return FileTranscript(
        audio="a/b.wav",
        duration=90.0,
        segments=[TextSegment(start=a, end=b, text=text) for a, b, text in segments],
    )


def parse(content, point):
    """Return [(begin, end, lines)] of SubRip or WebVTT, with times in milliseconds."""
    if point == ".":
        assert content.startswith("WEBVTT\n\n")
        content = (
            content.removeprefix("WEBVTT\n\n")
            .replace("&lt;", "<")
            .replace("&gt;", ">")
            .replace("&amp;", "&")
        )
    cues = []
    for number, block in enumerate(content.split("\n\n")[:-1], 1):
        name, times, *lines = block.split("\n")
        assert name == str(number)
        found = re.fullmatch(
            rf"(\d\d+):(\d\d):(\d\d)\{point}(\d\d\d) --> (\d\d+):(\d\d):(\d\d)\{point}(\d\d\d)",
            times,
        )
        values = list(map(int, found.groups()))
        begin, end = (
            ((h * 60 + m) * 60 + s) * 1000 + ms for h, m, s, ms in (values[:4], values[4:])
        )
        cues.append((begin, end, lines))
    return cues


def squeezed(text):
    return "".join(text.split())


words = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=60)
texts = st.lists(
    st.one_of(words, st.sampled_from(["a", "transcription", "你好世界", "。", "-->", "<b>"])),
    max_size=30,
).map(" ".join)


@pytest.mark.slow
def test_a_name_that_is_not_utf8_is_escaped_in_json():
    name = os.fsdecode(b"\xff.wav")
    transcript = FileTranscript(audio=name, duration=1.0, segments=[])
    content = as_json(transcript, None)
    assert json.loads(content.encode())["audio"] == "\\xff.wav"


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0.2, 28), texts), max_size=4))
def test_cues_contain_the_text_in_order_within_their_segments(parts):
    segments, now = [], 0.0
    for pause, length, text in parts:
        segments.append((now + pause, now + pause + length, text))
        now += pause + length
    for kind, point in (("srt", ","), ("vtt", ".")):
        cues = parse(TRANSCRIPT_WRITERS[kind](transcript(*segments), None), point)
        assert all(begin < end for begin, end, _ in cues)
        assert all(end <= begin for (_, end, _), (begin, _, _) in itertools.pairwise(cues))
        assert all(
            1 <= len(lines) <= 2 and all(0 < display_width(line) <= LINE for line in lines)
            for _, _, lines in cues
        )
        assert squeezed("".join("".join(lines) for _, _, lines in cues)) == squeezed(
            "".join(text for _, _, text in segments)
        )
        assert all(
            any(a * 1000 - 1 <= begin and end <= b * 1000 + 1 for a, b, _ in segments)
            for begin, end, _ in cues
        )


def test_words_are_not_split_and_time_is_proportional_to_length():
    cues = parse(TRANSCRIPT_WRITERS["srt"](transcript((10, 22, ENGLISH)), None), ",")
    assert " ".join(" ".join(lines) for _, _, lines in cues) == ENGLISH
    assert (cues[0][0], cues[-1][1]) == (10_000, 22_000)
    rates = [(end - begin) / sum(map(len, lines)) for begin, end, lines in cues]
    assert max(rates) - min(rates) < 0.05 * max(rates)


def test_chinese_breaks_between_characters_but_not_before_punctuation():
    lines = balanced_lines(CHINESE)
    assert len(lines) == 3
    assert "".join(lines) == CHINESE
    assert "GPU" in "|".join(lines)
    assert not any(line[0] in "，。」：" or line[-1] in "「" for line in lines)
    assert balanced_lines("") == balanced_lines(" \n ") == []
    assert balanced_lines("a" * 100) == ["a" * 42, "a" * 42, "a" * 16]


def test_lines_are_balanced():
    first, second = balanced_lines("it would be a pity to leave one word alone here")
    assert abs(len(first) - len(second)) < 6


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(0, "00:00:00,000"), (3_599_999, "00:59:59,999"), (360_000_001, "100:00:00,001")],
)
def test_timestamps(milliseconds, text):
    assert timestamp(milliseconds, ",") == text


def test_json_and_text():
    found = FileTranscript(
        audio="a.wav",
        duration=12.3456,
        segments=[
            TextSegment(start=0.5, end=2.25, text="你好"),
            TextSegment(start=3, end=9, text="世界", end_reason="loop"),
        ],
    )
    assert TRANSCRIPT_WRITERS["txt"](found, None) == "你好世界\n"
    fields = json.loads(as_json(found, "zh"))
    assert fields == {
        "audio": "a.wav",
        "duration": 12.346,
        "language": "zh",
        "text": "你好世界",
        "segments": [
            {"start": 0.5, "end": 2.25, "text": "你好"},
            {"start": 3, "end": 9, "text": "世界", "end_reason": "loop"},
        ],
    }
    assert as_json(found, "zh", indent=None).count("\n") == 1
    assert TRANSCRIPT_WRITERS["srt"](transcript(), None) == ""
