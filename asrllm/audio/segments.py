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
    """

    start: int
    wave: np.ndarray

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

    def __init__(self, *, shortest: int, longest: int) -> None:
        """
        Args:
            shortest: minimum number of samples that the model accepts.
            longest: maximum number of samples that the model accepts.
        """
        self.fewest = math.ceil(shortest / FRAME) + 1  # the last frame of a file may be incomplete
        self.room = longest // FRAME - 2 * PADDING  # frames of speech in a segment
        assert self.room > 2 * PAUSE, longest
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
        return max(0, begin - max(PADDING, self.fewest))

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
        if self.end is not None and self.frames - self.end >= LONGEST_PAUSE:
            return self._close(self.end)
        if self.frames - self.begin < self.room:
            return []
        if self.end is not None:
            return self._close(self.end)
        return self._cut(self.begin)

    def _track_speech(self, probability: float) -> None:
        """Update where speech begins and ends; values between the thresholds change nothing."""
        if probability >= ENTER:
            if self.begin is None:
                self.begin = self.frames
                self.probabilities = []
            elif self.end is not None:
                self.pauses.append((self.end, self.frames))
            self.end = None
            self.quiet = None
        elif probability < LEAVE and self.begin is not None and self.end is None:
            if self.quiet is None:
                self.quiet = self.frames
            if self.frames + 1 - self.quiet >= PAUSE:
                self.end = self.quiet

    def _close(self, end: int) -> list[Span]:
        """Close the open segment, whose speech ends at `end`; return it unless it is a click."""
        assert self.begin is not None
        segments = []
        is_short = end - self.begin < FEWEST
        if not is_short or self.pauses or self.cut_in_speech:
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

    def _emit(self, begin: int, end: int, padding: int) -> Span:
        begin = max(begin - PADDING, self.previous_end)
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


def cut_segments(
    blocks: Iterable[np.ndarray], detector: Detector, *, shortest: int, longest: int
) -> Iterator[Segment]:
    """Yield the segments of a file.

    Memory is limited to one segment and the frames that the detector waits for.

    Args:
        blocks: (samples,) float32 at RATE, the blocks of one file.
        detector: a new detector.
        shortest: minimum number of samples that the model accepts.
        longest: maximum number of samples that the model accepts.
    """
    segmenter = Segmenter(shortest=shortest, longest=longest)
    buffer: np.ndarray = np.zeros(0, np.float32)
    offset = 0  # first sample of the buffer in the file

    def cut(segments: list[Span]) -> Iterator[Segment]:
        for begin, end in segments:
            wave = buffer[begin * FRAME - offset : end * FRAME - offset].copy()
            yield Segment(start=begin * FRAME, wave=wave)

    for block in blocks:
        buffer = np.concatenate([buffer, block])
        yield from cut(segmenter.push(detector(block)))
        unneeded = min(segmenter.needed * FRAME - offset, len(buffer))
        offset += unneeded
        buffer = buffer[unneeded:]
    yield from cut(segmenter.push(detector.finish()))
    yield from cut(segmenter.finish())
