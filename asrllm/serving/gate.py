"""Check requests before their body is read, and count and log them.

The API key, the size of the body and the time of its upload are checked.
"""

import asyncio
import json
import secrets
import time
from collections.abc import Callable
from datetime import datetime, timezone

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asrllm.serving.api_errors import ApiError
from asrllm.serving.metrics import ServerMetrics

PROBLEM = "asrllm.problem"  # key of the scope
COMPLETED = "conversation.item.input_audio_transcription.completed"
KEY_PROTOCOL = "openai-insecure-api-key."  # OpenAI's name of the subprotocol with the key


class Gate:
    """ASGI middleware that limits uploads, checks API keys, and counts and logs requests."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        max_bytes: int,
        upload_seconds: float,
        metrics: ServerMetrics,
        access_log: Callable[[str], None] | None,
        logs_texts: bool,
    ) -> None:
        """
        Args:
            app: the application behind the gate.
            api_key: key that requests below /v1 must have; None requires none.
            max_bytes: maximum size of a request's body.
            upload_seconds: how long the upload of a body may take.
            metrics: counts the requests.
            access_log: called with a line of JSON for each request, without its content.
            logs_texts: whether the line has what the API answers, and thereby the texts.
        """
        self.app = app
        self.api_key = api_key
        self.max_bytes = max_bytes
        self.upload_seconds = upload_seconds
        self.metrics = metrics
        self.access_log = access_log
        self.logs_texts = logs_texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or reject it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        began = time.monotonic()
        status = 500  # of an error that the application does not answer itself
        answered = bytearray()

        async def noted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "websocket.accept":
                status = 101
            elif message["type"] == "websocket.close" and status == 500:
                status = 403
            status = message.get("status", status)  # of the start of a response
            if self.logs_texts and _is_api(scope):
                answered.extend(_content(message))
            await send(message)

        try:
            self._check_headers(scope)
            limited = self._limited(scope, receive) if scope["type"] == "http" else receive
            await self.app(scope, limited, noted_send)
        except ApiError as error:
            await JSONResponse(error.body(), error.status)(scope, receive, noted_send)
        finally:
            self._note(scope, status, time.monotonic() - began, answered)

    def _note(self, scope: Scope, status: int, seconds: float, answered: bytearray) -> None:
        """Count and log a request that has been answered."""
        route = scope.get("route")  # absent for unknown paths, which must not be labels
        self.metrics.requests.labels(route.path if route else "other", status).inc()
        if self.access_log:
            line = {
                "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
                "method": scope.get("method", "GET"),  # a WebSocket has none
                "path": scope["path"],
                "status": status,
                "seconds": round(seconds, 3),
            }
            if self.logs_texts and _is_api(scope):
                line["answer"] = answered.decode("utf-8", "replace")
            self.access_log(json.dumps(line))

    def _check_headers(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        is_right = secrets.compare_digest(_given_key(scope), (self.api_key or "").encode())
        if self.api_key is not None and _is_api(scope) and not is_right:
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


def _is_api(scope: Scope) -> bool:
    """Return whether a request is for the API, not for the page or the state of the server."""
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))  # as the router does
    return path.startswith("/v1/")


def _content(message: Message) -> bytes:
    """Return the body in a message of a response, or a complete transcript of a live session."""
    if message["type"] == "http.response.body":
        return bytes(message.get("body", b""))
    if message["type"] == "websocket.send":
        event = json.loads(message["text"])
        if event["type"] == COMPLETED:
            return str(event["transcript"]).encode() + b"\n"
    return b""


def _given_key(scope: Scope) -> bytes:
    """Return the key in a request's header, or among the subprotocols of a WebSocket."""
    scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return bytes(key)
    for protocol in scope.get("subprotocols", []):  # browsers cannot send headers
        if protocol.startswith(KEY_PROTOCOL):
            return protocol.removeprefix(KEY_PROTOCOL).encode(errors="replace")
    return b""
