"""Speed of the data path relative to a decoding loop, webdataset's pipeline and lhotse's Shar.

    python benchmarks/data.py [--utterances N] [--rounds R] [--rows M] [--output FILE]

All read the same synthetic audio: band-limited noise with the durations of LibriSpeech, as FLAC at
16 kHz, so that decoding is nearly all of the work. Every pipeline yields batches of padded
waveforms and texts with about the same number of seconds, from the page cache. Ours also draws
prompts and tokenises. The results are medians of several rounds, in which the pipelines take
turns."""

import argparse
import copy
import functools
import importlib.metadata
import io
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch
import webdataset
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.dataset import DynamicBucketingSampler, IterableDatasetWrapper
from lhotse.dataset.collation import collate_audio
from torch.utils.data import DataLoader, Dataset

from asrllm.audio.reader import Reader
from asrllm.collator.batch import Collator
from asrllm.collator.chat import ChatRenderer
from asrllm.collator.loader import PlannedDataset, steps
from asrllm.data.config import SamplerConfig
from asrllm.data.corpora import make_corpus
from asrllm.data.index import ROW, Index, ShardRecord, open_index, write_index
from asrllm.data.plan import Plan, Position
from asrllm.data.prompts import DEFAULT_PROMPTS
from asrllm.data.shards import write_shards
from asrllm.data.sources import Utterance
from asrllm.data.waveforms import resample, to_mono
from asrllm.testing import tiny_tokenizer

RATE, SECONDS, FIXED = (
    16000,
    200.0,
    16,
)  # FIXED: utterances in a batch of webdataset, which have about SECONDS of audio
BUDGET = SamplerConfig(max_tokens=10**9, max_utterances=10**6, max_duration=SECONDS, window=100_000)


BARRIER: Any = None  # shared by the processes that are measured together
# state dicts of lhotse's sampler, by the ratio of the epoch that is done
STATES: dict[float, dict[str, Any]] = {}


class Batch(NamedTuple):
    """Size of a batch.

    Attributes:
        utterances: number of utterances.
        read: samples with padding.
        true: samples without padding.
    """

    utterances: int
    read: int
    true: int


# --- the corpus ---


def lengths(count: int, seed: int = 0) -> np.ndarray:
    """Return durations (count,) in seconds like LibriSpeech's: mostly 12 to 16 s, some shorter."""
    rng = np.random.default_rng(seed)
    long = rng.random(count) < 0.65
    return np.where(long, rng.normal(14.2, 1.3, count), rng.uniform(1.5, 16, count)).clip(1.3, 30)


def make_wave(seconds: float, seed: int) -> tuple[np.ndarray, int]:
    """Return band-limited noise, and its sampling rate."""
    rng = np.random.default_rng(seed)
    noise = np.cumsum(rng.normal(size=round(seconds * RATE))) * 1e-3
    wave = noise - np.convolve(noise, np.ones(400) / 400, "same")
    return (0.3 * wave / np.abs(wave).max()).astype(np.float32), RATE


def make_corpus_files(folder: Path, count: int) -> None:
    """Write the same audio as shards for asrllm and webdataset, as FLAC files, and as Shar."""
    seconds = lengths(count)
    utterances = [
        Utterance(
            key=f"utt{i:06d}", text="one two " * round(s), load=functools.partial(make_wave, s, i)
        )
        for i, s in enumerate(seconds)
    ]
    write_shards(folder / "shards", utterances, utterances_per_shard=500, workers=2)
    (folder / "flac").mkdir()
    cuts = []
    for shard in open_index(folder / "shards").shards:
        for sample in webdataset.WebDataset(shard, shardshuffle=False):
            path = folder / "flac" / f"{sample['__key__']}.flac"
            path.write_bytes(sample["flac"])
            recording = Recording.from_file(path)
            text = json.loads(sample["json"])["text"]
            supervision = SupervisionSegment(
                id=recording.id,
                recording_id=recording.id,
                start=0,
                duration=recording.duration,
                text=text,
            )
            cuts.append(
                MonoCut(
                    id=recording.id,
                    start=0,
                    duration=recording.duration,
                    channel=0,
                    recording=recording,
                    supervisions=[supervision],
                )
            )
    (folder / "shar").mkdir()
    CutSet.from_cuts(cuts).to_shar(folder / "shar", fields={"recording": "flac"}, shard_size=500)


