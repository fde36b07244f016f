"""Transcription with a stub engine: order, batches, corrupted files and memory."""

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import soundfile

from asrllm.audio.vad import Loudness, Silero, load_silero
from asrllm.commands.transcribe import check_output
from asrllm.data.audio_file import AudioFile
from asrllm.data.audio_files import open_audio
from asrllm.data.text import join_texts
from asrllm.errors import UserError
from asrllm.evaluation.transcription import Segmentation, TextSegment, transcribe_files
from asrllm.models.asr_llm.generation import Answer
from asrllm.testing import tone, vowels
from tests.conftest import REPOSITORY, assert_done, clean_environment

PIECES = Segmentation(detector=Loudness, longest=2 * 16000)


class Stub:
    """Answers with a digest of the audio, and records the sizes of batches."""

    limits = (160, 30 * 16000)
    padded_to = 0.0
    parallel = 1

    def __init__(self):
        self.batches = []

    def answer(self, waves, prompts):
        assert all(self.limits[0] <= len(wave) <= self.limits[1] for wave in waves)
        self.batches.append([len(wave) for wave in waves])
        return [
            Answer(text=f"{p} {len(w)} {abs(w).sum():.3f}")
            for w, p in zip(waves, prompts, strict=True)
        ]


def transcribe(paths, engine=None, segmentation=PIECES, batch_size=3, advanced=None):
    files = [open_audio(str(path)) for path in paths]
    advanced = [] if advanced is None else advanced
    found = transcribe_files(
        engine or Stub(),
        files,
        segmentation,
        prompt="p",
        batch_size=batch_size,
        advance=advanced.append,
    )
    return list(found)


def make(path, seconds, seed=0):
    soundfile.write(path, vowels(seconds, seed=seed), 16000, subtype="FLOAT")
    return path


def test_transcripts_are_in_order_and_do_not_depend_on_the_batch_size(tmp_path):
    paths = [make(tmp_path / f"{i}.wav", seconds, i) for i, seconds in enumerate((7, 0.5, 3, 11))]
    advanced = []
    first = transcribe(paths, advanced=advanced)
    assert [t.audio for t in first] == [str(path) for path in paths]
    assert [t.duration for t in first] == [7, 0.5, 3, 11]
    assert [t.segments[-1].end for t in first] == [7, 0.5, 3, 11]
    assert all(t.text == " ".join(s.text for s in t.segments) and not t.problem for t in first)
    assert sum(advanced) == pytest.approx(21.5)
    assert min(advanced) >= 0
    for size in (1, 2, 100):
        engine = Stub()
        assert transcribe(paths, engine, batch_size=size) == first
        assert max(map(len, engine.batches)) == min(size, sum(len(t.segments) for t in first))


def test_segments_of_similar_length_are_decoded_together(tmp_path):
    paths = [
        make(tmp_path / f"{i}.wav", seconds, i) for i, seconds in enumerate((1.2, 0.4, 1.1, 0.5))
    ]
    engine = Stub()
    transcribe(paths, engine, batch_size=2)
    assert engine.batches == [[19200, 17600], [8000, 6400]]


def test_corrupted_file_is_reported_and_the_others_are_transcribed(tmp_path):
    paths = [make(tmp_path / f"{i}.wav", 6, i) for i in range(3)]
    wave = vowels(6)
    wave[80_000] = np.nan
    soundfile.write(paths[1], wave, 16000, subtype="FLOAT")
    advanced = []
    first, corrupted, last = transcribe(paths, batch_size=1, advanced=advanced)
    assert (corrupted.segments, corrupted.text) == ([], "")
    assert repr(str(paths[1])) in corrupted.problem
    assert "NaN" in corrupted.problem
    assert [first, last] == transcribe([paths[0], paths[2]])
    assert sum(advanced) == pytest.approx(18)


def test_file_without_speech_has_no_segments(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 1e-3, 160_000), 16000)
    (found,) = transcribe(
        [tmp_path / "a.wav"],
        segmentation=Segmentation(detector=partial(Silero, load_silero()), longest=28 * 16000),
    )
    assert (found.segments, found.text, found.duration, found.problem) == ([], "", 10, None)


def test_file_that_is_too_short_for_the_model_is_reported(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone("one", 0.005), 16000)
    (found,) = transcribe([tmp_path / "a.wav"])
    assert repr(str(tmp_path / "a.wav")) in found.problem
    assert "5 ms" in found.problem


def test_texts_are_joined_without_spaces_in_chinese():
    assert (
        join_texts(["hello", "", "world", "你好", "世界。", "です", "ok", ""])
        == "hello world 你好世界。です ok"
    )
    assert TextSegment(start=0, end=1, text="x").end_reason == "stop"
    assert AudioFile(path="x", seconds=None).decoder == "soundfile"


LONG = """
import resource, sys
from functools import partial
import numpy as np, soundfile
from asrllm.data.audio_files import open_audio
from asrllm.audio.vad import Silero, load_silero
from asrllm.evaluation.transcription import Segmentation, transcribe_files
from asrllm.models.asr_llm.generation import Answer
from asrllm.testing import vowels

class Stub:
    limits = (160, 30 * 16000)
    padded_to = 0.0
    parallel = 1
    def answer(self, waves, prompts):
        return [Answer(text="x") for _ in waves]

seconds = (3, 5, 9, 2.5, 8.5)  # 30.5 s with the pauses
parts = [np.pad(vowels(s, seed=i, rate=8000), (0, 4000)) for i, s in enumerate(seconds)]
minute = np.concatenate(parts * 2)[: 60 * 8000]
segmentation = Segmentation(detector=partial(Silero, load_silero()), longest=28 * 16000)
peaks = []
for minutes in (3, 30):
    with soundfile.SoundFile("long.wav", "w", 8000, 1) as file:
        for _ in range(minutes):
            file.write(minute)
    files = [open_audio("long.wav")]
    (found,) = transcribe_files(
        Stub(), files, segmentation, prompt="", batch_size=8, advance=lambda s: None
    )
    assert found.duration == 60 * minutes and found.segments[-1].end > 60 * minutes - 2, found
    assert len(found.segments) >= 2 * minutes
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(peaks[1] - peaks[0])
"""


@pytest.mark.longest(60, reason="transcribes 33 minutes of audio")
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB there")
def test_memory_does_not_grow_with_the_length_of_a_file(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", LONG],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env=clean_environment(PYTHONPATH=str(REPOSITORY)),
    )
    assert float(assert_done(run).stdout) < 60  # MB


@pytest.mark.parametrize("name", ["a.txt", "link", "file"])
def test_output_that_cannot_be_written_is_reported_before_the_model_loads(tmp_path, name):
    (tmp_path / "a.txt").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    folder = tmp_path if name == "a.txt" else tmp_path / name
    files = [open_audio(str(make(tmp_path / "a.wav", 1)))]
    with pytest.raises(UserError, match=f"'{tmp_path}/{name}'"):
        check_output(["txt"], folder, files)
