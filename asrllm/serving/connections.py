"""Limit the number of connections, how long they may wait for a request, and what they log."""

import asyncio
import json
import resource
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from asrllm.serving.api_errors import ApiError
from asrllm.serving.metrics import ServerMetrics

MAX_CONNECTIONS = 1000
MIN_REJECTED = 8  # rejected connections that may wait for LINGER_SECONDS at once
LINGER_SECONDS = 2.0  # for a client to read why it was rejected
NOT_UTF8 = 1007  # closing code


def connections_by_open_files() -> int:
    """Return how many connections the limit on open files (`ulimit -n`) allows.

    A connection may need a second file for its upload. As many again may be accepted before they
    are rejected, and the rest is for the model and ffmpeg.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return min(files // 4, MAX_CONNECTIONS)


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """Limits of connections.

    Attributes:
        count: number of open connections, above which a further one is rejected.
        header_seconds: how long a request line with its headers may take.
        upload_seconds: how long the rest of an upload may take after its request was answered.
    """

    count: int
    header_seconds: float
    upload_seconds: float


class LimitedConfig(uvicorn.Config):
    """Configuration of a server with limited connections."""

    def __init__(
        self, app: ASGIApp, limits: ConnectionLimits, metrics: ServerMetrics, **options: Any
    ) -> None:
        """
        Args:
            app: the application.
            limits: limits of its connections.
            metrics: counts the connections that are rejected.
            options: options of uvicorn.
        """
        # asyncio accepts a whole backlog of connections before it starts the first one
        super().__init__(
            app, http=LimitedConnection, ws=LiveConnection, backlog=limits.count, **options
        )
        self.limits = limits
        self.metrics = metrics
        self.rejected: set[LimitedConnection] = set()  # that are still open


class LimitedConnection(H11Protocol):
    """A connection that is closed if it does not send a request in time.

    uvicorn has a limit between two requests only, which ends with the first byte of the second one.
    `limit_concurrency` of uvicorn rejects requests, but not connections without a request.
    """

    config: LimitedConfig
    timer: asyncio.TimerHandle | None = None
    is_rejected = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Reject the connection if there are too many, and otherwise wait for its request."""
        super().connection_made(transport)
        limit = self.config.limits.count
        if len(self.connections) > limit:
            problem = f"the server has {limit} connections. Try again later."
            self._reject(ApiError(503, problem, code="too_many_connections"))
        else:
            self._update_timer()

    def data_received(self, data: bytes) -> None:
        """Handle data of the client, unless it was rejected."""
        if not self.is_rejected:
            super().data_received(data)
            self._update_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        super().connection_lost(exc)
        self._stop_timer()
        self.config.rejected.discard(self)

    def _update_timer(self) -> None:
        """Run the timer while no request is in progress."""
        is_answered = self.cycle is None or self.cycle.response_complete
        is_http = self in self.connections  # it is removed when it becomes a WebSocket
        if not (is_answered and is_http):
            self._stop_timer()
        elif self.timer is None:
            limits = self.config.limits
            seconds = limits.upload_seconds if self._has_upload() else limits.header_seconds
            self.timer = self.loop.call_later(seconds, self._end_wait)

    def _stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _has_upload(self) -> bool:
        """Return whether the client still sends the body of a request that was answered."""
        return self.conn.their_state is h11.SEND_BODY

    def _end_wait(self) -> None:
        if self._has_upload():
            self.transport.close()
        else:
            problem = "the headers did not arrive in time. Send the request again."
            self._reject(ApiError(408, problem, code="request_too_slow"))

    def _reject(self, error: ApiError) -> None:
        """Send an error without a request, and close the connection a little later.

        If data of the client is not read before, the kernel resets the connection, and the answer
        is lost. In a flood of connections most are closed at once.
        """
        self.is_rejected = True
        self._stop_timer()
        self.connections.discard(self)  # does not count towards the limit any more
        self.config.metrics.requests.labels("other", error.status).inc()
        body = json.dumps(error.body())
        lines = [
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Connection: close",
        ]
        if error.status == HTTPStatus.SERVICE_UNAVAILABLE:
            lines.append("Retry-After: 1")
        self.transport.write("\r\n".join([*lines, "", body]).encode())
        rejected = self.config.rejected
        if len(rejected) < max(MIN_REJECTED, self.config.limits.count // 4):
            rejected.add(self)
            self.transport.write_eof()
            self.loop.call_later(LINGER_SECONDS, self.transport.close)
        else:
            self.transport.close()


class LiveConnection(WebSocketsSansIOProtocol):
    """A WebSocket whose client does not cause errors in the log of the server."""

    async def send(self, message: ASGISendEvent) -> None:
        """Send a message of the application."""
        await super().send(message)
        if self.initial_response is not None and self.close_sent:
            self.handshake_complete = True  # uvicorn logs a rejection as a fault otherwise

    def send_receive_event_to_app(self) -> None:
        """Pass on a message, or close the connection if it is text and not UTF-8."""
        if self.curr_msg_data_type == "text" and not self.close_sent:
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:  # uvicorn logs its traceback
                self.conn.send_close(NOT_UTF8)
                self.handle_parser_exception()
                return
        super().send_receive_event_to_app()
