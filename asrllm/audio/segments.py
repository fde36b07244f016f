"""Cut long audio into segments of speech that fit a model, at pauses if there are any."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from asrllm.audio.vad import FRAME, Detector
from asrllm.defaults import RATE

ENTER = 0.5  # speech begins at this probability
LEAVE = 0.35  # speech ends below this probability
# numbers of frames of 32 ms
PAUSE = 3  # fewer quiet frames within speech do not form a pause
LONGEST_PAUSE = 62  # ends a segment: in long silence, models hallucinate
PADDING = 8  # added at both edges of a segment, within the pause
FEWEST = 3  # shorter speech between two silences is a click
SMOOTH = 5  # window of the search for the least probable speech, if there is no pause

Span = tuple[int, int]  # first frame and the frame after the last


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of an audio file.

    Attributes:
        start: its first sample in the file.
        wave: (samples,) float32 at RATE.
        speech: highest probability of speech in its frames.
    """

    start: int
    wave: np.ndarray
    speech: float

    @property
    def seconds(self) -> tuple[float, float]:
        """Start and end in the file."""
        return self.start / RATE, (self.start + len(self.wave)) / RATE


class Segmenter:
    """Turns speech probabilities of frames into the spans of segments.

    Segments are in order and do not overlap. Speech is joined until the next frame would not fit.
    The segment is then cut at the longest pause in its second half, else at its longest pause, else
    at the least probable frame in its second half. A segment that is too short is extended into the
    audio around it. Only then two segments can overlap.

    silero_vad's `get_speech_timestamps_from_probs` is not used: it returns nothing before the end
    of the file, which would keep 230 MB of samples per hour in memory, and it cuts speech without
    a pause wherever the limit is. On ten minutes of synthetic speech, none of its edges were in the
    middle of speech with a limit of 28 s, 4 of 130 with 15 s, and 24 of 220 with 8 s. None of ours
    were with any of these limits.
    """

    def __init__(
        self,
        *,
        shortest: int,
        longest: int,
        enter: float = ENTER,
        prefix: int = PADDING,
        pause: int = LONGEST_PAUSE,
    ) -> None:
        """
        Args:
            shortest: minimum number of samples that the model accepts.
            longest: maximum number of samples that the model accepts.
            enter: probability at which speech begins.
            prefix: frames added before the speech of a segment.
            pause: frames of silence that end a segment.
        """
        self.fewest = math.ceil(shortest / FRAME) + 1  # the last frame of a file may be incomplete
        self.room = longest // FRAME - prefix - PADDING  # frames of speech in a segment
        assert self.room > 2 * PAUSE, longest
        self.enter = enter
        self.leave = enter - (ENTER - LEAVE)
        self.prefix = prefix
        self.pause = pause
        self.frames = 0
        self.begin: int | None = None  # start of the open segment
        self.end: int | None = None  # end of its speech so far, during a pause
        self.quiet: int | None = None  # first frame of a possible pause
        self.pauses: list[Span] = []  # within the open segment
        self.probabilities: list[float] = []  # since `begin`
        self.previous_end = 0  # end of the previous segment with its padding
        self.cut_in_speech = False  # whether the open segment begins in the middle of speech

    @property
    def needed(self) -> int:
        """The first frame that a later segment may contain."""
        begin = self.frames if self.begin is None else self.begin
        return max(0, begin - max(self.prefix, self.fewest))

    @property
    def open_span(self) -> Span | None:
        """The open segment up to the end of its speech so far, None while it may be a click."""
        if self.begin is None:
            return None
        end = self.end or self.quiet or self.frames
        if self._is_click(self.begin, end):
            return None
        return max(0, self.begin - self.prefix, self.previous_end), end

    def push(self, probabilities: Iterable[float]) -> list[Span]:
        """Take the probabilities of the next frames and return the segments that are complete."""
        segments: list[Span] = []
        for probability in probabilities:
            segments += self._push(float(probability))
        return segments

    def finish(self) -> list[Span]:
        """Return the last segment, if one is open."""
        if self.begin is None:
            return []
        return self._close(self.end or self.quiet or self.frames)

    def _push(self, probability: float) -> list[Span]:
        self._track_speech(probability)
        self.frames += 1
        if self.begin is None:
            return []
        self.probabilities.append(probability)
        if self.end is not None and self.frames - self.end >= self.pause:
            return self._close(self.end)
        if self.frames - self.begin < self.room:
            return []
        if self.end is not None:
            return self._close(self.end)
        return self._cut(self.begin)

    def _track_speech(self, probability: float) -> None:
        """Update where speech begins and ends; values between the thresholds change nothing."""
        if probability >= self.enter:
            if self.begin is None:
                self.begin = self.frames
                self.probabilities = []
            elif self.end is not None:
                self.pauses.append((self.end, self.frames))
            self.end = None
            self.quiet = None
        elif probability < self.leave and self.begin is not None and self.end is None:
            if self.quiet is None:
                self.quiet = self.frames
            if self.frames + 1 - self.quiet >= PAUSE:
                self.end = self.quiet

    def _close(self, end: int) -> list[Span]:
        """Close the open segment, whose speech ends at `end`; return it unless it is a click."""
        assert self.begin is not None
        segments = []
        if not self._is_click(self.begin, end):
            padding = min(PADDING, (self.frames - end) // 2)
            segments.append(self._emit(self.begin, end, padding))
        self.begin = None
        self.end = None
        self.quiet = None
        self.pauses = []
        self.cut_in_speech = False
        return segments

    def _cut(self, begin: int) -> list[Span]:
        """Return the first part of a segment that became full during speech; the rest is open."""
        middle = begin + self.room // 2
        pauses = [pause for pause in self.pauses if pause[1] > middle]
        pauses = pauses or self.pauses
        if pauses:
            end, after = max(pauses, key=_length_then_start)
        else:
            end = middle + least_probable(self.probabilities[middle - begin :])
            after = end
            if self.quiet is not None and end >= self.quiet:
                return self._close(self.quiet)  # a pause may begin there
        segment = self._emit(begin, end, min(PADDING, (after - end) // 2))
        self.begin = after
        self.cut_in_speech = end == after
        self.pauses = [pause for pause in self.pauses if pause[0] > end]
        self.probabilities = self.probabilities[after - begin :]
        return [segment]

    def _is_click(self, begin: int, end: int) -> bool:
        return end - begin < FEWEST and not self.pauses and not self.cut_in_speech

    def _emit(self, begin: int, end: int, padding: int) -> Span:
        begin = max(begin - self.prefix, self.previous_end)
        end += padding
        self.previous_end = end
        end = min(max(end, begin + self.fewest), self.frames)
        return max(0, min(begin, end - self.fewest)), end


def _length_then_start(pause: Span) -> tuple[int, int]:
    begin, end = pause
    return end - begin, begin


def least_probable(probabilities: list[float]) -> int:
    """Return the frame that is least probably speech, averaged with its neighbours."""
    extended = np.pad(probabilities, SMOOTH // 2, mode="edge")
    smoothed = np.convolve(extended, np.ones(SMOOTH), mode="valid")
    return int(smoothed.argmin())


class SegmentCutter:
    """Cuts a stream of samples into segments while it arrives.

    Memory is limited to one segment and the frames that the detector waits for.
    """

    def __init__(self, detector: Detector, segmenter: Segmenter) -> None:
        """
        Args:
            detector: a new detector.
            segmenter: a new segmenter.
        """
        self.detector = detector
        self.segmenter = segmenter
        self.buffer: np.ndarray = np.zeros(0, np.float32)
        self.offset = 0  # first sample of the buffer in the stream
        self.probabilities: np.ndarray = np.zeros(0, np.float32)  # of the frames in the buffer

    def push(self, block: np.ndarray) -> list[Segment]:
        """Take the next samples, (samples,) float32 at RATE, and return the complete segments."""
        self.buffer = np.concatenate([self.buffer, block])
        segments = self._cut(self._spans(self.detector(block)))
        unneeded = min(self.segmenter.needed * FRAME - self.offset, len(self.buffer))
        self.offset += unneeded
        self.buffer = self.buffer[unneeded:]
        self.probabilities = self.probabilities[unneeded // FRAME :]
        return segments

    def finish(self) -> list[Segment]:
        """Return the remaining segments at the end of the stream."""
        spans = self._spans(self.detector.finish())
        return self._cut(spans + self.segmenter.finish())

    def open_segment(self) -> Segment | None:
        """Return the segment that is not complete yet, or None if there is none."""
        span = self.segmenter.open_span
        return None if span is None else self._cut([span])[0]

    def _spans(self, probabilities: np.ndarray) -> list[Span]:
        self.probabilities = np.concatenate([self.probabilities, probabilities])
        return self.segmenter.push(probabilities)

    def _cut(self, spans: list[Span]) -> list[Segment]:
        segments = []
        first = self.offset // FRAME
        for begin, end in spans:
            wave = self.buffer[begin * FRAME - self.offset : end * FRAME - self.offset].copy()
            speech = float(self.probabilities[begin - first : end - first].max())
            segments.append(Segment(start=begin * FRAME, wave=wave, speech=speech))
        return segments


def cut_segments(
    blocks: Iterable[np.ndarray], detector: Detector, *, shortest: int, longest: int
) -> Iterator[Segment]:
    """Yield the segments of a file.

    Args:
        blocks: (samples,) float32 at RATE, the blocks of one file.
        detector: a new detector.
        shortest: minimum number of samples that the model accepts.
        longest: maximum number of samples that the model accepts.
    """
    cutter = SegmentCutter(detector, Segmenter(shortest=shortest, longest=longest))
    for block in blocks:
        yield from cutter.push(block)
    yield from cutter.finish()
