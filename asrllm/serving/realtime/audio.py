"""The audio of a live session: resampled, and cut into segments while it arrives."""

import numpy as np
import soxr

from asrllm.audio.segments import PAUSE, Segment, SegmentCutter, Segmenter
from asrllm.audio.vad import FRAME
from asrllm.defaults import RATE
from asrllm.evaluation.transcription import Segmentation
from asrllm.serving.realtime.events import PCM_RATE, ServerVad

LIVE_FRAMES_AT_ONCE = 4  # frames whose speech probabilities are computed together, 128 ms


class AudioBuffer:
    """Cuts the audio of a client into segments, until it is finished."""

    def __init__(
        self, segmentation: Segmentation, shortest: int, turns: ServerVad | None, offset: int
    ) -> None:
        """
        Args:
            segmentation: how files are cut.
            shortest: minimum number of samples that the model accepts.
            turns: where to end segments; None cuts the audio as a file.
            offset: samples of the session before this buffer.
        """
        self.offset = offset
        self.samples = 0  # that were pushed, at RATE
        self.resampler = soxr.ResampleStream(PCM_RATE, RATE, 1, dtype="float32")
        detector = segmentation.detector(group=LIVE_FRAMES_AT_ONCE)
        segmenter = _segmenter(shortest, segmentation.longest, turns)
        self.cutter = SegmentCutter(detector, segmenter)

    def push(self, pcm: np.ndarray) -> tuple[list[Segment], Segment | None]:
        """Take the next samples, (samples,) float32 at PCM_RATE.

        Returns:
            The segments that are complete, and the speech so far of the next one, or None.
        """
        segments = self._push(self.resampler.resample_chunk(pcm))
        return segments, self.cutter.open_segment()

    def finish(self) -> list[Segment]:
        """Return the remaining segments at the end of the buffer."""
        empty: np.ndarray = np.zeros(0, np.float32)
        segments = self._push(self.resampler.resample_chunk(empty, last=True))
        return segments + self.cutter.finish()

    def milliseconds(self, sample: int) -> int:
        """Return the time of a sample of the buffer since the start of the session."""
        return 1000 * (self.offset + sample) // RATE

    def _push(self, wave: np.ndarray) -> list[Segment]:
        self.samples += len(wave)
        return self.cutter.push(wave)


def _segmenter(shortest: int, longest: int, turns: ServerVad | None) -> Segmenter:
    if turns is None:
        return Segmenter(shortest=shortest, longest=longest)
    return Segmenter(
        shortest=shortest,
        longest=longest,
        enter=turns.threshold,
        prefix=_frames(turns.prefix_padding_ms),
        pause=max(PAUSE, _frames(turns.silence_duration_ms)),
    )


def _frames(milliseconds: int) -> int:
    return round(milliseconds * RATE / 1000 / FRAME)
