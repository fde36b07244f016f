"""Transcribing files of any length: segments of all of them through an engine in batches, transcripts file by file."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from asrllm.audio.segments import Segment, cut_segments
from asrllm.audio.stream import AudioFile, read_blocks
from asrllm.audio.vad import Detector
from asrllm.data.index import RATE
from asrllm.data.text import join_texts
from asrllm.errors import UserError
from asrllm.evaluation.engine import Engine, WithinMemory
from asrllm.models.asr_llm.generation import Answer

SORTED = 2  # batches whose segments are sorted by length


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """What was said from `start` to `end`, in seconds; end_reason: of the text, as Answer.end."""

    start: float
    end: float
    text: str
    end_reason: str = "stop"


@dataclass(frozen=True, kw_only=True)
class FileTranscript:
    """duration: seconds that were read; problem: why the file could not be read to its end, in a sentence."""

    audio: str
    duration: float
    segments: list[Spoken]
    problem: str | None = None

    @property
    def text(self) -> str:
        return join_texts(spoken.text for spoken in self.segments)


@dataclass(frozen=True, kw_only=True)
class EndOfFile:
    duration: float
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Listening:
    """How files become segments. detector: makes a new one for each file; longest: samples of a segment."""

    detector: Callable[[], Detector]
    longest: int


Heard = tuple[AudioFile, Segment | EndOfFile]


def transcribe_files(
    engine: Engine,
    files: Iterable[AudioFile],
    listening: Listening,
    *,
    prompt: str,
    batch_size: int,
    advance: Callable[[float], None],
) -> Iterator[FileTranscript]:
    """A transcript for each file, in order; one that is damaged has a problem and no segments, and the others go on.

    Held are the waveforms of SORTED batches, however long the files are. advance: told of seconds of audio that are done.
    """
    engine = WithinMemory(engine)
    heard = itertools.chain.from_iterable(
        listen(file, engine.limits[0], listening) for file in files
    )
    spoken: list[Spoken] = []
    done = 0.0  # seconds of the file
    for window in windows(heard, SORTED * batch_size):
        answers = iter(
            answer(
                engine,
                [item for _, item in window if isinstance(item, Segment)],
                prompt,
                batch_size,
            )
        )
        for file, item in window:
            if isinstance(item, Segment):
                start, end = item.seconds
                found = next(answers)
                spoken.append(Spoken(start=start, end=end, text=found.text, end_reason=found.end))
                advance(end - done)
                done = end
            else:
                advance((file.seconds if item.problem and file.seconds else item.duration) - done)
                segments = [] if item.problem else spoken
                yield FileTranscript(
                    audio=file.path, duration=item.duration, segments=segments, problem=item.problem
                )
                spoken, done = [], 0.0
        window.clear()  # the waveforms go before the next are read


def listen(file: AudioFile, shortest: int, listening: Listening) -> Iterator[Heard]:
    """The segments of a file as they are read, and its end."""
    samples = 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal samples
        for block in read_blocks(file):
            samples += len(block)
            yield block
        if samples < shortest:
            raise too_short(file, samples / RATE, shortest)

    problem = None
    try:
        for segment in cut_segments(
            counted(), listening.detector(), shortest=shortest, longest=listening.longest
        ):
            yield file, segment
    except UserError as error:
        problem = str(error)
    yield file, EndOfFile(duration=samples / RATE, problem=problem)


def too_short(file: AudioFile, seconds: float, shortest: int) -> UserError:
    return UserError(
        f"{file.path!r} has {seconds:.2f} s of audio, the model takes {shortest / RATE:.2f} s at least: leave it out"
    )


def windows(heard: Iterable[Heard], segments: int) -> Iterator[list[Heard]]:
    """Stretches that hold so many segments, and the ends of files among and behind them."""
    window: list[Heard] = []
    count = 0
    for file, item in heard:
        if isinstance(item, Segment) and count == segments:
            yield window
            window, count = [], 0
        window.append((file, item))
        count += isinstance(item, Segment)
    if window:
        yield window


def answer(engine: Engine, segments: list[Segment], prompt: str, batch_size: int) -> list[Answer]:
    """The engine's answers in the order of the segments; it hears those of like length together."""
    order = sorted(range(len(segments)), key=lambda i: -len(segments[i].wave))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        found = engine.answer([segments[i].wave for i in batch], [prompt] * len(batch))
        answers |= zip(batch, found, strict=True)
    return [answers[i] for i in range(len(segments))]
