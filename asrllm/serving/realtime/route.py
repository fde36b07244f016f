"""The WebSocket of live sessions, and how the server ends them when it stops."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from asrllm.serving.api_errors import ApiError
from asrllm.serving.models import Models
from asrllm.serving.realtime.session import Session
from asrllm.serving.transcriber import Transcriber

SUBPROTOCOL = "realtime"


def add_realtime(app: FastAPI, models: Models, origins: Sequence[str]) -> None:
    """Add /v1/realtime.

    Args:
        app: the application, whose state gets the set of the running sessions.
        models: the models.
        origins: origins of web pages that may connect, not only the server's own; "*" allows all.
    """
    sessions: set[Session] = set()
    app.state.sessions = sessions

    @app.websocket("/v1/realtime")
    async def realtime(websocket: WebSocket) -> None:
        _check_origin(websocket, origins)
        transcriber = _chosen_model(websocket, models)
        with contextlib.closing(models.queue.enter(transcriber.segmentation.longest)) as place:
            offered = websocket.scope["subprotocols"]
            await websocket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
            session = Session(websocket, models, transcriber, place)
            sessions.add(session)
            try:
                with contextlib.suppress(WebSocketDisconnect):
                    await session.run()
            finally:
                sessions.discard(session)


def _check_origin(websocket: WebSocket, origins: Sequence[str]) -> None:
    """Raise ApiError for a web page of another origin, which browsers allow to connect."""
    origin = websocket.headers.get("origin")
    if origin is None or origin in origins or "*" in origins:
        return
    if urlsplit(origin).netloc != websocket.headers.get("host"):
        problem = f"the origin {origin!r} may not connect. Start the server with --cors {origin}."
        raise ApiError(403, problem, code="origin_not_allowed")


def _chosen_model(websocket: WebSocket, models: Models) -> Transcriber:
    """Return the model of a session until it chooses another, and check the URL's other fields."""
    chosen = models.first
    for field, value in websocket.query_params.multi_items():
        if field == "model":
            chosen = models.get(value)
        elif (field, value) != ("intent", "transcription"):
            problem = f"{field}={value!r} is not supported. Use intent=transcription."
            raise ApiError(400, problem, param=field, code="unsupported_value")
    return chosen


class LiveServer(uvicorn.Server):
    """A server that ends live sessions before their connections when it stops."""

    def __init__(self, config: uvicorn.Config, sessions: set[Session], seconds: float) -> None:
        """
        Args:
            config: configuration of the server.
            sessions: the running sessions.
            seconds: how long sessions and requests may take when the server stops.
        """
        super().__init__(config)
        self.sessions = sessions
        self.seconds = seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no connection, transcribe the audio that was received, and close."""
        for server in self.servers:
            server.close()
        deadline = time.monotonic() + self.seconds
        for session in list(self.sessions):
            session.stop()
        while self.sessions and not self.force_exit and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self.config.timeout_graceful_shutdown = max(0, round(deadline - time.monotonic()))
        await super().shutdown(sockets)
