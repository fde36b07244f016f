"""Speed, memory and reliability of `asrllm serve` under concurrent clients.

    python benchmarks/serve.py MODEL --shards DIR [--clients N] [--requests N] [--output FILE]
    python benchmarks/serve.py --tiny

MODEL is an exported directory. Everything runs on one machine, clients included:

- each file is sent alone, one after another; then all clients send the same files at once, and each
  text is compared with that of the request alone. Both take turns, and medians count;
- the same clients and files against `transformers serve` with the same model;
- many requests, and the memory of the server after the first tenth and after all of them;
- SIGTERM while all clients send: a request whose connection was accepted must be answered.

`transformers serve` loads only architectures that are part of transformers. Here it finds ours
under that name, from the code in the exported directory."""

import argparse
import contextlib
import io
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import soundfile
import torch

from asrllm.atomic import sigterm_raises
from asrllm.audio.reader import Reader
from asrllm.data.corpora import make_corpus
from asrllm.data.index import open_index
from asrllm.data.plan import Item
from asrllm.defaults import RATE
from asrllm.launchers import free_port

REPOSITORY = Path(__file__).parents[1]
START_SECONDS = 300.0
REQUEST_SECONDS = 600.0
TRANSFORMERS_SERVE = """
import sys
import transformers
from transformers.cli.transformers import main
from transformers.dynamic_module_utils import get_class_from_dynamic_module

folder = sys.argv[2]
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = get_class_from_dynamic_module(config.auto_map["AutoModel"], folder)
setattr(transformers, config.architectures[0], model)
main()
"""


@dataclass(frozen=True)
class Answer:
    """The answer to a request.

    Attributes:
        text: the text, or the error.
        seconds: how long it took.
    """

    text: str
    seconds: float


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        process: its process.
        url: its address.
        model: name of the model.
    """

    process: psutil.Popen
    url: str
    model: str

    def send(self, content: bytes) -> Answer:
        """Transcribe a file.

        Raises:
            httpx.HTTPError: it was not answered, or with an error.
        """
        began = time.perf_counter()
        answer = httpx.post(
            f"{self.url}/v1/audio/transcriptions",
            files={"file": ("a.wav", content)},
            data={"model": self.model},
            timeout=REQUEST_SECONDS,
        )
        answer.raise_for_status()
        return Answer(answer.json()["text"], time.perf_counter() - began)

    def megabytes(self) -> float:
        """Return its resident memory a second after its last answer."""
        time.sleep(1.0)
        return self.process.memory_info().rss / 1e6


@contextlib.contextmanager
def running(command: Sequence[Any], port: int, model: str) -> Iterator[Server]:
    """Start a server, wait until it is ready, and end it."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        words = [sys.executable, *map(str, command)]
        process = psutil.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            server = Server(process, f"http://127.0.0.1:{port}", model)
            wait_until_ready(server)
            yield server
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(REQUEST_SECONDS)


def wait_until_ready(server: Server) -> None:
    """Wait until the server answers.

    Raises:
        RuntimeError: it does not start.
    """
    deadline = time.monotonic() + START_SECONDS
    while server.process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/health").status_code == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"{server.process.args} does not answer")


def read_files(shards: Path, count: int) -> tuple[list[bytes], float]:
    """Return the first utterances as WAV files, and their duration in seconds."""
    corpus = make_corpus("test", open_index(shards), None)
    reader = Reader([corpus])
    files: list[bytes] = []
    samples = 0
    for row in range(min(count, len(corpus.index))):
        wave = reader.read(Item(corpus=0, row=row)).wave
        samples += len(wave)
        file = io.BytesIO()
        soundfile.write(file, wave, RATE, format="WAV", subtype="FLOAT")
        files.append(file.getvalue())
    return files, samples / RATE


def at_once(server: Server, files: Sequence[bytes], clients: int) -> list[Answer]:
    """Return the answers to files, each sent by the first of the clients that is free."""
    with ThreadPoolExecutor(clients) as threads:
        return list(threads.map(server.send, files))


def timed(send: Callable[[], list[Answer]]) -> tuple[float, list[Answer]]:
    """Return how long some requests took together, and their answers."""
    began = time.perf_counter()
    answers = send()
    return time.perf_counter() - began, answers


