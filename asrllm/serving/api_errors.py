"""Errors in the form of OpenAI's API."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import ErrorDetails

from asrllm.errors import UserError
from asrllm.schema import JSON_TYPES, bound_fix, shown

Headers = Mapping[str, str]
SHOWN_LENGTH = 100  # characters of an invalid value or of its field in an error message
MESSAGE_LENGTH = 1000  # characters; only a long value of a client makes a message longer
# what is wrong with a field and the fix, by pydantic's type of the error
FIELD_PROBLEMS = {
    "missing": "is missing. Add it.",
    "extra_forbidden": "is not supported. Leave it out.",
    "none_required": "is not supported. Leave it out.",
    "union_tag_not_found": "has no {discriminator}. Add it.",
    "union_tag_invalid": "is not a valid choice of {discriminator}. Available: {expected_tags}.",
    "literal_error": "is not a valid choice. Available: {expected}.",
    "string_too_short": "is too short. Use at least {min_length} characters.",
    "string_too_long": "is too long. Use at most {max_length} characters.",
    # only FastAPI's type of files has this error
    "value_error": "is text. Send the file itself, as 'curl -F file=@PATH' does.",
}
# ends of pydantic's types of errors about a value of another type
TYPE_FAULTS = ("type", "parsing", "parsing_size", "from_float", "unicode")


class ApiError(Exception):
    """An error with an HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Headers | None = None,
    ) -> None:
        """
        Args:
            status: HTTP status.
            message: what is wrong, and the fix.
            kind: the type of the error in OpenAI's API.
            param: the field of the request at fault.
            code: what is wrong, as one word that programs compare.
            headers: further headers of the answer.
        """
        if len(message) > MESSAGE_LENGTH:  # the fix is at the end
            half = MESSAGE_LENGTH // 2
            message = f"{message[:half]}...{message[-half:]}"
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param[:SHOWN_LENGTH] if param else param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        error = {
            "message": str(self),
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def invalid_field(problem: ErrorDetails, path: Sequence[int | str]) -> ApiError:
    """Return the error for a field of a request that pydantic rejects.

    Args:
        problem: what pydantic found.
        path: names and positions that lead to the field.
    """
    kind = problem["type"]
    limits = problem.get("ctx", {})
    if kind == "json_invalid":
        reason = f"the body is not valid JSON: {limits['error']}. Correct it."
        return ApiError(400, reason, param="body", code=kind)
    field = ".".join(map(str, path))[:SHOWN_LENGTH] or "body"
    value = problem["input"]
    reason = f"the field {field!r} "
    if isinstance(value, (bool, int, float, str)):  # not a whole object
        reason = f"{field}={shown(value)[:SHOWN_LENGTH]} "
    type_name, _, fault = kind.partition("_")
    expected = JSON_TYPES.get(type_name) if fault in TYPE_FAULTS else None
    fix = bound_fix(problem)
    if kind in FIELD_PROBLEMS:
        reason += FIELD_PROBLEMS[kind].format(**limits)
    elif fix is not None:
        reason += f"is out of range. {fix}"
    elif expected is not None:
        reason += f"has the wrong type. Expected: {expected}."
    else:
        reason += "is invalid. Correct it."
    return ApiError(400, reason, param=field, code=kind)


def invalid_audio(error: UserError) -> ApiError:
    """Return the error for an audio file that cannot be used."""
    return ApiError(400, str(error), param="file", code="invalid_audio")


def server_error() -> ApiError:
    """Return the error for a fault of the server, whose log has the traceback."""
    return ApiError(500, "the server failed. Its log has the reason.", kind="server_error")
