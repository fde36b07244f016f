"""A fault campaign: corrupt files, read hostile files and kill processes, and count the outcomes.

    python benchmarks/faults.py [--damages N] [--kills N] [--seed S] [--output FILE]

Each trial has one of these outcomes:

    detected    a message that names the file, and status 2; a log drops the line and warns
    harmless    the result is bitwise the same
    silent      the result is different, without a message
    traceback   an exception instead of a message
    lost        files that were intact before cannot be used any more

Leftovers are the processes that are alive 15 s after a kill, and the temporary files. The campaign
passes without silent, traceback, lost and leftovers."""

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from asrllm.audio.reader import Reader
from asrllm.checkpoints.consolidate import consolidate
from asrllm.data.corpora import make_corpus
from asrllm.data.index import open_index
from asrllm.data.plan import Item
from asrllm.data.shards import write_shards
from asrllm.data.sources import read_kaldi
from asrllm.errors import UserError
from asrllm.evaluation.journal import DecodedUtterance, Journal
from asrllm.models.auto import read_state
from asrllm.testing import kaldi_directory, tone_sentences
from asrllm.training.callbacks.json_log import reopen_log
from asrllm.training.checkpoint.manifest import manifest_text, read_manifest
from asrllm.training.checkpoint.resume import corruption
from asrllm.training.checkpoint.zero_files import file_digest

ASRLLM = [sys.executable, "-m", "asrllm.cli"]
OUTCOMES = ("detected", "harmless", "silent", "traceback", "lost")
COLUMNS = (*OUTCOMES, "leftovers")
MEMORY = 3 << 30  # bytes of address space beyond the imports for reading a hostile file
TIME = 60  # seconds for reading a hostile file
END_TIME = 15  # seconds for the workers of a killed process to end


