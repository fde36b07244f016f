"""Messages about files."""

import pytest

from asrllm.text_files import first_words


@pytest.mark.parametrize("text", ["word " * 100, "w" * 500])
def test_long_messages_are_marked_as_cut(text):
    found = first_words(ValueError(text))
    assert len(found) < 210
    assert found.endswith("[...]")
    assert first_words(ValueError("short.")) == "short"
