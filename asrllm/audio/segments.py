"""Long audio in segments that a model takes: speech by itself, cut where nobody speaks."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from asrllm.audio.vad import FRAME, Detector
from asrllm.data.index import RATE

ENTER, LEAVE = (
    0.5,
    0.35,
)  # the probability from which on there is speech, and that below which it is over
# in frames of 32 ms
PAUSE = 3  # fewer quiet ones within speech are none
LONGEST_PAUSE = (
    62  # a longer one ends a segment: in silence there is nothing to hear, and something to make up
)
PADDING = 8  # of a segment's edges, within the pause
FEWEST = 3  # speech by itself that is shorter is a click
SMOOTH = 5  # over which the least probability is looked for, where there is no pause


@dataclass(frozen=True, kw_only=True)
class Segment:
    """start: its first sample in the file; wave: (samples,) float32 at RATE."""

    start: int
    wave: np.ndarray

    @property
    def seconds(self) -> tuple[float, float]:
        return self.start / RATE, (self.start + len(self.wave)) / RATE


class Segmenter:
    """Probabilities of speech, frame by frame -> segments (first frame, frame after the last), in order and apart from one another.

    Speech is joined until the next frame would not fit; then the segment is cut at the longest pause in its second half, else at its
    longest pause, else at the frame of least probability in its second half. A segment that is too short is widened into what is around
    it, which alone can make two overlap. shortest, longest: samples that the model takes.
    """

    def __init__(self, *, shortest: int, longest: int) -> None:
        self.fewest = math.ceil(shortest / FRAME) + 1  # the file's last frame may not be whole
        self.room = longest // FRAME - 2 * PADDING  # frames of speech in a segment
        assert self.room > 2 * PAUSE, longest
        self.frames = 0
        self.begin: int | None = None  # of the segment that is open
        self.end: int | None = None  # of its speech so far, where nobody speaks
        self.quiet: int | None = None  # first frame of what may become a pause
        self.pauses: list[tuple[int, int]] = []  # within the segment
        self.probabilities: list[float] = []  # since `begin`
        self.told = 0  # where the last segment ended, with its padding
        self.torn = False  # the open segment begins in the middle of speech

    @property
    def needed(self) -> int:
        """The first frame that a later segment may hold."""
        begin = self.frames if self.begin is None else self.begin
        return max(0, begin - max(PADDING, self.fewest))

    def push(self, probabilities: Iterable[float]) -> list[tuple[int, int]]:
        return [segment for p in probabilities for segment in self._push(float(p))]

    def finish(self) -> list[tuple[int, int]]:
        if self.begin is None:
            return []
        return self._close(self.end or self.quiet or self.frames)

    def _push(self, p: float) -> list[tuple[int, int]]:
        self._listen(p)
        self.frames += 1
        if self.begin is None:
            return []
        self.probabilities.append(p)
        if self.end is not None and self.frames - self.end >= LONGEST_PAUSE:
            return self._close(self.end)
        if self.frames - self.begin < self.room:
            return []
        return self._close(self.end) if self.end is not None else self._cut(self.begin)

    def _listen(self, p: float) -> None:
        """Follow where speech begins and ends; frames between the two thresholds change nothing."""
        if p >= ENTER:
            if self.begin is None:
                self.begin, self.probabilities = self.frames, []
            elif self.end is not None:
                self.pauses.append((self.end, self.frames))
            self.end = self.quiet = None
        elif p < LEAVE and self.begin is not None and self.end is None:
            if self.quiet is None:
                self.quiet = self.frames
            if self.frames + 1 - self.quiet >= PAUSE:
                self.end = self.quiet

    def _close(self, end: int) -> list[tuple[int, int]]:
        """The open segment, whose speech ends at `end`; none is open then."""
        assert self.begin is not None
        is_click = end - self.begin < FEWEST and not self.pauses and not self.torn
        segments = (
            []
            if is_click
            else [self._tell(self.begin, end, min(PADDING, (self.frames - end) // 2))]
        )
        self.begin = self.end = self.quiet = None
        self.pauses, self.torn = [], False
        return segments

    def _cut(self, begin: int) -> list[tuple[int, int]]:
        """The first part of a segment that is full while somebody speaks; the rest is open."""
        middle = begin + self.room // 2
        if pauses := [pause for pause in self.pauses if pause[1] > middle] or self.pauses:
            end, after = max(pauses, key=lambda pause: (pause[1] - pause[0], pause[0]))
        else:
            end = after = middle + least(self.probabilities[middle - begin :])
            if (
                self.quiet is not None and end >= self.quiet
            ):  # a pause begins there, of which too little is known
                return self._close(self.quiet)
        segment = self._tell(begin, end, min(PADDING, (after - end) // 2))
        self.begin, self.torn = after, end == after
        self.pauses = [pause for pause in self.pauses if pause[0] > end]
        self.probabilities = self.probabilities[after - begin :]
        return [segment]

    def _tell(self, begin: int, end: int, padding: int) -> tuple[int, int]:
        begin, end = max(begin - PADDING, self.told), end + padding
        self.told = end
        end = min(max(end, begin + self.fewest), self.frames)
        return max(0, min(begin, end - self.fewest)), end


def least(probabilities: list[float]) -> int:
    """The place of the frame that is least of all speech, with those around it."""
    around = np.convolve(
        np.pad(probabilities, SMOOTH // 2, mode="edge"), np.ones(SMOOTH), mode="valid"
    )
    return int(around.argmin())


def cut_segments(
    blocks: Iterable[np.ndarray], detector: Detector, *, shortest: int, longest: int
) -> Iterator[Segment]:
    """blocks: of one file, (samples,) float32 at RATE. No more of it is held than a segment and what the detector waits for."""
    segmenter = Segmenter(shortest=shortest, longest=longest)
    held: np.ndarray = np.zeros(0, np.float32)
    first = 0  # the sample at which `held` begins

    def cut(segments: list[tuple[int, int]]) -> Iterator[Segment]:
        for begin, end in segments:
            yield Segment(
                start=begin * FRAME, wave=held[begin * FRAME - first : end * FRAME - first].copy()
            )

    for block in blocks:
        held = np.concatenate([held, block])
        yield from cut(segmenter.push(detector(block)))
        unneeded = min(segmenter.needed * FRAME - first, len(held))
        first, held = first + unneeded, held[unneeded:]
    yield from cut(segmenter.push(detector.finish()))
    yield from cut(segmenter.finish())