# --- corrupted files ---


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Return the content with one fault that disks, networks or copies can cause."""
    place = int(rng.integers(len(content)))
    kind = rng.choice(["bit", "bit", "bit", "zeros", "cut", "garbage", "repeated"])
    if kind == "bit":
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        return bytes(changed)
    length = int(rng.integers(1, 4097))
    if kind == "zeros":
        return (
            content[:place]
            + bytes(len(content[place : place + length]))
            + content[place + length :]
        )
    if kind == "cut":
        return content[:place]
    if kind == "garbage":
        return (
            content[:place]
            + rng.bytes(len(content[place : place + length]))
            + content[place + length :]
        )
    return content[: place + length] + content[place:]


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of a state dict."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + tensors[name].numpy().tobytes())
    return total.hexdigest()


class Artifact:
    """Files that a run writes.

    Attributes:
        folder: their directory.
        use: reads them and returns the result, or raises UserError.
        is_log: whether a part of the result may be missing, because the files are a log.
    """

    def __init__(self, folder: Path, use: Callable[[Path], Any], *, is_log: bool = False) -> None:
        self.folder = folder
        self.use = use
        self.is_log = is_log


def shards(folder: Path) -> Artifact:
    """Write shards and their index."""
    write_shards(
        folder / "shards",
        read_kaldi(kaldi_directory(folder / "kaldi", tone_sentences(12))),
        utterances_per_shard=5,
    )
    return Artifact(folder / "shards", use_shards)


def use_shards(folder: Path) -> Any:
    """Read every sample."""
    index = open_index(folder)
    reader = Reader([make_corpus("train", index, None)])
    samples = [reader.read(Item(corpus=0, row=row)) for row in range(len(index))]
    return [
        (sample.key, sample.text, hashlib.sha256(sample.wave.tobytes()).hexdigest())
        for sample in samples
    ]


STATE = {f"projector.{i}": torch.arange(4096.0).view(64, 64) + i for i in range(4)}


def checkpoint(folder: Path) -> Artifact:
    """Write a ZeRO-0 checkpoint."""
    place = folder / "run" / "checkpoint-1"
    place.mkdir(parents=True)
    torch.save({"module": STATE, "optimizer": {}}, place / "mp_rank_00_model_states.pt")
    about = {
        name: {"shape": list(tensor.shape), "dtype": "float32"} for name, tensor in STATE.items()
    }
    manifest = {
        "step": 1,
        "position": {},
        "zero_stage": 0,
        "world_size": 1,
        "trainable": about,
        "param_groups": [list(STATE)],
        "running_average": False,
        "base_models": {},
        "settings": {},
        "prompts": [],
        "files": {"mp_rank_00_model_states.pt": file_digest(place / "mp_rank_00_model_states.pt")},
    }
    (place / "asrllm.json").write_text(manifest_text(manifest))
    return Artifact(place, use_checkpoint)


def use_checkpoint(folder: Path) -> Any:
    """Verify and consolidate a checkpoint."""
    if problem := corruption(folder):
        raise UserError(problem)
    with tempfile.TemporaryDirectory() as name:
        weights = read_state(consolidate(folder, Path(name) / "w.pt"))
    return read_manifest(folder), digest(weights)


def weights(folder: Path, name: str) -> Artifact:
    """Write consolidated weights to a file with this name."""
    place = folder / name.replace(".", "-")
    place.mkdir()
    made = checkpoint(place)
    (place / "weights").mkdir()
    consolidate(made.folder, place / "weights" / name)
    return Artifact(place / "weights", lambda where: digest(read_state(where / name)))


DECODED = DecodedUtterance(
    row=0,
    key="k",
    reference="one",
    hypothesis="two",
    end="stop",
    duration=1.0,
    speaker="",
    recording="",
    corpus="",
    took=1.0,
    rank=0,
)


def journal(folder: Path) -> Artifact:
    """Write the journal of an evaluation."""
    place = folder / "journal"
    with Journal(place, "test", settings=1) as made:
        made.write([DecodedUtterance(**vars(DECODED) | {"row": row}) for row in range(20)])
    return Artifact(
        place,
        lambda where: [vars(decoded) for decoded in Journal(where, "test", settings=1).read()],
        is_log=True,
    )


def metrics(folder: Path) -> Artifact:
    """Write metrics.jsonl."""
    place = folder / "metrics"
    place.mkdir()
    (place / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "loss": step / 7}) + "\n" for step in range(1, 30))
    )
    return Artifact(place, use_metrics, is_log=True)


def use_metrics(folder: Path) -> Any:
    """Reopen metrics.jsonl and return its steps. JSON has no checksum, so a number may change."""
    reopen_log(folder / "metrics.jsonl", 100).close()
    lines = (folder / "metrics.jsonl").read_text().split("\n")
    return [json.loads(line)["step"] for line in lines if line]


def try_damage(artifact: Artifact, expected: Any, rng: np.random.Generator) -> str:
    """Corrupt one file of a copy, read the copy, and return the outcome."""
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        copy = Path(name) / artifact.folder.name
        shutil.copytree(artifact.folder, copy)
        files = [
            path
            for path in sorted(copy.rglob("*"))
            if path.is_file() and path.stat().st_size and path.name != "rejected.jsonl"
        ]
        victim = files[int(rng.integers(len(files)))]
        victim.write_bytes(damage(victim.read_bytes(), rng))
        try:
            found = artifact.use(copy)
        except UserError:
            return "detected"
        except Exception as error:
            if type(error).__name__ == "SampleError":
                return "detected"
            print(f"traceback: {victim.name}: {error!r}", file=sys.stderr)
            return "traceback"
    if found == expected:
        return "harmless"
    if artifact.is_log and all(part in expected for part in found):
        return "detected"
    if artifact.is_log and artifact.use is use_metrics:  # the number of a step has changed
        return "harmless"
    print(f"silent: {victim.name}", file=sys.stderr)
    return "silent"


def damages(count: int, seed: int, folder: Path) -> dict[str, Counter[str]]:
    """Corrupt files of each kind `count` times, and return the outcomes by kind."""
    artifacts = {
        "index and shards": shards(folder),
        "checkpoint": checkpoint(folder / "checkpoint"),
        "weights, .pt": weights(folder, "w.pt"),
        "weights, .safetensors": weights(folder, "w.safetensors"),
        "journal of an evaluation": journal(folder),
        "metrics.jsonl": metrics(folder),
    }
    table = {}
    for number, (name, artifact) in enumerate(artifacts.items()):
        expected = artifact.use(artifact.folder)
        rng = np.random.default_rng([seed, number])
        table[name] = Counter(try_damage(artifact, expected, rng) for _ in range(count))
    return table


# --- hostile files ---


def hostile(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of a hostile input, and the command that reads it."""
    canary = folder / "ran"
    recording = {
        "id": "r",
        "sampling_rate": 16000,
        "num_samples": 16000,
        "duration": 1.0,
        "sources": [{"type": "command", "channels": [0], "source": f"touch {canary}"}],
    }
    cut = {
        "id": "c",
        "start": 0,
        "duration": 1.0,
        "channel": 0,
        "supervisions": [],
        "recording": recording,
        "type": "MonoCut",
    }
    tracks = [{"cut": cut, "offset": 0}]
    for name, row in (
        ("command", cut),
        ("command in a mixed cut", {"id": "m", "type": "MixedCut", "tracks": tracks}),
    ):
        path = folder / f"{name}.jsonl"
        path.write_text(json.dumps(row))
        yield (
            f"Lhotse: {name}",
            [*ASRLLM, "shards", "make", str(folder / "out"), "--cuts", str(path)],
        )
    deep = folder / "deep.jsonl"
    deep.write_text("[" * 100_000)
    for source in ("cuts", "nemo", "wenet", "slam", "swift"):
        yield (
            f"nested JSON: {source}",
            [*ASRLLM, "shards", "make", str(folder / "out"), f"--{source}", str(deep)],
        )
    bomb = folder / "bomb.jsonl.gz"
    subprocess.run(f"head -c 2000000000 /dev/zero | gzip -1 > {bomb}", shell=True, check=True)
    yield "gzip bomb", [*ASRLLM, "shards", "make", str(folder / "out"), "--nemo", str(bomb)]
    for name, content in tars().items():
        path = folder / f"{name.replace(' ', '-')}.tar"
        path.write_bytes(content)
        yield (
            f"tar: {name}",
            [*ASRLLM, "shards", "index", str(path), "--output", str(folder / "index")],
        )


