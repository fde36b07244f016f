"""Read forms whose texts must be UTF-8. Starlette reads other texts as Latin-1."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response

from asrllm.serving.api_errors import ApiError

FORM = "multipart/form-data"
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class FormRoute(APIRoute):
    """A route that reads the form of a request before FastAPI does."""

    def get_route_handler(self) -> Handler:
        """Return the handler of requests. FastAPI calls it once."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if request.headers.get("content-type", "").lower().startswith(FORM):
                request._form = await read_form(request)
            return await handler(request)

        return handle


async def read_form(request: Request) -> Any:
    """Return the form of a request.

    Raises:
        ApiError: it is malformed, or a text is not UTF-8.
    """
    try:
        return await FormParser(request.headers, request.stream()).parse()
    except MultiPartException as error:
        problem = f"the form cannot be read: {error.message.rstrip('.')}. Send it again."
        raise ApiError(400, problem, code="invalid_form") from error


class FormParser(MultiPartParser):
    """Parser of multipart/form-data (RFC 7578) that rejects a text in another encoding."""

    def on_part_begin(self) -> None:
        """Ignore a charset of the form's header, which the RFC does not define."""
        super().on_part_begin()
        self._charset = "utf-8"

    def on_part_end(self) -> None:
        """Check a part when it is complete.

        Raises:
            ApiError: it is a text and not UTF-8.
        """
        part = self._current_part
        if part.file is None:
            try:
                part.data.decode("utf-8")
            except UnicodeDecodeError as error:
                problem = f"the field {part.field_name!r} is not UTF-8 text. Send it as UTF-8."
                raise ApiError(400, problem, param=part.field_name, code="not_utf8") from error
        super().on_part_end()
