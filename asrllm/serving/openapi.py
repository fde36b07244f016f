"""The answers that the OpenAPI document of the server declares."""

from typing import Any

from pydantic import BaseModel


class ErrorDetails(BaseModel):
    """What is wrong with a request, in the form of OpenAI's API."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of an answer with a status from 400."""

    error: ErrorDetails


Responses = dict[int | str, dict[str, Any]]

ERRORS: Responses = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be answered."},
    "5XX": {"model": ErrorBody, "description": "The server failed."},
}


def _json(**properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"schema": schema}


_STRING = {"type": "string"}
_TEXT: dict[str, Any] = {"schema": _STRING}

TRANSCRIPTION: Responses = {
    200: {
        "description": "The text, in the format of `response_format` or as a stream of events.",
        "content": {
            "application/json": _json(text=_STRING),
            "text/plain": _TEXT,
            "text/event-stream": _TEXT,
        },
    }
}
TRANSLATION: Responses = {
    200: {
        "description": "The text in English, in the format of `response_format`.",
        "content": {"application/json": _json(text=_STRING), "text/plain": _TEXT},
    }
}
CHAT: Responses = {
    200: {
        "description": "The text as a message of the assistant.",
        "content": {
            "application/json": _json(
                id=_STRING,
                object={"const": "chat.completion"},
                created={"type": "integer"},
                model=_STRING,
                choices={"type": "array", "minItems": 1, "items": {"type": "object"}},
            )
        },
    }
}
READINESS: Responses = {
    status: {
        "description": description,
        "content": {"application/json": _json(status=_STRING)},
    }
    for status, description in ((200, "There is room."), (503, "The queue is full."))
}
METRIC_RESPONSES: Responses = {
    200: {"description": "Metrics for Prometheus.", "content": {"text/plain": _TEXT}}
}
