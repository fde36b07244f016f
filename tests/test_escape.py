import logging

import pytest

from asrllm.escape import EscapingFormatter, escape
from asrllm.text_files import first_words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("café 你好 \U0001f600 a b", "café 你好 \U0001f600 a b"),
        ("\x1b[2Ja\tb\nc\r", r"\x1b[2Ja\tb\nc\r"),
        ("\x7f\x9b31m\u2028\u202e", r"\x7f\x9b31m\u2028\u202e"),
        ("caf\udce9", r"caf\udce9"),
    ],
)
def test_unsafe_characters_are_escaped(text, expected):
    assert escape(text) == expected
    assert escape(text).encode().decode() == expected


def test_log_records_are_escaped():
    record = logging.LogRecord(
        "x", logging.WARNING, "", 0, "%s: no\ntext", ("\x1b]0;title\x07",), None
    )
    assert EscapingFormatter("%(message)s").format(record) == "\\x1b]0;title\\x07: no\ntext"


def test_words_of_a_library_are_escaped():
    assert first_words(ValueError("bad \x1b[2J\nkey \u202e")) == r"bad \x1b[2J key \u202e"
