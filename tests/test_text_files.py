"""Messages about files."""

import json
import pickle
from fractions import Fraction

import pytest
import torch

from asrllm.errors import UserError
from asrllm.text_files import first_words, read_json_object


@pytest.mark.parametrize("text", ["word " * 100, "w" * 500])
def test_long_messages_are_marked_as_cut(text):
    found = first_words(ValueError(text))
    assert len(found) < 210
    assert found.endswith("[...]")
    assert first_words(ValueError("short.")) == "short"


def test_missing_key_is_named():
    assert first_words(KeyError("a")) == "'a' is missing"
    assert first_words(KeyError("Missing keys in x: {'a'}")) == "Missing keys in x: {'a'}"


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


@pytest.mark.parametrize("text", ['{"a": 1,\n  "b": }', '{"a": 1\n, b'])
def test_place_of_invalid_json_is_named(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(UserError) as error:
        read_json_object(path, "the file")
    assert f"{path}:{expected.value.lineno}:{expected.value.colno} " in str(error.value)


def test_json_that_is_nested_too_deeply_is_rejected_with_its_path(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[" * 100_000)
    with pytest.raises(UserError) as error:
        read_json_object(path, "the file")
    assert repr(str(path)) in str(error.value)
