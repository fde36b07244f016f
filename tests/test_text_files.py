"""Messages about files."""

import pickle
from fractions import Fraction

import pytest
import torch

from asrllm.text_files import first_words


@pytest.mark.parametrize("text", ["word " * 100, "w" * 500])
def test_long_messages_are_marked_as_cut(text):
    found = first_words(ValueError(text))
    assert len(found) < 210
    assert found.endswith("[...]")
    assert first_words(ValueError("short.")) == "short"


@pytest.mark.parametrize("content", ["object", "garbage"])
def test_advice_to_trust_a_file_of_weights_is_not_repeated(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(b"\x80\x02garbage")
    if content == "object":
        torch.save({"a": Fraction(1, 2)}, path)
    with pytest.raises(pickle.UnpicklingError) as caught:
        torch.load(path, weights_only=True)
    found = first_words(caught.value)
    assert {"object": "fractions.Fraction", "garbage": "operand 103"}[content] in found
    assert not any(word in found for word in ("trust", "weights_only", "Please", "http"))
