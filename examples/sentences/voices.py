"""Training speech of the sentences example: five synthetic voices read sentences of WordNet.

Piper's voice reads three quarters of them, and Flite's four voices the others. Flite is not as
natural, but an encoder that hears one voice only learns that voice. Every call of a program writes
a directory, which a second run uses again.
"""

import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from speech import RATE, VoiceJob, read, run_piper, trim
from texts import Recording
from weights import NewDirectory

FLITE_VOICES = ["slt", "rms", "awb", "kal16"]
TEXTS_PER_CALL = 60
FLITE_CALLS = 4  # one call in so many is of Flite
JOINED = 0.3  # ratio of texts that are two sentences

Progress = Callable[[str, int], Callable[[], None]]  # (label, total) -> advances the bar by one


class Call(NamedTuple):
    """What one call of a program reads.

    Attributes:
        number: number of the call, from which the voice and its settings follow.
        texts: texts to read; a full stop separates their sentences.
        root: directory of the unpacked packages.
        out: directory to write.
    """

    number: int
    texts: list[str]
    root: Path
    out: Path


def draw_texts(sentences: list[str], count: int, seed: int) -> list[str]:
    """Draw texts of one or two sentences each, none of which repeats."""
    if 2 * count > len(sentences):
        raise SystemExit(
            f"--texts={count} needs up to {2 * count} sentences, but WordNet has "
            f"{len(sentences)}. Use at most --texts={len(sentences) // 2}."
        )
    rng = np.random.default_rng(seed)
    order = iter(rng.permutation(len(sentences)))
    texts: list[str] = []
    for _ in range(count):
        text = sentences[next(order)]
        if rng.random() < JOINED:
            text += ". " + sentences[next(order)]
        texts.append(text)
    return texts


def synthesise(texts: list[str], root: Path, out: Path, progress: Progress) -> list[Recording]:
    """Read texts aloud in two processes.

    Args:
        texts: the texts.
        root: directory of the unpacked packages.
        out: directory of the calls' directories.
        progress: starts a progress bar.
    """
    calls: list[Call] = []
    for number, start in enumerate(range(0, len(texts), TEXTS_PER_CALL)):
        batch = texts[start : start + TEXTS_PER_CALL]
        calls.append(Call(number, batch, root, out / f"{number:04d}"))
    advance = progress("synthesising speech", len(calls))
    recordings: list[Recording] = []
    with ProcessPoolExecutor(2) as pool:
        for call, written in zip(calls, pool.map(read_aloud, calls), strict=True):
            for path, text in zip(written, call.texts, strict=True):
                recordings.append(Recording(path, text.replace(".", "")))
            advance()
    return recordings


def read_aloud(call: Call) -> list[Path]:
    """Write the recordings of a call, unless they exist, and return their paths."""
    names = [f"{i:03d}.wav" for i in range(len(call.texts))]
    if not call.out.exists():
        with NewDirectory(call.out) as folder:
            waves = flite(call) if call.number % FLITE_CALLS == 0 else piper(call)
            for name, wave in zip(names, waves, strict=True):
                soundfile.write(folder / name, wave, RATE, subtype="PCM_16")
    return [call.out / name for name in names]


def piper(call: Call) -> list[np.ndarray]:
    """Return waveforms, (samples,) at RATE, of Piper's voice at the pace and noise of a call."""
    rng = np.random.default_rng([11, call.number])
    length = rng.uniform(0.8, 1.4)
    noise = rng.uniform(0.3, 1.0)
    width = rng.uniform(0.3, 1.1)
    job = VoiceJob(call.number, call.texts, call.texts, length, noise, width)
    return [wave for _, wave in run_piper(job)]


def flite(call: Call) -> list[np.ndarray]:
    """Return waveforms, (samples,) at RATE, of one of Flite's voices at the pace of a call."""
    voice = FLITE_VOICES[call.number // FLITE_CALLS % len(FLITE_VOICES)]
    stretch = np.random.default_rng([12, call.number]).uniform(0.85, 1.3)
    (libraries,) = (call.root / "usr/lib").glob("*-linux-gnu")
    program = str(call.root / "usr/bin/flite")
    path = call.out.with_name(call.out.name + ".wav")
    waves: list[np.ndarray] = []
    for text in call.texts:
        command = [program, "-voice", voice, "--setf", f"duration_stretch={stretch:.3f}"]
        done = subprocess.run(
            [*command, "-t", text, "-o", str(path)],
            capture_output=True,
            text=True,
            env={**os.environ, "LD_LIBRARY_PATH": str(libraries)},
        )
        if done.returncode:
            raise SystemExit(f"{program} failed: {done.stderr.strip()[-500:]}")
        waves.append(trim(read(path)))
    path.unlink()
    return waves
