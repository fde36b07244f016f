"""Errors in the form of OpenAI's API."""

from collections.abc import Mapping
from typing import Any

from asrllm.errors import UserError

Headers = Mapping[str, str]


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
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
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


def invalid_audio(error: UserError) -> ApiError:
    """Return the error for an audio file that cannot be used."""
    return ApiError(400, str(error), param="file", code="invalid_audio")


def server_error() -> ApiError:
    """Return the error for a fault of the server, whose log has the traceback."""
    return ApiError(500, "the server failed. Its log has the reason.", kind="server_error")
