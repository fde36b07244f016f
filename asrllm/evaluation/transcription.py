"""Transcribe files of any length: decode the segments of all files in batches."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from asrllm.audio.segments import Segment, cut_segments
from asrllm.audio.vad import Detector
from asrllm.data.audio_file import AudioFile
from asrllm.data.audio_files import read_blocks
from asrllm.data.text import join_texts
from asrllm.defaults import RATE
from asrllm.errors import UserError
from asrllm.evaluation.engine import Engine, HalvingEngine
from asrllm.models.asr_llm.generation import Answer
from asrllm.models.asr_llm.parallel_batches import map_batches

SORTED = 2  # batches whose segments are sorted by length


@dataclass(frozen=True, kw_only=True)
class TextSegment:
    """The text of a segment.

    Attributes:
        start: start in the file, in seconds.
        end: end in the file, in seconds.
        text: what was recognized.
        end_reason: what ended the text, see generation.Answer.
        tokens: see generation.Answer.
        logprob: see generation.Answer.
        speech: see audio.segments.Segment.
    """

    start: float
    end: float
    text: str
    end_reason: str = "stop"
    tokens: Sequence[int] = ()
    logprob: float | None = None
    speech: float = 1.0


@dataclass(frozen=True, kw_only=True)
class FileTranscript:
    """The transcript of a file.

    Attributes:
        audio: the file.
        duration: seconds that were read.
        segments: segments in order.
        problem: the error message if the file could not be read completely.
    """

    audio: str
    duration: float
    segments: list[TextSegment]
    problem: str | None = None

    @property
    def text(self) -> str:
        """The text of all segments."""
        return join_texts(segment.text for segment in self.segments)


@dataclass(frozen=True, kw_only=True)
class EndOfFile:
    """Marks the end of a file in a stream of segments.

    Attributes:
        duration: seconds that were read.
        problem: the error message if the file could not be read completely.
    """

    duration: float
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """How to cut files into segments.

    Attributes:
        detector: returns a new detector for each file or stream. Its optional argument `group` is
            the number of frames that are evaluated together.
        longest: maximum number of samples of a segment.
    """

    detector: Callable[..., Detector]
    longest: int


StreamItem = tuple[AudioFile, Segment | EndOfFile]


def transcribe_files(
    engine: Engine,
    files: Iterable[AudioFile],
    segmentation: Segmentation,
    *,
    prompt: str,
    batch_size: int,
    advance: Callable[[float], None],
) -> Iterator[FileTranscript]:
    """Yield the transcript of each file in order.

    A corrupted file has a problem and no segments, and the other files are transcribed. Memory is
    limited to the waveforms of SORTED batches, however long the files are.

    Args:
        engine: decodes the segments.
        files: what to transcribe.
        segmentation: how to cut the files.
        prompt: prompt of every segment.
        batch_size: segments of a batch.
        advance: called with the seconds of audio that were processed since the previous call.
    """
    engine = HalvingEngine(engine)
    shortest = engine.limits[0]
    stream = itertools.chain.from_iterable(
        segments_of(file, shortest, segmentation) for file in files
    )
    texts: list[TextSegment] = []
    done = 0.0  # seconds of the file
    for window in windows(stream, SORTED * batch_size):
        segments = [item for _, item in window if isinstance(item, Segment)]
        answers = iter(decode_segments(engine, segments, prompt, batch_size))
        segments.clear()
        for file, item in window:
            if isinstance(item, Segment):
                texts.append(text_segment(item, next(answers)))
                advance(texts[-1].end - done)
                done = texts[-1].end
                continue
            length = item.duration
            if item.problem and file.seconds:
                length = file.seconds
            advance(length - done)
            yield FileTranscript(
                audio=file.path,
                duration=item.duration,
                segments=[] if item.problem else texts,
                problem=item.problem,
            )
            texts = []
            done = 0.0
        window.clear()  # frees the waveforms before the next ones are read


def text_segment(segment: Segment, answer: Answer) -> TextSegment:
    """Combine a segment with its answer."""
    start, end = segment.seconds
    return TextSegment(
        start=start,
        end=end,
        text=answer.text,
        end_reason=answer.end,
        tokens=answer.tokens,
        logprob=answer.logprob,
        speech=segment.speech,
    )


def segments_of(
    file: AudioFile,
    shortest: int,
    segmentation: Segmentation,
    check: Callable[[int], None] | None = None,
) -> Iterator[StreamItem]:
    """Yield the segments of a file while it is read, and then an EndOfFile.

    Args:
        file: the file.
        shortest: minimum number of samples that the model accepts.
        segmentation: how to cut the file.
        check: called with the number of samples that were read after each block. An error that it
            raises ends the reading, and is not a problem of the file unless it is a UserError.
    """
    samples = 0

    def counted_blocks() -> Iterator[np.ndarray]:
        nonlocal samples
        for block in read_blocks(file):
            samples += len(block)
            if check:
                check(samples)
            yield block
        if samples < shortest:
            raise too_short(file, samples / RATE, shortest)

    problem = None
    try:
        for segment in cut_segments(
            counted_blocks(),
            segmentation.detector(),
            shortest=shortest,
            longest=segmentation.longest,
        ):
            yield file, segment
    except UserError as error:
        problem = str(error)
    yield file, EndOfFile(duration=samples / RATE, problem=problem)


def too_short(file: AudioFile, seconds: float, shortest: int) -> UserError:
    """Return the error for a file with fewer samples than the model accepts."""
    return UserError(
        f"{file.path!r} has {1000 * seconds:.0f} ms of audio, but the model needs at least "
        f"{1000 * shortest / RATE:.0f} ms. Remove it."
    )


def windows(stream: Iterable[StreamItem], size: int) -> Iterator[list[StreamItem]]:
    """Divide a stream into windows of `size` segments, with the ends of files among them."""
    window: list[StreamItem] = []
    count = 0
    for file, item in stream:
        if isinstance(item, Segment):
            if count == size:
                yield window
                window = []
                count = 0
            count += 1
        window.append((file, item))
    if window:
        yield window


def decode_segments(
    engine: Engine, segments: list[Segment], prompt: str, batch_size: int
) -> list[Answer]:
    """Return the answers in the order of the segments, decoded in batches of similar length."""
    lengths = [len(segment.wave) for segment in segments]
    order = sorted(range(len(segments)), key=lambda i: -lengths[i])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def decode(batch: list[int]) -> list[Answer]:
        return engine.answer([segments[i].wave for i in batch], [prompt] * len(batch))

    answers: dict[int, Answer] = {}
    parallel = min(engine.parallel, len(batches))
    for batch, found in zip(batches, map_batches(decode, batches, parallel), strict=True):
        answers |= zip(batch, found, strict=True)
    return [answers[i] for i in range(len(segments))]