# --- the pipelines: each yields the batches of an epoch, from a ratio of it (`start`) on ---


def bare(folder: Path, workers: int, start: float) -> Iterator[Batch]:
    """Decode one file after the other with soundfile in this process."""
    for path in sorted((folder / "flac").iterdir()):
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        wave = resample(to_mono(samples), rate)
        yield Batch(1, len(wave), len(wave))


def ours(folder: Path, workers: int, start: float) -> Iterator[Batch]:
    """Read planned batches."""
    corpus = make_corpus("c", open_index(folder / "shards"), None)
    plan = Plan([corpus], BUDGET, audio_tokens=lambda samples: samples // 1280, seed=0)
    at = Position(window=0, batch=int(start * len(plan.batches(0, 0, 1))), ranks=1)
    dataset = PlannedDataset(Reader([corpus]), collator())
    for step in steps(
        plan, dataset, at, rank=0, ranks=1, accumulation=1, epochs=1, num_workers=workers
    ):
        (batch,) = step.micro_batches
        yield Batch(len(batch.keys), batch.waves.numel(), int(batch.wave_lengths.sum()))


def reading(folder: Path, workers: int, start: float) -> Iterator[Batch]:
    """Read the utterances from the tars in the plan's order in this process, without collating.

    The difference to `bare` is what reading costs in addition to decoding.
    """
    corpus = make_corpus("c", open_index(folder / "shards"), None)
    reader = Reader([corpus])
    for step in Plan([corpus], BUDGET, audio_tokens=lambda samples: samples // 1280, seed=0).steps(
        Position(), ranks=1
    ):
        for item in step.micro_batches(0)[0]:
            wave = reader.read(item).wave
            yield Batch(1, len(wave), len(wave))


def collator() -> Collator:
    """Return a collator with a tiny tokenizer."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|AUDIO|>"], special_tokens=True)
    return Collator(
        ChatRenderer(tokenizer, "<|AUDIO|>"),
        DEFAULT_PROMPTS,
        num_audio_tokens=lambda samples: samples // 1280,
        seed=0,
    )


def webdatasets(folder: Path, workers: int, start: float) -> Iterator[Batch]:
    """Read shuffled shards with a shuffle buffer of 1000 in batches of a fixed size.

    A resumed run skips the samples that it has already read, without decoding them.
    """
    shards = open_index(folder / "shards").shards
    skipped = int(start * len(os.listdir(folder / "flac"))) // max(workers, 1)
    data = webdataset.WebDataset(shards, shardshuffle=100, seed=0, nodesplitter=None).shuffle(
        1000, seed=0
    )
    data = data.compose(functools.partial(skip, count=skipped))
    data = data.map(decode_sample).batched(FIXED, collation_fn=pad)
    for waves, read_lengths, _ in DataLoader(
        data, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None
    ):
        yield Batch(len(waves), waves.numel(), int(read_lengths.sum()))


def skip(samples: Iterator[Any], count: int) -> Iterator[Any]:
    """Skip the first `count` samples."""
    return itertools.islice(samples, count, None)


def decode_sample(sample: dict[str, Any]) -> tuple[torch.Tensor, str]:
    """Return the waveform and the text of a sample."""
    wave, _ = soundfile.read(io.BytesIO(sample["flac"]), dtype="float32")
    return torch.from_numpy(wave), json.loads(sample["json"])["text"]


def pad(samples: list[tuple[torch.Tensor, str]]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Return padded waveforms, their lengths and the texts."""
    waves = [wave for wave, _ in samples]
    padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
    return padded, torch.tensor([len(wave) for wave in waves]), [text for _, text in samples]


class CutAudio(Dataset):
    """Batches of waveforms, lengths and texts from lhotse's cuts."""

    def __getitem__(self, cuts: CutSet) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        waves, wave_lengths = collate_audio(cuts)
        return waves, wave_lengths, [cut.supervisions[0].text for cut in cuts]


def lhotses(folder: Path, workers: int, start: float) -> Iterator[Batch]:
    """Read Shar with DynamicBucketingSampler in the worker.

    A resumed run loads the sampler's state dict.
    """

    def sampler(workers: int = workers) -> DynamicBucketingSampler:
        cuts = CutSet.from_shar(
            in_dir=folder / "shar", shuffle_shards=True, seed=0, split_for_dataloading=workers > 1
        )
        return DynamicBucketingSampler(
            cuts.repeat(1),
            max_duration=SECONDS,
            num_buckets=20,
            shuffle=True,
            rank=0,
            world_size=1,
            seed=0,
        )

    chosen = sampler()
    if start:
        chosen.load_state_dict(shar_state(folder, start, sampler))
    data = IterableDatasetWrapper(CutAudio(), chosen)
    for waves, wave_lengths, _ in DataLoader(
        data, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None
    ):
        yield Batch(len(waves), waves.numel(), int(wave_lengths.sum()))


def shar_state(
    folder: Path, start: float, sampler: Callable[[int], DynamicBucketingSampler]
) -> dict[str, Any]:
    """Return the state of a sampler that has yielded the ratio `start` of an epoch.

    It is computed once and outside the measured time.
    """
    if start not in STATES:
        past = sampler(0)
        total, had = len(os.listdir(folder / "flac")), 0
        for cuts in past:
            had += len(cuts)
            if had >= start * total:
                break
        STATES[start] = past.state_dict()
    return copy.deepcopy(STATES[start])  # load_state_dict modifies it


OTHERS = {"webdataset": webdatasets, "lhotse Shar": lhotses}
PIPELINES = {"asrllm": ours, **OTHERS}
RESUME = "seconds to resume at 90 %"


# --- measuring ---


def rate(
    pipeline: Callable[..., Iterator[Batch]], folder: Path, workers: int
) -> tuple[float, float]:
    """Return the utterances per second after the first batch, and the padding ratio."""
    batches = pipeline(folder, workers, 0.0)
    seen = [next(batches)]
    began = time.perf_counter()
    seen += batches
    seconds = time.perf_counter() - began
    true, read = sum(b.true for b in seen), sum(b.read for b in seen)
    return sum(b.utterances for b in seen[1:]) / seconds, 1 - true / read


def resume_seconds(pipeline: Callable[..., Iterator[Batch]], folder: Path) -> float:
    """Return the seconds from the start to the first batch at 90 % of an epoch."""
    began = time.perf_counter()
    next(pipeline(folder, 1, 0.9))
    return time.perf_counter() - began


def compare(folder: Path, rounds: int) -> dict[str, Any]:
    """Measure all pipelines in turn, and return medians and ratios."""
    measured: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        measured.setdefault(name, []).append(value)

    lhotses_state = next(lhotses(folder, 0, 0.9))  # computes the state for the measurements
    assert lhotses_state.utterances
    for _ in range(rounds):
        note("bare loop/utterances per second", rate(bare, folder, 0)[0])
        note("reading alone/utterances per second", rate(reading, folder, 0)[0])
        for name, pipeline in PIPELINES.items():
            speed, padding = rate(pipeline, folder, 1)
            note(f"{name}/utterances per second", speed)
            note(f"{name}/padding", padding)
            note(f"{name}/{RESUME}", resume_seconds(pipeline, folder))
        note("asrllm/utterances per second, 2 workers", rate(ours, folder, 2)[0])
    medians = {name: statistics.median(values) for name, values in measured.items()}
    speed = "asrllm/utterances per second"
    return {
        "medians": {name: round(value, 4) for name, value in medians.items()},
        "ratios": {
            "reading alone to the bare loop": round(
                medians["reading alone/utterances per second"]
                / medians["bare loop/utterances per second"],
                3,
            ),
            "one worker to the bare loop": round(
                medians[speed] / medians["bare loop/utterances per second"], 3
            ),
            "two workers to one": round(medians[f"{speed}, 2 workers"] / medians[speed], 3),
            **{
                f"speed to {n}": round(medians[speed] / medians[f"{n}/utterances per second"], 3)
                for n in OTHERS
            },
            **{
                f"padding of {n} to ours": round(
                    medians[f"{n}/padding"] / medians["asrllm/padding"], 1
                )
                for n in OTHERS
            },
            **{
                f"resuming of {n} to ours": round(
                    medians[f"{n}/{RESUME}"] / medians[f"asrllm/{RESUME}"], 1
                )
                for n in OTHERS
            },
        },
    }


def make_large_index(folder: Path, small: Index, count: int) -> None:
    """Write an index of `count` rows that repeats the utterances of a small corpus.

    Its tars are links to those of the small corpus.
    """
    folder.mkdir()
    rows, records, per_shard = np.array(small.rows), [], len(small) // len(small.shards)
    for number in range(count // per_shard):
        shard = number % len(small.shards)
        name = f"shard-{number:06d}.tar"
        (folder / name).symlink_to(small.shards[shard])
        part = rows[small.starts[shard] : small.starts[shard] + per_shard].copy()
        records.append(
            ShardRecord(
                name=name,
                size=small.sizes[shard],
                sha256=small.sha256[shard],
                rows=part,
                tallies={},
            )
        )
    write_index(folder, records)


def large(folder: Path, rounds: int) -> dict[str, Any]:
    """Measure opening, planning and reading with a large index, each time in a new process."""
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, value in in_fresh_processes(_first_batch, folder, 1)[0].items():
            seconds.setdefault(name, []).append(value)
    resident = {n: sum(in_fresh_processes(_resident, folder, n)) for n in (1, 4)}
    return {
        **{name: round(statistics.median(values), 5) for name, values in seconds.items()},
        **{f"MB resident, {n} processes together": round(value) for n, value in resident.items()},
    }


def in_fresh_processes(function: Callable[..., Any], folder: Path, count: int) -> list[Any]:
    """Run a function in `count` processes at the same time, and return their results."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, _set_barrier, (context.Barrier(count),)) as pool:
        return [future.result() for future in [pool.submit(function, folder) for _ in range(count)]]


def _set_barrier(barrier: Any) -> None:
    globals()["BARRIER"] = barrier


def _first_batch(folder: Path) -> dict[str, float]:
    made, began = collator(), time.perf_counter()
    corpus = make_corpus("c", open_index(folder), None)
    opened = time.perf_counter()
    plan = Plan([corpus], BUDGET, audio_tokens=lambda samples: samples // 1280, seed=0)
    dataset = PlannedDataset(Reader([corpus]), made)
    later = Position(window=(plan.windows or 1) * 9 // 10, batch=64, ranks=1)
    stream = steps(plan, dataset, later, rank=0, ranks=1, accumulation=1, epochs=1, num_workers=1)
    next(stream)
    first = time.perf_counter()
    fresh = Plan([corpus], BUDGET, audio_tokens=lambda samples: samples // 1280, seed=0)
    dealt = sum(
        len(step.micro_batches(0))
        for step in itertools.takewhile(
            lambda step: step.next_position.window == 0, fresh.steps(Position(), ranks=1)
        )
    )
    planned = time.perf_counter()
    return {
        "seconds to open": opened - began,
        "seconds to the first batch at 90 % of an epoch, opening included": first - began,
        "milliseconds to plan a step": 1000 * (planned - first) / dealt,
    }


def _resident(folder: Path) -> float:
    """Return the megabytes that opening and planning add.

    Shared pages count in proportion to the number of processes that share them.
    """
    BARRIER.wait(120)  # all processes have finished their imports, whose pages they share
    before = _proportional_mb()
    corpus = make_corpus("c", open_index(folder), None)
    plan = Plan([corpus], BUDGET, audio_tokens=lambda samples: samples // 1280, seed=0)
    plan.batches(0, 0, 8)
    BARRIER.wait(120)
    after = _proportional_mb()
    BARRIER.wait(120)
    return after - before


def _proportional_mb() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))


def machine() -> dict[str, Any]:
    """Describe the machine and the versions."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    packages = ("torch", "webdataset", "lhotse", "soundfile", "numpy")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def main() -> None:
    """Run the benchmark, and print and write its results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--utterances",
        type=int,
        default=3000,
        help="utterances to read; default: %(default)s",
    )
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument(
        "--rows", type=int, default=10_000_000, help="rows of the large index; default: %(default)s"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_corpus_files(folder, arguments.utterances)
        results = {
            "machine": machine(),
            "utterances": arguments.utterances,
            "rounds": arguments.rounds,
        }
        results["reading"] = compare(folder, arguments.rounds)
        make_large_index(folder / "large", open_index(folder / "shards"), arguments.rows)
        results[f"index of {arguments.rows} rows of {ROW.itemsize} bytes"] = large(
            folder / "large", arguments.rounds
        )
    text = json.dumps(results, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