def compare_speed(
    server: Server, files: Sequence[bytes], audio: float, clients: int, rounds: int
) -> tuple[dict[str, Any], list[str]]:
    """Compare requests one by one with concurrent ones.

    Returns:
        The figures, and the text of each file alone.
    """
    alone_seconds: list[float] = []
    concurrent_seconds: list[float] = []
    latencies: list[float] = []
    differing = 0
    texts: list[str] = []
    for _ in range(rounds):
        took, answers = timed(lambda: [server.send(file) for file in files])
        alone_seconds.append(took)
        texts = [answer.text for answer in answers]
        took, answers = timed(lambda: at_once(server, files, clients))
        concurrent_seconds.append(took)
        latencies += [answer.seconds for answer in answers]
        differing += sum(answer.text != text for answer, text in zip(answers, texts, strict=True))
    alone = statistics.median(alone_seconds)
    concurrent = statistics.median(concurrent_seconds)
    quantiles = statistics.quantiles(latencies, n=20, method="inclusive")
    figures = {
        "RTFx one by one": round(audio / alone, 2),
        "RTFx of concurrent clients": round(audio / concurrent, 2),
        "speed to one by one": round(alone / concurrent, 2),
        "latency p50 in s": round(quantiles[9], 3),
        "latency p95 in s": round(quantiles[18], 3),
        "texts that differ from those alone": differing,
    }
    return figures, texts


def measure_memory(
    server: Server, files: Sequence[bytes], clients: int, requests: int
) -> dict[str, Any]:
    """Send many requests, and compare the memory after a tenth of them with that after all."""
    contents = itertools.cycle(files)
    first = requests // 10
    at_once(server, list(itertools.islice(contents, first)), clients)
    before = server.megabytes()
    at_once(server, list(itertools.islice(contents, requests - first)), clients)
    after = server.megabytes()
    return {
        f"MB after {first} requests": round(before),
        f"MB after {requests} requests": round(after),
        "memory ratio": round(after / before, 3),
    }


def terminate_under_load(server: Server, files: Sequence[bytes], clients: int) -> dict[str, Any]:
    """Send SIGTERM while all clients send, and count the requests that were lost."""
    outcomes: list[str] = []
    answered = threading.Event()

    def send_until_refused() -> None:
        for content in itertools.cycle(files):
            try:
                server.send(content)
                outcomes.append("answered")
                answered.set()
            except httpx.ConnectError:
                outcomes.append("refused")
                return
            except httpx.HTTPError:
                outcomes.append("lost")
                return

    with ThreadPoolExecutor(clients) as threads:
        for _ in range(clients):
            threads.submit(send_until_refused)
        answered.wait(REQUEST_SECONDS)
        server.process.send_signal(signal.SIGTERM)
    return {
        **{name: outcomes.count(name) for name in ("answered", "refused", "lost")},
        "exit status": server.process.wait(REQUEST_SECONDS),
    }


def announce(phase: str) -> None:
    """Print what is measured next, because a phase may take minutes."""
    print(f"measuring: {phase}", file=sys.stderr, flush=True)


def main() -> None:
    """Run the benchmark, and print and write its results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", nargs="?", type=Path, metavar="MODEL", help="an exported directory"
    )
    parser.add_argument("--shards", type=Path, help="utterances to transcribe")
    parser.add_argument("--files", type=int, default=64, help="number of them; default: 64")
    parser.add_argument("--clients", type=int, default=64, help="default: %(default)s")
    parser.add_argument(
        "--requests", type=int, default=2000, help="for the memory; default: %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="use a tiny model, to test the script")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    with sigterm_raises(), tempfile.TemporaryDirectory() as folder:
        if arguments.tiny:
            from decode import tiny

            arguments.model, arguments.shards = tiny(Path(folder))
            arguments.files = 4
            arguments.clients = 4
            arguments.requests = 20
            arguments.rounds = 1
        if arguments.model is None or arguments.shards is None:
            parser.error("Use MODEL and --shards, or --tiny.")
        results = measure(arguments)
    text = json.dumps(results, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all figures."""
    files, audio = read_files(arguments.shards, arguments.files)
    model = arguments.model.resolve()
    port = free_port()
    command = [REPOSITORY / "launch" / "serve.py", model, "--port", port, "--dtype", "float32"]
    with running(command, port, model.name) as server:
        at_once(server, files[:2], 2)
        announce("one client, then all clients at once")
        speed, _ = compare_speed(server, files, audio, arguments.clients, arguments.rounds)
        announce("memory")
        memory = measure_memory(server, files, arguments.clients, arguments.requests)
        announce("SIGTERM")
        end = terminate_under_load(server, files, arguments.clients)
    port = free_port()
    options = ("--trust-remote-code", "--device", "cpu", "--dtype", "float32", "--port", port)
    with running(["-c", TRANSFORMERS_SERVE, "serve", model, *options], port, str(model)) as server:
        server.send(files[0])
        announce("transformers serve")
        took, _ = timed(lambda: at_once(server, files, arguments.clients))
    theirs = round(audio / took, 2)
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}",
        "files": len(files),
        "seconds of audio": round(audio, 1),
        "clients": arguments.clients,
        "rounds": arguments.rounds,
        **speed,
        "RTFx of transformers serve": theirs,
        "speed to transformers serve": round(speed["RTFx of concurrent clients"] / theirs, 2),
        **memory,
        "SIGTERM under load": end,
    }


if __name__ == "__main__":
    main()
