"""Transcribe the audio of one request while others are transcribed."""

import asyncio
import collections
import contextlib
import functools
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future

from asrllm.audio.segments import Segment
from asrllm.data.audio_files import AudioFile, open_audio
from asrllm.errors import UserError
from asrllm.evaluation.engine import Engine
from asrllm.evaluation.transcription import (
    EndOfFile,
    Segmentation,
    TextSegment,
    segments_of,
    text_segment,
)
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.generation import Answer
from asrllm.serving.api_errors import ApiError
from asrllm.serving.batcher import Batcher
from asrllm.serving.metrics import Metrics

AHEAD = 16  # segments of a request that may wait for their texts; more stay in the file


class Transcriber:
    """Transcribes audio files that arrive concurrently.

    Attributes:
        description: configuration of the model.
        metrics: counters of the server.
    """

    def __init__(
        self,
        engine: Engine,
        description: AsrLlmConfig,
        segmentation: Segmentation,
        metrics: Metrics,
        *,
        batch_size: int,
        max_seconds: float,
        max_queued_seconds: float,
    ) -> None:
        """
        Args:
            engine: decodes the segments.
            description: configuration of the model.
            segmentation: how to cut audio.
            metrics: counters of the server.
            batch_size: maximum number of segments that are decoded together.
            max_seconds: maximum duration of a request's audio.
            max_queued_seconds: seconds of audio of all requests in progress, above which a further
                request is refused.
        """
        self.description = description
        self.metrics = metrics
        self.segmentation = segmentation
        self.shortest = engine.limits[0]
        self.max_seconds = max_seconds
        self.max_queued_seconds = max_queued_seconds
        self.queued_seconds = 0.0
        self.batcher = Batcher(engine, batch_size=batch_size, metrics=metrics)

    async def open(self, name: str, content: bytes) -> AudioFile:
        """Read the header of an audio file.

        Args:
            name: its name in error messages.
            content: its bytes.

        Raises:
            UserError: it is not audio.
            ApiError: it is too long.
        """
        file = await asyncio.to_thread(open_audio, name, content)
        self._check_seconds(file.seconds or 0.0)
        return file

    def _check_seconds(self, seconds: float) -> None:
        if seconds > self.max_seconds:
            raise ApiError(
                413,
                f"the audio has {seconds:.0f} s. Send at most {self.max_seconds:g} s.",
                param="file",
                code="audio_too_long",
            )

    def is_full(self) -> bool:
        """Return whether the queue has no room for another second of audio."""
        return self.queued_seconds >= self.max_queued_seconds

    @contextlib.contextmanager
    def admitted(self, file: AudioFile) -> Iterator[None]:
        """Count the audio of a request as queued until the block ends.

        Raises:
            ApiError: too much audio is queued. A single request is always admitted.
        """
        seconds = file.seconds or 0.0
        if self.queued_seconds and self.queued_seconds + seconds > self.max_queued_seconds:
            raise ApiError(
                429,
                f"{self.queued_seconds:.0f} s of audio are queued. Send the request again later.",
                kind="server_error",
                code="queue_full",
                headers={"Retry-After": "5"},
            )
        self._count_queued(seconds)
        try:
            yield
        finally:
            self._count_queued(-seconds)

    def _count_queued(self, seconds: float) -> None:
        self.queued_seconds = max(self.queued_seconds + seconds, 0.0)
        self.metrics.queued_seconds.set(self.queued_seconds)

    async def segments(
        self, file: AudioFile, prompt: str
    ) -> AsyncIterator[TextSegment | EndOfFile]:
        """Yield the texts of an audio file's segments in order, and its end.

        If the iteration is abandoned, segments that are still queued are not decoded.

        Raises:
            UserError: the audio is corrupted.
            ApiError: it is too long.
        """
        stream = segments_of(file, self.shortest, self.segmentation)
        pending: collections.deque[tuple[Segment, Future[Answer]]] = collections.deque()
        end: EndOfFile | None = None
        try:
            while end is None or pending:
                if end is None and len(pending) < AHEAD:
                    _, item = await asyncio.to_thread(functools.partial(next, stream))
                    if isinstance(item, EndOfFile):
                        end = item
                    else:
                        self._check_seconds(item.seconds[1])
                        pending.append((item, self.batcher.submit(item.wave, prompt)))
                    continue
                segment, answer = pending.popleft()
                yield text_segment(segment, await asyncio.wrap_future(answer))
            if end.problem:
                raise UserError(end.problem)
            self.metrics.audio_seconds.inc(end.duration)
            yield end
        finally:
            for _, answer in pending:
                answer.cancel()
