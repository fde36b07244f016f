"""Check requests before their body is read: the API key, the size, and the time of the upload."""

import asyncio
import json
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asrllm.serving.api_errors import ApiError
from asrllm.serving.metrics import Metrics

PROBLEM = "asrllm.problem"  # key of the scope


class Gate:
    """ASGI middleware that limits uploads, checks API keys and counts requests."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        max_bytes: int,
        upload_seconds: float,
        metrics: Metrics,
    ) -> None:
        """
        Args:
            app: the application behind the gate.
            api_key: key that requests below /v1 must have; None requires none.
            max_bytes: maximum size of a request's body.
            upload_seconds: how long the upload of a body may take.
            metrics: counts the requests.
        """
        self.app = app
        self.api_key = api_key
        self.max_bytes = max_bytes
        self.upload_seconds = upload_seconds
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or reject it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])

        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")  # absent for unknown paths, which must not be labels
                path = route.path if route else "other"
                self.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        try:
            self._check_headers(scope["path"], headers)
        except ApiError as error:
            await _send_error(error, counted_send)
            return
        await self.app(scope, self._limited(scope, receive), counted_send)

    def _check_headers(self, path: str, headers: dict[bytes, bytes]) -> None:
        given = headers.get(b"authorization", b"")
        expected = f"Bearer {self.api_key}".encode()
        needs_key = self.api_key is not None and path.startswith("/v1/")
        if needs_key and not secrets.compare_digest(given, expected):
            raise ApiError(
                401,
                "the API key is missing or wrong. Send the header 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
            )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the request has more than {self.max_bytes} bytes. Send a shorter or compressed file.",
            param="file",
            code="file_too_large",
        )

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """Return a `receive` that ends an upload which is too large or too slow."""
        deadline = time.monotonic() + self.upload_seconds
        size = 0
        is_complete = False

        async def limited_receive() -> Message:
            nonlocal size, is_complete
            if is_complete:  # what follows is the disconnection, for which the handler waits
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                problem = f"the upload took more than {self.upload_seconds:g} s. Send it again."
                scope[PROBLEM] = ApiError(408, problem, code="upload_too_slow")
                raise scope[PROBLEM] from None
            size += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if size > self.max_bytes:
                scope[PROBLEM] = self._too_large()
                raise scope[PROBLEM]
            return message

        return limited_receive


async def _send_error(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
