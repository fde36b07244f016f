"""Transcribe the audio of one request while others are transcribed."""

import asyncio
import collections
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor

from asrllm.audio.segments import Segment
from asrllm.data.audio_file import AudioFile
from asrllm.data.audio_files import open_audio
from asrllm.defaults import RATE
from asrllm.errors import UserError
from asrllm.evaluation.engine import BatchEngine
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
from asrllm.serving.metrics import ServerMetrics

AHEAD = 16  # segments of a request that may wait for their texts; more stay in the file
READERS = 8  # files that are decoded at the same time
# bytes a second of audio whose header has no length, which is then corrected while it is read
GUESSED_RATE = 2000


class AbandonedError(Exception):
    """Nobody waits for the transcript any more."""


class Queue:
    """Counts the requests in progress and their audio, in any thread."""

    def __init__(self, max_seconds: float, metrics: ServerMetrics) -> None:
        """
        Args:
            max_seconds: seconds of audio above which a further request is rejected.
            metrics: counters of the server.
        """
        self.max_samples = round(max_seconds * RATE)
        self.metrics = metrics
        self.places: dict[QueuePlace, int] = {}  # samples of each request
        self.lock = threading.Lock()

    @property
    def samples(self) -> int:
        """Samples of all requests."""
        return sum(self.places.values())

    def is_full(self) -> bool:
        """Return whether not even one more second of audio would be admitted."""
        with self.lock:
            return self._exceeds(RATE)

    def enter(self, samples: int) -> "QueuePlace":
        """Return a place for a request.

        Raises:
            ApiError: too much audio is queued. A single request is always admitted.
        """
        with self.lock:
            if self._exceeds(samples):
                raise ApiError(
                    429,
                    f"{self.samples / RATE:.0f} s of audio are queued. Send the request again "
                    "later.",
                    kind="rate_limit_error",
                    code="queue_full",
                    headers={"Retry-After": "5"},
                )
            place = QueuePlace(self)
            self.places[place] = samples
            self._report()
        return place

    def grow(self, place: "QueuePlace", samples: int) -> None:
        """Count more samples for a request that is still in the queue."""
        with self.lock:
            if samples > self.places.get(place, samples):
                self.places[place] = samples
                self._report()

    def leave(self, place: "QueuePlace") -> None:
        """Count a request no longer."""
        with self.lock:
            self.places.pop(place, None)
            self._report()

    def _exceeds(self, samples: int) -> bool:
        return bool(self.places) and self.samples + samples > self.max_samples

    def _report(self) -> None:
        self.metrics.queued_seconds.set(self.samples / RATE)


class QueuePlace:
    """The place of a request in the queue, which counts its audio until it is closed."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue

    def grow(self, samples: int) -> None:
        """Count more samples if the audio is longer than its header says."""
        self.queue.grow(self, samples)

    def close(self) -> None:
        """Leave the queue. Closing it again has no effect."""
        self.queue.leave(self)


class Transcriber:
    """Transcribes audio files that arrive concurrently.

    Attributes:
        name: name of the model for clients.
        description: configuration of the model.
        queue: the requests in progress.
        metrics: counters of the server.
    """

    def __init__(
        self,
        name: str,
        engine: BatchEngine,
        description: AsrLlmConfig,
        segmentation: Segmentation,
        queue: Queue,
        *,
        batch_size: int,
        max_seconds: float,
        max_decoding_seconds: float,
    ) -> None:
        """
        Args:
            name: name of the model for clients.
            engine: decodes the segments.
            description: configuration of the model.
            segmentation: how to cut audio.
            queue: the requests in progress, of all models of the server.
            batch_size: maximum number of segments that are decoded together.
            max_seconds: maximum duration of a request's audio.
            max_decoding_seconds: how long a request may take.
        """
        self.name = name
        self.description = description
        self.queue = queue
        self.metrics = queue.metrics
        self.segmentation = segmentation
        self.shortest = engine.limits[0]
        self.max_seconds = max_seconds
        self.max_decoding_seconds = max_decoding_seconds
        self.batcher = Batcher(engine, batch_size=batch_size, metrics=queue.metrics)
        self.readers = ThreadPoolExecutor(READERS, "reader")
        self.is_closed = threading.Event()

    def close(self) -> None:
        """Stop reading, and end all threads after the batch in progress."""
        self.is_closed.set()
        self.readers.shutdown(cancel_futures=True)
        self.batcher.close()

    async def open(self, name: str, content: bytes) -> tuple[AudioFile, QueuePlace]:
        """Read the header of an audio file, and take a place in the queue for it.

        Args:
            name: its name in error messages.
            content: its bytes.

        Raises:
            UserError: it is not audio.
            ApiError: it is too long, or too much audio is queued.
        """
        loop = asyncio.get_running_loop()
        file = await loop.run_in_executor(self.readers, open_audio, name, content)
        seconds = file.seconds
        if seconds is None:
            seconds = min(len(content) / GUESSED_RATE, self.max_seconds)
        self._check_seconds(seconds)
        return file, self.queue.enter(round(seconds * RATE))

    def _check_seconds(self, seconds: float) -> None:
        if seconds > self.max_seconds:
            raise ApiError(
                413,
                f"the audio is longer than {self.max_seconds:g} s. Send a part of it.",
                param="file",
                code="audio_too_long",
            )

    async def _before(self, deadline: float, answer: "Future[Answer]") -> Answer:
        """Wait for an answer until the event loop's time is `deadline`.

        Raises:
            ApiError: it is not there by then, and will not be decoded.
        """
        remaining = deadline - asyncio.get_running_loop().time()
        try:
            return await asyncio.wait_for(asyncio.wrap_future(answer), remaining)
        except asyncio.TimeoutError as error:
            raise ApiError(
                503,
                f"the texts took longer than {self.max_decoding_seconds:g} s. Send a part of the "
                "audio, or send it when the server has less to do.",
                code="decoding_too_slow",
                headers={"x-should-retry": "false"},  # OpenAI's client tries again otherwise
            ) from error

    async def segments(
        self, file: AudioFile, place: QueuePlace, prompt: str
    ) -> AsyncIterator[TextSegment | EndOfFile]:
        """Yield the texts of an audio file's segments in order, and its end.

        If the iteration is abandoned, reading stops, and segments that are still queued are not
        decoded.

        Raises:
            UserError: the audio is corrupted.
            ApiError: it is too long, or the texts take too long.
        """
        is_abandoned = threading.Event()

        def check(samples: int) -> None:
            if is_abandoned.is_set() or self.is_closed.is_set():
                raise AbandonedError
            self._check_seconds(samples / RATE)
            place.grow(samples)

        stream = segments_of(file, self.shortest, self.segmentation, check)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.max_decoding_seconds
        pending: collections.deque[tuple[Segment, Future[Answer]]] = collections.deque()
        end: EndOfFile | None = None
        try:
            while end is None or pending:
                if end is None and len(pending) < AHEAD:
                    _, item = await loop.run_in_executor(self.readers, next, stream)
                    if isinstance(item, EndOfFile):
                        end = item
                    else:
                        pending.append((item, self.batcher.submit(item.wave, prompt)))
                    continue
                segment, answer = pending.popleft()
                yield text_segment(segment, await self._before(deadline, answer))
            if end.problem:
                raise UserError(end.problem)
            self.metrics.audio_seconds.inc(end.duration)
            yield end
        finally:
            is_abandoned.set()
            for _, answer in pending:
                answer.cancel()
