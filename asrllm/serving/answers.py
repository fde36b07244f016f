"""Answers to requests, in the formats of OpenAI's API."""

import asyncio
import contextlib
import json
import logging
import zlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from asrllm.data.audio_file import AudioFile
from asrllm.data.text import join_texts
from asrllm.errors import UserError
from asrllm.evaluation.subtitles import TRANSCRIPT_WRITERS
from asrllm.evaluation.transcription import EndOfFile, FileTranscript, TextSegment
from asrllm.serving.api_errors import ApiError, invalid_audio, server_error
from asrllm.serving.chat import completion
from asrllm.serving.fields import TranscriptionFields
from asrllm.serving.transcriber import QueuePlace, Transcriber

UNDETERMINED = "und"  # ISO 639 code of an unknown language
logger = logging.getLogger(__name__)


async def transcript_of(
    transcriber: Transcriber, audio: AudioFile, place: QueuePlace, prompt: str
) -> FileTranscript:
    """Return the transcript of a whole file, and leave the queue."""
    texts: list[TextSegment] = []
    duration = 0.0
    with contextlib.closing(place):
        async for item in transcriber.segments(audio, place, prompt):
            if isinstance(item, EndOfFile):
                duration = item.duration
            else:
                texts.append(item)
    return FileTranscript(audio=audio.path, duration=duration, segments=texts)


async def chat_answer(
    transcriber: Transcriber, audio: AudioFile, place: QueuePlace, prompt: str
) -> Response:
    """Return the transcript of a file as a chat completion."""
    transcript = await transcript_of(transcriber, audio, place, prompt)
    is_cut = any(segment.end_reason == "limit" for segment in transcript.segments)
    return JSONResponse(completion(transcriber.name, transcript.text, is_cut=is_cut))


async def transcription(
    transcriber: Transcriber,
    audio: AudioFile,
    place: QueuePlace,
    prompt: str,
    fields: TranscriptionFields,
) -> Response:
    """Transcribe a file, and return the text in the requested format."""
    transcript = await transcript_of(transcriber, audio, place, prompt)
    form = fields.response_format
    if form == "json":
        usage = _usage(transcript.duration)
        return JSONResponse({"text": transcript.text, "usage": usage})
    if form == "verbose_json":
        return JSONResponse(_verbose(transcript, fields))
    if form == "text":
        return PlainTextResponse(transcript.text + "\n")
    return PlainTextResponse(TRANSCRIPT_WRITERS[form](transcript, fields.language))


def _usage(seconds: float) -> dict[str, Any]:
    return {"type": "duration", "seconds": round(seconds, 3)}


def _verbose(transcript: FileTranscript, fields: TranscriptionFields) -> dict[str, Any]:
    """Return a transcript as OpenAI's verbose_json."""
    language = "english" if fields.task == "translate" else fields.language
    segments: list[dict[str, Any]] = [
        {
            "id": number,
            "seek": 0,
            "start": round(segment.start, 3),
            "end": round(segment.end, 3),
            "text": segment.text,
            "tokens": list(segment.tokens),
            "temperature": 0.0,
            "avg_logprob": None if segment.logprob is None else round(segment.logprob, 4),
            "compression_ratio": _compression_ratio(segment.text),
            "no_speech_prob": round(1 - segment.speech, 4),
        }
        for number, segment in enumerate(transcript.segments)
    ]
    return {
        "task": fields.task,
        "language": language or UNDETERMINED,
        "duration": round(transcript.duration, 3),
        "text": transcript.text,
        "segments": segments,
        "usage": _usage(transcript.duration),
    }


def _compression_ratio(text: str) -> float:
    """Return how many times zlib shortens a text, as Whisper's decoder measures repetitions."""
    content = text.encode()
    return round(len(content) / len(zlib.compress(content)), 4)


class EventStream(StreamingResponse):
    """The text of a file as server-sent events, one for each segment."""

    def __init__(
        self, transcriber: Transcriber, audio: AudioFile, place: QueuePlace, prompt: str
    ) -> None:
        self.place = place
        items = transcriber.segments(audio, place, prompt)
        super().__init__(_events(items), media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, and leave the queue however that ends."""
        with contextlib.closing(self.place):
            await super().__call__(scope, receive, send)


async def _events(items: AsyncIterator[TextSegment | EndOfFile]) -> AsyncIterator[str]:
    texts: list[str] = []
    text = ""
    try:
        async for item in items:
            if isinstance(item, EndOfFile):
                yield _event({"type": "transcript.text.done", "text": text})
                continue
            texts.append(item.text)
            longer = join_texts(texts)
            delta = longer.removeprefix(text)
            text = longer
            times = {"start": round(item.start, 3), "end": round(item.end, 3)}
            yield _event({"type": "transcript.text.delta", "delta": delta} | times)
    except UserError as error:
        yield _event(invalid_audio(error).body())
    except ApiError as error:
        yield _event(error.body())
    except Exception:  # the status has been sent, so only an event and the log can report it
        logger.exception("a stream failed")
        yield _event(server_error().body())


def _event(fields: dict[str, Any]) -> str:
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"


async def unless_disconnected(request: Request, answer: "asyncio.Task[Response]") -> Response:
    """Wait for an answer, and cancel its task if the client disconnects."""

    async def disconnection() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.create_task(disconnection())
    try:
        await asyncio.wait([answer, watch], return_when=asyncio.FIRST_COMPLETED)
    finally:
        watch.cancel()
        if not answer.done():
            answer.cancel()
    if answer.cancelled() or not answer.done():
        return Response(status_code=499)  # the connection is closed, so nobody reads it
    return answer.result()
