"""Requests the texts of a live session from the model, and sends them in the order of the audio."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from asrllm.defaults import RATE
from asrllm.errors import UserError
from asrllm.models.asr_llm.generation import Answer
from asrllm.serving.api_errors import ApiError, invalid_audio, server_error
from asrllm.serving.realtime.items import SpeechItem, agreed_text
from asrllm.serving.transcriber import Transcriber

PARTIAL = RATE  # samples of further speech after which a partial text is requested

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Request:
    """A request for the text of a segment, or of the speech so far. Without answer: the end."""

    item: SpeechItem
    answer: "Future[Answer] | None" = None
    samples: int = 0
    is_partial: bool = False


class Transcripts:
    """The texts of a live session."""

    def __init__(
        self,
        transcriber: Transcriber,
        send: Callable[..., Awaitable[None]],
        count: Callable[[int], None],
    ) -> None:
        """
        Args:
            transcriber: decodes the audio.
            send: sends an event, given its type and fields.
            count: called with the samples of a segment, and with their negative when it is done.
        """
        self.transcriber = transcriber
        self.send = send
        self.count = count
        self.requests: asyncio.Queue[_Request | None] = asyncio.Queue()
        self.waiting: dict[Future[Answer], SpeechItem] = {}
        self.partial: Future[Answer] | None = None  # the last partial text
        self.heard = 0  # samples of the open segment when it was requested

    def use(self, transcriber: Transcriber) -> None:
        """Decode further audio with another model."""
        self.transcriber = transcriber

    def request_partial(self, item: SpeechItem, wave: np.ndarray, prompt: str) -> None:
        """Request the text of the speech so far, unless the last request was a moment ago."""
        is_waiting = self.partial is not None and not self.partial.done()
        if is_waiting or len(wave) < max(self.heard + PARTIAL, self.transcriber.shortest):
            return
        self.heard = len(wave)
        self.partial = self._submit(wave, prompt, item)
        self.requests.put_nowait(_Request(item=item, answer=self.partial, is_partial=True))

    def request(self, item: SpeechItem, wave: np.ndarray, prompt: str) -> None:
        """Request the text of a complete segment."""
        if self.partial is not None:
            self.partial.cancel()
        self.heard = 0
        self.count(len(wave))
        padding = max(0, self.transcriber.shortest - len(wave))
        answer = self._submit(np.pad(wave, (0, padding)), prompt, item)
        self.requests.put_nowait(_Request(item=item, answer=answer, samples=len(wave)))

    def _submit(self, wave: np.ndarray, prompt: str, item: SpeechItem) -> "Future[Answer]":
        answer = self.transcriber.batcher.submit(wave, prompt)
        self.waiting[answer] = item
        return answer

    def end(self, item: SpeechItem) -> None:
        """Send the whole text of an item after the texts of its segments."""
        self.requests.put_nowait(_Request(item=item))

    def discard(self, item: SpeechItem) -> None:
        """Send nothing more of an item."""
        item.is_discarded = True
        self.heard = 0
        for answer, owner in self.waiting.items():
            if owner is item:
                answer.cancel()

    def close(self) -> None:
        """End `run` after the texts that were requested so far."""
        self.requests.put_nowait(None)

    def cancel(self) -> None:
        """Request nothing any more of what is not being decoded yet."""
        for answer in self.waiting:
            answer.cancel()

    async def run(self) -> None:
        """Send the texts until `close`."""
        while (request := await self.requests.get()) is not None:
            if request.answer is None:
                await self._send_whole(request.item)
                continue
            found = asyncio.wrap_future(request.answer)
            await asyncio.wait([found])  # unlike `await found`, it does not raise its cancellation
            del self.waiting[request.answer]
            self.count(-request.samples)
            if found.cancelled() or request.item.is_discarded:
                continue
            error = found.exception()
            if error is None:
                await self._send_delta(request, found.result().text)
            elif not request.is_partial:
                request.item.error = error

    async def _send_delta(self, request: _Request, text: str) -> None:
        item = request.item
        if request.is_partial:
            delta = item.delta(agreed_text(item.hypothesis, text))
            item.hypothesis = text
        else:
            item.samples += request.samples
            item.texts.append(text)
            item.hypothesis = ""
            delta = item.delta()
        if delta:
            await self._send(item, "delta", delta=delta)

    async def _send_whole(self, item: SpeechItem) -> None:
        if item.error is not None:
            await self._send(item, "failed", error=_api_error(item.error).body()["error"])
            return
        seconds = item.samples / RATE
        self.transcriber.metrics.audio_seconds.inc(seconds)
        usage = {"type": "duration", "seconds": round(seconds, 3)}
        await self._send(item, "completed", transcript=item.text, usage=usage)

    async def _send(self, item: SpeechItem, kind: str, **fields: object) -> None:
        name = f"conversation.item.input_audio_transcription.{kind}"
        await self.send(name, item_id=item.id, content_index=0, **fields)


def _api_error(error: BaseException) -> ApiError:
    if isinstance(error, UserError):
        return invalid_audio(error)
    logger.error("a segment was not transcribed", exc_info=error)
    return server_error()
