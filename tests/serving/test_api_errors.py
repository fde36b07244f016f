"""Errors about the fields of a request."""

from fractions import Fraction
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from asrllm.serving.api_errors import SHOWN_LENGTH, invalid_field


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    ratio: Annotated[float, Field(ge=0, le=1)] = 0
    form: Literal["srt", "vtt"] = "srt"
    words: Annotated[list[str], Field(max_length=2)] = []
    prompt: Annotated[str, Field(max_length=10)] = ""
    exact: Fraction = Fraction(0)


def error_of(fields):
    with pytest.raises(ValidationError) as caught:
        Fields(**fields)
    (problem,) = caught.value.errors()
    return invalid_field(problem, problem["loc"]), problem


@pytest.mark.parametrize(
    ("fields", "param", "named"),
    [
        ({"ratio": 2.5}, "ratio", ["2.5", "1"]),
        ({"ratio": "warm"}, "ratio", ["warm", "number"]),
        ({"form": "pdf"}, "form", ["pdf", "srt", "vtt"]),
        ({"words": ["a", "b", "c"]}, "words", ["2"]),
        ({"words": ["a", 1]}, "words.1", ["1", "string"]),
        ({"prompt": "x" * 1000}, "prompt", ["10"]),
        ({"promt": "x"}, "promt", ["x"]),
        ({"exact": 1j}, "exact", []),
    ],
)
def test_invalid_field_is_named_with_its_value_and_bound(fields, param, named):
    error, problem = error_of(fields)
    message = str(error)
    assert error.status == 400
    assert error.param == param
    assert param in message
    assert all(word in message for word in named)
    assert problem["msg"] not in message
    assert len(message) < 3 * SHOWN_LENGTH


def test_invalid_json_body_is_described():
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(Fields).validate_json('{"ratio": }')
    (problem,) = caught.value.errors()
    error = invalid_field(problem, problem["loc"])
    assert error.param == "body"
    assert problem["ctx"]["error"] in str(error)
