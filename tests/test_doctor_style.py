"""Styles of transcripts that `asrllm doctor` compares."""

import pytest

from asrllm.doctor.style import (
    STYLES,
    Text,
    has_capitals,
    has_digits,
    has_punctuation,
    is_upper,
    mixture,
)

LOWER = "the rain fell on quiet fields while people walked home"
SENTENCE = "The rain fell on quiet fields, while people walked home."
CHINESE = "我们今天早上在河边看见很多人他说明年春会再来"


def texts(*counted, corpus="a", group=()):
    """Return texts from pairs of a text and how often it occurs."""
    return [
        Text(corpus=corpus, group=group, text=text) for text, count in counted for _ in range(count)
    ]


def mixtures(found):
    """Return the names of the checks that find a mixture."""
    return {style.check for style in STYLES if mixture(style, found)}


@pytest.mark.parametrize(
    ("test", "text", "expected"),
    [
        (is_upper, "HOW ARE YOU", True),
        (is_upper, "How are you", False),
        (is_upper, "USA", None),
        (is_upper, CHINESE, None),
        (has_capitals, LOWER, False),
        (has_capitals, SENTENCE, True),
        (has_capitals, SENTENCE.upper(), None),
        (has_capitals, "yes i am", None),
        (has_punctuation, SENTENCE, True),
        (has_punctuation, LOWER, False),
        (has_punctuation, "Well done", None),
        (has_punctuation, CHINESE, False),
        (has_punctuation, f"{CHINESE}。", True),
        (has_digits, "in 1995", True),
        (has_digits, "在2015年", True),
        (has_digits, "in nineteen ninety five", False),
        (has_digits, "mit fünfundzwanzig Leuten", False),
        (has_digits, "二零一五年", False),
        (has_digits, "two of them play MP3 files", None),
        (has_digits, "two of them play H264 files", None),
        (has_digits, "他一个人看了三天", None),
    ],
)
def test_style_of_a_text(test, text, expected):
    assert test(text) is expected


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (texts((LOWER, 94), (LOWER.upper(), 6)), {"case"}),
        (texts((LOWER, 97), (LOWER.upper(), 3)), set()),
        (texts((LOWER, 4), (LOWER.upper(), 4)), set()),  # too few
        (texts((SENTENCE, 50), (LOWER, 50)), {"case", "punctuation"}),
        (texts((SENTENCE, 70), (LOWER, 30)), set()),  # parts of sentences
        (texts((SENTENCE, 20), ("yes please", 80)), set()),
        (texts(("in 1995", 8), ("nineteen ninety five", 2)), set()),
        (texts(("in 1995", 12), ("nineteen ninety five", 5)), {"numbers"}),
    ],
)
def test_mixture_within_a_corpus(found, expected):
    assert mixtures(found) == expected


@pytest.mark.parametrize(("group", "expected"), [("prompt", {"case"}), ("other prompt", set())])
def test_mixture_of_corpora_needs_the_same_language_and_prompts(group, expected):
    found = texts((LOWER, 9), group=("prompt",))
    found += texts((LOWER.upper(), 9), corpus="b", group=(group,))
    assert mixtures(found) == expected