def tars() -> dict[str, bytes]:
    """Return hostile tars by name."""
    import tarfile

    def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
        info = tarfile.TarInfo(name)
        info.size = size
        info.type = kind
        return info.tobuf(tarfile.GNU_FORMAT)

    sparse = bytearray(header("a.wav", 0, tarfile.GNUTYPE_SPARSE))
    sparse[386:398] = sparse[483:495] = b"%011o\0" % (7 << 30)
    sparse[398:410] = b"%011o\0" % 0
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    return {
        "sparse": bytes(sparse) + bytes(1024),
        "larger than the file": header("a.wav", 1 << 40),
        "a long name of 8 GB": header("x", (1 << 33) - 1, tarfile.GNUTYPE_LONGNAME),
        "negative": header("a.wav", -1024) + bytes(1024),
        "headers without end": header("x", 12, tarfile.XHDTYPE) * 20_000,
    }


def try_hostile(command: list[str], canary: Path) -> str:
    """Run a command with limited memory and time, and return the outcome.

    Args:
        command: reads a hostile file.
        canary: a file that exists if the command has executed code of the hostile file.
    """

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY + (6 << 30), MEMORY + (6 << 30)))

    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIME, preexec_fn=limit
        )
    except subprocess.TimeoutExpired:
        return "silent"
    if canary.exists():
        return "silent"
    if "Traceback" in done.stderr or done.returncode not in (0, 2):
        print(f"traceback: {command}: {done.stderr[-300:]}", file=sys.stderr)
        return "traceback"
    return "detected" if done.returncode == 2 else "harmless"


# --- kills ---


def kills(count: int, seed: int, folder: Path) -> Counter[str]:
    """Kill `shards make` at random times. The next run must write the bytes of an intact one.

    Returns:
        The number of each outcome, and of leftovers.
    """
    kaldi = kaldi_directory(folder / "kaldi-kills", tone_sentences(60, seed=seed))
    command = [
        *ASRLLM,
        "shards",
        "make",
        "--kaldi",
        str(kaldi),
        "--corpus",
        "tones",
        "--utterances-per-shard",
        "4",
        "--workers",
        "2",
    ]
    subprocess.run([*command, str(folder / "whole")], check=True, capture_output=True)
    expected = {path.name: path.read_bytes() for path in (folder / "whole").iterdir()}
    rng, outcomes = np.random.default_rng(seed), Counter[str]()
    for number in range(count):
        out = folder / f"killed-{number}"
        process = subprocess.Popen(
            [*command, str(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(float(rng.uniform(0.2, 3.0)))  # the time of the kill is random on purpose
        workers = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        outcomes["leftovers"] += len(psutil.wait_procs(workers, END_TIME)[1])
        if not out.exists():
            subprocess.run([*command, str(out)], check=False, capture_output=True)
        found = {path.name: path.read_bytes() for path in out.iterdir()} if out.exists() else {}
        left = out.with_name(f".{out.name}.partial").exists()
        outcomes["harmless" if found == expected and not left else "lost"] += 1
    return outcomes


def campaign(damage_count: int, kill_count: int, seed: int) -> dict[str, Any]:
    """Run all trials, and return the number of each outcome by kind of trial."""
    with (
        tempfile.TemporaryDirectory(prefix="faults-") as name,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        folder = Path(name)
        temporary = folder / "temporary"
        temporary.mkdir()
        os.environ["TMPDIR"] = str(temporary)  # of the commands
        table = {
            f"damaged: {what}": counts
            for what, counts in damages(damage_count, seed, folder).items()
        }
        (folder / "hostile").mkdir()
        for what, command in hostile(folder / "hostile"):
            table[f"hostile: {what}"] = Counter([try_hostile(command, folder / "hostile" / "ran")])
        if kill_count:
            table["killed: shards make"] = kills(kill_count, seed, folder)
        table["temporary files"] = Counter(leftovers=len(list(temporary.iterdir())))
    return {
        what: {"trials": sum(counts[o] for o in OUTCOMES)} | {o: counts[o] for o in COLUMNS}
        for what, counts in table.items()
    }


def main() -> None:
    """Run the campaign, and exit with status 1 if an outcome is bad."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--damages",
        type=int,
        default=300,
        metavar="N",
        help="corrupted files of each kind; default: %(default)s",
    )
    parser.add_argument("--kills", type=int, default=30, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--rounds",
        type=int,
        default=1,
        metavar="N",
        help="campaigns, each with the next seed; default: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the tables as JSON")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    tables = [
        campaign(arguments.damages, arguments.kills, arguments.seed + i)
        for i in range(arguments.rounds)
    ]
    results = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "seed": arguments.seed,
        "tables": tables,
    }
    bad = 0
    for table in tables:
        for what, row in table.items():
            print(f"{what:45} {row}")
            bad += row["silent"] + row["traceback"] + row["lost"] + row["leftovers"]
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
