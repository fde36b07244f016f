"""Segments of long audio: properties on given probabilities, and results on synthetic speech."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asrllm.audio.segments import (
    ENTER,
    FEWEST,
    LEAVE,
    LONGEST_PAUSE,
    PADDING,
    PAUSE,
    Segmenter,
    cut_segments,
)
from asrllm.audio.vad import FRAME, Loudness, Silero, load_silero
from asrllm.testing import tone, vowels

LONGEST = 60  # frames of a segment, 44 of them for speech


class FirstSampleDetector:
    """A detector whose probability of a frame is the first sample of the frame."""

    def __init__(self):
        self.rest = np.zeros(0, np.float32)

    def __call__(self, samples):
        self.rest = np.concatenate([self.rest, samples])
        whole = len(self.rest) // FRAME * FRAME
        frames, self.rest = self.rest[:whole], self.rest[whole:]
        return frames.reshape(-1, FRAME)[:, 0]

    def finish(self):
        return self.rest[:1]


def segments(probabilities, shortest=1, longest=LONGEST * FRAME):
    segmenter = Segmenter(shortest=shortest, longest=longest)
    return segmenter.push(probabilities) + segmenter.finish()


def runs(*lengths):
    """Alternate between silence and speech, beginning with silence."""
    probabilities = []
    for i, length in enumerate(lengths):
        probabilities += [0.9 if i % 2 else 0.1] * length
    return probabilities


probability = st.sampled_from([0.05, 0.2, LEAVE, 0.4, ENTER, 0.7, 1.0])
stretches = st.lists(st.tuples(probability, st.integers(1, 90)), max_size=12).map(
    lambda parts: [p for p, n in parts for _ in range(n)]
)


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(stretches, st.integers(1, 20 * FRAME), st.integers(1, 50))
def test_segments_are_ordered_and_disjoint_and_contain_all_speech_within_the_limits(
    probabilities, shortest, block
):
    found = segments(probabilities)
    total = len(probabilities)
    assert all(0 <= begin < end <= total for begin, end in found)
    for (_, before), (begin, end) in itertools.pairwise(found):
        assert before <= begin or end - begin == 2  # 2: extended to the shortest length
    assert all(end - begin <= LONGEST for begin, end in found)
    inside = {i for begin, end in found for i in range(begin, end)}
    for speech, frames in itertools.groupby(range(total), key=lambda i: probabilities[i] >= ENTER):
        frames = list(frames)
        assert not speech or len(frames) < FEWEST or inside.issuperset(frames)
    segmenter = Segmenter(shortest=1, longest=LONGEST * FRAME)
    blockwise = [segmenter.push(probabilities[i : i + block]) for i in range(0, total, block)]
    assert [*itertools.chain.from_iterable(blockwise), *segmenter.finish()] == found
    wide = segments(probabilities, shortest=shortest)
    assert [
        (min(a, begin), max(b, end)) for (a, b), (begin, end) in zip(wide, found, strict=True)
    ] == wide
    assert all((end - begin) * FRAME >= min(shortest, total * FRAME) for begin, end in wide)


def test_speech_is_joined_and_cut_at_the_longest_pause_of_the_second_half():
    assert segments(runs(20, 10, 5, 10, 20)) == [(20 - PADDING, 45 + PADDING)]
    # frame 44 is in the last run; the pause of 6 is in the second half, that of 8 in the first
    assert segments(runs(0, 10, 8, 10, 6, 5, 4, 30)) == [(0, 31), (31, 73)]


def test_any_pause_is_preferred_to_a_cut_in_speech():
    assert segments(runs(0, 6, 4, 80))[0] == (0, 8)


def test_speech_without_a_pause_is_cut_where_it_is_least_probable():
    probabilities = [0.9] * 30 + [0.6] * 5 + [0.9] * 40
    assert segments(probabilities) == [(0, 32), (32, 75)]


def test_pause_at_the_limit_does_not_become_a_segment():
    assert segments([0.9] * 43 + [0.1] * 100) == segments([0.9] * 42 + [0.1] * 100) == [(0, 43)]


def test_only_a_long_pause_ends_a_segment():
    assert len(segments(runs(0, 5, LONGEST_PAUSE, 5), longest=1000 * FRAME)) == 2
    assert len(segments(runs(0, 5, LONGEST_PAUSE - 1, 5), longest=1000 * FRAME)) == 1
    assert segments(runs(0, 5, PAUSE - 1, 5)) == [(0, 12)]


def test_silence_and_clicks_give_no_segment():
    assert segments([]) == segments([0.3] * 500) == segments(runs(50, FEWEST - 1, 50)) == []
    assert segments(runs(50, FEWEST, 50)) == [(50 - PADDING, 50 + FEWEST + PADDING)]


@settings(deadline=None, max_examples=40)
@given(stretches, st.integers(100, 40_000), st.integers(0, FRAME - 1), st.integers(1, 5 * FRAME))
def test_segments_do_not_depend_on_the_block_size(probabilities, size, more, shortest):
    wave = np.repeat(np.array(probabilities, np.float32), FRAME)
    wave = np.concatenate([wave, np.full(more, 0.9, np.float32)])
    blocks = [wave[i : i + size] for i in range(0, len(wave), size)]
    found = list(
        cut_segments(blocks, FirstSampleDetector(), shortest=shortest, longest=LONGEST * FRAME)
    )
    whole = list(
        cut_segments([wave], FirstSampleDetector(), shortest=shortest, longest=LONGEST * FRAME)
    )
    assert [segment.start for segment in found] == [segment.start for segment in whole]
    for segment, same in zip(found, whole, strict=True):
        assert (segment.wave == same.wave).all()
        assert (segment.wave == wave[segment.start : segment.start + len(segment.wave)]).all()
        assert min(shortest, len(wave)) <= len(segment.wave) <= LONGEST * FRAME
        assert segment.speech == same.speech == segment.wave[::FRAME].max()


@pytest.mark.slow
@pytest.mark.parametrize("size", [1600, 65536])
def test_synthetic_speech_is_found_and_silence_is_not(size):
    noise = np.random.default_rng(0).normal(0, 3e-4, 16000 * 5).astype(np.float32)
    first = [noise, vowels(2), noise[:8000], vowels(3, seed=1)]
    second = [noise, vowels(20, seed=2), noise[:4000], vowels(20, seed=3)]
    wave = np.concatenate([*first, *second])
    spoken = [(5, 7), (7.5, 10.5), (15.5, 35.5), (35.75, 55.75)]
    blocks = [wave[i : i + size] for i in range(0, len(wave), size)]
    detector = Silero(load_silero())
    segments = cut_segments(blocks, detector, shortest=160, longest=28 * 16000)
    found = [segment.seconds for segment in segments]
    np.testing.assert_allclose(found, [(5, 10.5), (15.5, 35.6), (35.6, 55.75)], atol=0.45)
    assert all(any(start <= a and b <= end + 0.05 for start, end in found) for a, b in spoken)
    assert all(start <= end for (_, start), (end, _) in itertools.pairwise(found))


def test_loudness_keeps_all_audio_and_cuts_where_it_is_quiet():
    quiet = np.zeros(3200, np.float32)
    wave = np.concatenate([tone("one", 25), quiet, tone("two", 25), quiet, tone("three", 8)])
    found = list(cut_segments([wave], Loudness(), shortest=160, longest=30 * 16000))
    assert (np.concatenate([segment.wave for segment in found]) == wave).all()
    cuts = [segment.seconds[0] for segment in found[1:]]
    np.testing.assert_allclose(cuts, [25.1, 50.3], atol=0.1)
