"""A live session: the audio of one client, and the texts of its speech."""

import asyncio
import json
import uuid
from typing import Any

import numpy as np
from fastapi import WebSocket, WebSocketDisconnect
from starlette.websockets import WebSocketState

from asrllm.audio.segments import Segment
from asrllm.defaults import RATE
from asrllm.serving.api_errors import ApiError
from asrllm.serving.fields import MAX_TEXT, prompt_of_request
from asrllm.serving.models import Models
from asrllm.serving.realtime.audio import AudioBuffer
from asrllm.serving.realtime.events import (
    PCM_RATE,
    Append,
    Clear,
    Commit,
    Event,
    SessionSettings,
    SessionUpdate,
    parse_event,
    parse_message,
)
from asrllm.serving.realtime.items import SpeechItem
from asrllm.serving.realtime.transcripts import Transcripts
from asrllm.serving.transcriber import QueuePlace, Transcriber

IDLE_SECONDS = 120.0  # without an event, after which a session is closed
MAX_AHEAD = 300 * RATE  # samples that a client may send before they are transcribed
EVENT_COST = RATE // 100  # samples as which an event counts at least
TRANSCRIPTION = "session.audio.input.transcription"  # the settings of texts
GOING_AWAY = 1001  # closing code of a server that stops


class Session:
    """Transcribes the audio of one client until it disconnects.

    Three tasks work at the same time. The first receives events. The second handles them, cuts
    their audio into segments, and requests the texts. The third sends the texts in order.
    """

    def __init__(
        self, websocket: WebSocket, models: Models, transcriber: Transcriber, place: QueuePlace
    ) -> None:
        """
        Args:
            websocket: an accepted connection.
            models: models that the client can choose.
            transcriber: the first of its models.
            place: place of the session in the queue.
        """
        self.websocket = websocket
        self.models = models
        self.transcriber = transcriber
        self.place = place
        self.id = f"sess_{uuid.uuid4().hex}"
        self.settings = SessionSettings()
        self.prompt = self._prompt_of(self.settings, transcriber)
        self.buffer = self._new_buffer(0)
        self.ended = 0  # sample of the buffer at which the last item ended
        self.item = SpeechItem()
        self.previous_id: str | None = None  # of the item before
        self.ahead = 0  # samples that were received and are not transcribed
        self.events: asyncio.Queue[tuple[Event, int] | None] = asyncio.Queue()
        self.transcripts = Transcripts(transcriber, self._send, self._count)
        self.receiving: asyncio.Task[None] | None = None
        self.is_stopped = False

    @property
    def buffered(self) -> int:
        """Samples since the end of the last item."""
        return self.buffer.samples - self.ended

    def stop(self) -> None:
        """Receive no more events. The session ends after the texts of the audio so far."""
        self.is_stopped = True
        if self.receiving is not None:
            self.receiving.cancel()

    async def run(self) -> None:
        """Serve the client until it disconnects, or the session is stopped."""
        self.receiving = asyncio.create_task(self._receive())
        handling = asyncio.create_task(self._handle_events())
        writing = asyncio.create_task(self.transcripts.run())
        tasks = [self.receiving, handling, writing]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if self.is_stopped:
                self.events.put_nowait(None)
                await asyncio.wait([handling, writing], return_when=asyncio.FIRST_EXCEPTION)
                await self.websocket.close(GOING_AWAY)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            self.transcripts.cancel()
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _receive(self) -> None:
        await self._send("session.created", session=self._description())
        while not self.is_stopped:  # Python 3.11 may lose a cancellation in wait_for
            try:
                frame = await asyncio.wait_for(self.websocket.receive(), IDLE_SECONDS)
            except asyncio.TimeoutError:
                if self.ahead:
                    continue
                problem = f"no event arrived in {IDLE_SECONDS:g} s. Connect again."
                await self._send_error(ApiError(408, problem, code="session_idle"), None)
                await self.websocket.close()
                return
            if frame["type"] == "websocket.disconnect":
                return
            await self._accept(frame.get("text"))

    async def _accept(self, text: str | None) -> None:
        """Queue the event of a frame, or answer it with an error."""
        event_id = None
        try:
            message = parse_message(text)
            if isinstance(message.get("event_id"), str):
                event_id = message["event_id"][:MAX_TEXT]
            event = parse_event(message)
            cost = EVENT_COST
            if isinstance(event, Append):  # four characters of base64 are one and a half samples
                cost = max(cost, len(event.audio) * 3 // 8 * RATE // PCM_RATE)
            if self.ahead + cost > MAX_AHEAD:
                problem = f"{self.ahead / RATE:.0f} s of audio are waiting. Send the event later."
                raise ApiError(429, problem, kind="rate_limit_error", code="buffer_full")
        except ApiError as error:
            await self._send_error(error, event_id)
            return
        self._count(cost)
        self.events.put_nowait((event, cost))

    def _count(self, samples: int) -> None:
        self.ahead += samples
        self.place.grow(self.ahead)

    async def _handle_events(self) -> None:
        while (queued := await self.events.get()) is not None:
            event, cost = queued
            try:
                await self._handle(event)
            except ApiError as error:
                await self._send_error(error, event.event_id)
            finally:
                self._count(-cost)
        if self.buffered:
            await self._finish_buffer()
        self.transcripts.close()

    async def _handle(self, event: Event) -> None:
        if isinstance(event, Append):
            await self._append(event.samples())
        elif isinstance(event, Commit):
            if self.buffered < self.transcriber.shortest:
                seconds = self.buffered / RATE
                problem = f"the buffer has only {seconds:.2f} s of audio. Append more audio first."
                raise ApiError(400, problem, code="input_audio_buffer_commit_empty")
            await self._finish_buffer()
        elif isinstance(event, Clear):
            self._clear()
            await self._send("input_audio_buffer.cleared")
        elif isinstance(event, SessionUpdate):
            await self._update(event)

    async def _update(self, event: SessionUpdate) -> None:
        settings = self.settings.updated(event.session)
        chosen = settings.audio.input.transcription.model
        transcriber = self.transcriber if chosen is None else self.models.get(chosen)
        prompt = self._prompt_of(settings, transcriber)
        has_new_turns = settings.turns != self.settings.turns
        has_new_model = transcriber is not self.transcriber
        if self.buffered and (has_new_turns or has_new_model):
            what = "turn_detection" if has_new_turns else "transcription.model"
            problem = f"{what} changes while audio is buffered. Commit or clear it first."
            raise ApiError(400, problem, param=f"session.audio.input.{what}")
        self.settings = settings
        self.prompt = prompt
        self.transcriber = transcriber
        self.transcripts.use(transcriber)
        if has_new_turns or has_new_model:
            self._clear()
        await self._send("session.updated", session=self._description())

    def _prompt_of(self, settings: SessionSettings, transcriber: Transcriber) -> str:
        """Return the prompt of a session, or raise ApiError if a setting is not supported."""
        chosen = settings.audio.input.transcription
        hotwords = ",".join(chosen.keywords or [])
        if len(hotwords) > MAX_TEXT:
            problem = f"the keywords have {len(hotwords)} characters. Use at most {MAX_TEXT}."
            raise ApiError(400, problem, param=f"{TRANSCRIPTION}.keywords")
        try:
            return prompt_of_request(
                transcriber.description,
                language=chosen.language,
                prompt=chosen.prompt,
                hotwords=hotwords,
            )
        except ApiError as error:
            field = "keywords" if error.param == "hotwords" else error.param
            error.param = f"{TRANSCRIPTION}.{field}"
            raise

    def _description(self) -> dict[str, Any]:
        """Return the settings in the form of OpenAI's API."""
        settings = self.settings.model_dump()
        settings["audio"]["input"]["transcription"]["model"] = self.transcriber.name
        return {"id": self.id, "object": "realtime.transcription_session"} | settings

    def _new_buffer(self, offset: int) -> AudioBuffer:
        segmentation = self.transcriber.segmentation
        return AudioBuffer(segmentation, self.transcriber.shortest, self.settings.turns, offset)

    def _renew_buffer(self) -> None:
        self.ended = 0
        self.buffer = self._new_buffer(self.buffer.offset + self.buffer.samples)

    def _clear(self) -> None:
        """Discard the audio and the texts of the item."""
        self.transcripts.discard(self.item)
        self.item = SpeechItem()
        self._renew_buffer()

    async def _append(self, pcm: np.ndarray) -> None:
        samples = len(pcm) * RATE // PCM_RATE
        limit = self.transcriber.max_seconds
        if self.settings.turns is None and self.buffered + samples > limit * RATE:
            problem = f"the buffer would have more than {limit:g} s of audio. Commit it first."
            raise ApiError(413, problem, code="audio_too_long")
        loop = asyncio.get_running_loop()
        pushed = loop.run_in_executor(self.transcriber.readers, self.buffer.push, pcm)
        segments, speech = await pushed
        await self._add(segments)
        if speech is not None:
            await self._note_start(speech)
            self.transcripts.request_partial(self.item, speech.wave, self.prompt)

    async def _finish_buffer(self) -> None:
        """Transcribe the rest of the buffer, and end its item."""
        loop = asyncio.get_running_loop()
        segments = await loop.run_in_executor(self.transcriber.readers, self.buffer.finish)
        await self._add(segments)
        if self.settings.turns is None or not segments:
            await self._end_item()
        self._renew_buffer()

    async def _add(self, segments: list[Segment]) -> None:
        """Transcribe complete segments. If turns are detected, each is an item."""
        for segment in segments:
            await self._note_start(segment)
            self.transcripts.request(self.item, segment.wave, self.prompt)
            if self.settings.turns is not None:
                self.ended = segment.start + len(segment.wave)
                await self._send(
                    "input_audio_buffer.speech_stopped",
                    item_id=self.item.id,
                    audio_end_ms=self.buffer.milliseconds(self.ended),
                )
                await self._end_item()

    async def _note_start(self, speech: Segment) -> None:
        """Report the start of speech, once for each item, if turns are detected."""
        if self.settings.turns is None or self.item.has_started:
            return
        self.item.has_started = True
        start = self.buffer.milliseconds(speech.start)
        await self._send(
            "input_audio_buffer.speech_started", item_id=self.item.id, audio_start_ms=start
        )

    async def _end_item(self) -> None:
        item = self.item
        self.item = SpeechItem()
        await self._send(
            "input_audio_buffer.committed", item_id=item.id, previous_item_id=self.previous_id
        )
        self.previous_id = item.id
        self.transcripts.end(item)

    async def _send_error(self, error: ApiError, event_id: str | None) -> None:
        await self._send("error", error=error.body()["error"] | {"event_id": event_id})

    async def _send(self, kind: str, **fields: object) -> None:
        if self.websocket.application_state is WebSocketState.DISCONNECTED:
            raise WebSocketDisconnect  # the other task has noticed it first
        event = {"type": kind, "event_id": f"event_{uuid.uuid4().hex}"} | fields
        await self.websocket.send_text(json.dumps(event))
