"""Speed of decoding a test set relative to transformers' generate with the same model.

    python benchmarks/decode.py MODEL --shards DIR [--weights FILE] [--batch-size B] [--vllm] \\
        [--tokens-per-second R] [--rounds R] [--output FILE]
    python benchmarks/decode.py --tiny
    OMP_NUM_THREADS=1 torchrun --nproc_per_node=CORES benchmarks/decode.py ...

All methods decode the same waveforms from the shards with the same model, and take turns. generate
has the linear layers of torch, ours on the CPU those of oneDNN (asrllm/models/cpu_linear.py). It
decodes one utterance at a time, or batches of a fixed size; it takes the utterances in the order of
the shards and pads each batch to its longest. Ours is the method of `asrllm evaluate`: batches of
similar durations within a budget of seconds, the next batch is read during decoding, and finished
rows leave the batch. The texts are compared. With --vllm, in an environment with vLLM, its engine
decodes in the same way, in one batch, in a process of its own, and without what it cached in the
round before. "ours, busy" is ours while another process keeps one core busy. Peak memory is what a
method adds to the loaded models, in its process and in those below it.

With --tokens-per-second no text ends by itself. Each has the length that its audio allows, plus
ten tokens. This measures long texts with a model that writes short ones. With torchrun, ours
distributes the utterances over the ranks, as in an evaluation, and generate gets as many threads
as there are ranks, so that every method has the whole machine. """

import argparse
import contextlib
import copy
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

from asrllm import AutoModel, distributed
from asrllm.audio.reader import Reader
from asrllm.collator.batch import pad_left
from asrllm.data.cache import ShardCache
from asrllm.data.config import CacheConfig
from asrllm.data.corpora import Corpus, make_corpus
from asrllm.data.index import open_index
from asrllm.data.plan import Item
from asrllm.defaults import RATE
from asrllm.evaluation.decode import CorpusOptions, decode_corpus
from asrllm.evaluation.engine import Engine, TorchEngine
from asrllm.evaluation.journal import Journal
from asrllm.models.asr_llm.generation import token_limit
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.cpu_linear import CpuLinear

MAX_NEW_TOKENS = 100
Rate = float | None  # tokens per second


@torch.no_grad()
def plain(model: Any, corpus: Corpus, prompt: str, rate: Rate, batch_size: int) -> list[str]:
    """Decode with transformers' generate, as its users write it."""
    reader, processor = Reader([corpus]), model.processor
    stops, texts = processor.renderer.stop_ids, []
    for start in range(0, len(corpus.index), batch_size):
        rows = range(start, min(start + batch_size, len(corpus.index)))
        waves, samples = processor.load_waves(
            [reader.read(Item(corpus=0, row=row)).wave for row in rows]
        )
        limits = [token_limit(n / RATE, MAX_NEW_TOKENS, rate) for n in samples.tolist()]
        chats = [processor.renderer.user_messages(prompt)] * len(rows)
        features, lengths = model.audio_encoder.features(waves, samples)
        ids, mask = pad_left(
            processor.encode_prompts(
                chats, [1] * len(rows), model.config.num_audio_tokens(samples).tolist()
            )
        )
        answers = model.llm.generate(
            inputs_embeds=model.embed(ids, model.encode(features, lengths)),
            attention_mask=mask,
            max_new_tokens=max(limits),
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=stops[0],
        )
        kept = [row[:limit] for row, limit in zip(answers, limits, strict=True)]
        texts += [
            text.strip()
            for text in processor.tokenizer.batch_decode(kept, skip_special_tokens=True)
        ]
    return texts


def decode(engine: Engine, corpus: Corpus, prompt: str, batch_seconds: float) -> list[str]:
    """Decode like `asrllm evaluate`."""
    options = CorpusOptions(prompt=prompt, max_batch_duration=batch_seconds, max_bad_share=0)
    with tempfile.TemporaryDirectory() as folder:
        cache = ShardCache.from_config(CacheConfig(dir=folder, max_gb=1.0))
        decoded = decode_corpus(
            engine, corpus, options, str, cache, Journal(Path(folder), corpus.name, settings=None)
        )
    return [transcript.raw_hypothesis for transcript in decoded.transcripts]


def busy_decode(engine: Engine, corpus: Corpus, prompt: str) -> list[str]:
    """Decode like `asrllm evaluate` beside a busy core."""
    with busy_core():
        return decode(engine, corpus, prompt, 240.0)


def with_torch_layers(model: AsrLlmModel) -> AsrLlmModel:
    """Return a copy of a model whose linear layers are those of torch."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if type(module) is CpuLinear:
            module.__class__ = torch.nn.Linear
    return copied


def never_end(model: Any) -> None:
    """Prevent the model from ending a text."""

    def forward(_: Any, __: Any, output: Any) -> Any:
        output.logits[..., model.processor.renderer.stop_ids] = -1e4
        return output

    model.causal_lm.register_forward_hook(forward)


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Keep one core busy with another process."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def vllm_process(*settings: Any) -> Iterator[Callable[[], list[str]]]:
    """Start vLLM in a process of its own, and yield a function that decodes with it.

    In ours, vLLM would change how memory is allocated: our engine took 8 % longer.

    Args:
        settings: those of `run_vllm`.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_vllm, args=(theirs, *settings), daemon=True)
    process.start()
    theirs.close()
    ours.recv()  # the model is loaded

    def decode_with_vllm() -> list[str]:
        ours.send(True)
        texts: list[str] = ours.recv()
        return texts

    yield decode_with_vllm
    ours.send(False)
    process.join()


def run_vllm(
    connection: Connection,
    model: Path,
    shards: Path,
    dtype: str,
    weights: Path | None,
    options: dict[str, Any],
    prompt: str,
) -> None:
    """Decode with vLLM when the connection says so, each time as if for the first time."""
    from asrllm.evaluation.vllm.engine import load_vllm_engine

    engine = load_vllm_engine(model, options, dtype=dtype, weights=weights)
    corpus = make_corpus("test", open_index(shards), None)
    connection.send(None)
    while connection.recv():
        # it would answer from the keys and values of the round before
        engine.llm.reset_prefix_cache()
        engine.llm.reset_mm_cache()
        engine.llm.llm_engine.reset_encoder_cache()
        connection.send(decode(engine, corpus, prompt, math.inf))
    engine.close()


class PeakMemory:
    """The largest memory of this process and of those below it since it was made, in GB."""

    def __init__(self) -> None:
        self.processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        for process in self.processes:
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # resets VmHWM
        self.before = self._sum("VmRSS")

    def growth(self) -> float:
        """Return by how much the memory has grown at most."""
        return (self._sum("VmHWM") - self.before) / 1e6

    def _sum(self, field: str) -> int:
        """Return the sum of a field of /proc/PID/status, in kB."""
        lines = [Path(f"/proc/{process.pid}/status").read_text() for process in self.processes]
        return sum(int(text.partition(f"{field}:")[2].split()[0]) for text in lines)


def measure(
    ways: dict[str, Callable[[], list[str]]], rounds: int
) -> tuple[dict[str, float], dict[str, list[str]], dict[str, float]]:
    """Return the median seconds, the texts and the peak GB of each method.

    The methods take turns. All ranks run ours. The first rank runs the other methods, with the
    threads of all ranks.
    """
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    texts: dict[str, list[str]] = {}
    peaks: dict[str, list[float]] = {way: [] for way in ways}
    threads = torch.get_num_threads()
    for way, run in list(ways.items()) * rounds:
        distributed.gather_objects(None)  # the other ranks wait here
        memory = PeakMemory()
        began = time.perf_counter()
        if way.startswith("ours"):
            texts[way] = run()
        elif distributed.rank() == 0:
            torch.set_num_threads(threads * distributed.world_size())
            texts[way] = run()
            torch.set_num_threads(threads)
        seconds[way].append(time.perf_counter() - began)
        peaks[way].append(memory.growth())
    return medians(seconds), texts, medians(peaks)


def medians(values: dict[str, list[float]]) -> dict[str, float]:
    """Return the median of each list, rounded."""
    return {name: round(statistics.median(numbers), 3) for name, numbers in values.items()}


def tiny(folder: Path) -> tuple[Path, Path]:
    """Write a model with random weights and a few tones, and return their directories."""
    from asrllm.data.shards import write_shards
    from asrllm.data.sources import read_kaldi
    from asrllm.models.build import build_model, build_processor
    from asrllm.models.model_args import EncoderPart, LlmPart, ModelConfig
    from asrllm.testing import kaldi_directory, tiny_llm, tiny_whisper, tone_sentences

    config = ModelConfig(
        audio_encoder=EncoderPart(
            model_type="whisper",
            pretrained_model=str(tiny_whisper(folder / "whisper")),
            frozen=True,
        ),
        llm=LlmPart(
            model_type="qwen2",
            pretrained_model=str(tiny_llm(folder / "llm")),
            frozen=True,
            lora=None,
            chat_template=None,
        ),
        projector="mlp",
        projector_hidden_size=32,
        audio_encoder_projector_ds_rate=4,
        audio_token="<|AUDIO|>",
        tag_audio_boundary=False,
        frozen_parameters=[],
        exclude_from_checkpoint=[],
    )
    processor = build_processor(config, pad_to_30s=False, prompts=("Transcribe.",))
    build_model(processor, frozen=("audio_encoder", "llm"), dtype=torch.float32).save_pretrained(
        folder / "model"
    )
    write_shards(
        folder / "shards", read_kaldi(kaldi_directory(folder / "kaldi", tone_sentences(12)))
    )
    return folder / "model", folder / "shards"


def main() -> None:
    """Run the benchmark, and print and write its results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model",
        nargs="?",
        type=Path,
        metavar="MODEL",
        help="an exported directory, or a run's exp_dir",
    )
    parser.add_argument("--weights", type=Path, help="a run's weights file")
    parser.add_argument("--shards", type=Path, help="utterances to decode")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="size of the fixed batches; default: %(default)s"
    )
    parser.add_argument(
        "--tokens-per-second",
        type=float,
        metavar="R",
        help="length of every text; default: the model ends its texts",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--vllm", action="store_true", help="measure vLLM too")
    parser.add_argument("--tiny", action="store_true", help="use a tiny model, to test the script")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        where, shards = (
            tiny(Path(folder)) if arguments.tiny else (arguments.model, arguments.shards)
        )
        if where is None or shards is None:
            parser.error("Use MODEL and --shards, or --tiny.")
        results = compare(where, shards, arguments)
    if not results:
        return
    text = json.dumps(results, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


def compare(where: Path, shards: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all methods, and return the results on the first rank."""
    if distributed.world_size() > 1:
        distributed.start()
    model = AutoModel.from_pretrained(where, weights=arguments.weights, dtype=arguments.dtype)
    corpus = make_corpus("test", open_index(shards), None)
    theirs = with_torch_layers(model)
    prompt, fixed = (
        (model.config.prompts or ["Transcribe."])[0],
        f"batches of {arguments.batch_size}",
    )
    given = theirs, corpus, prompt, arguments.tokens_per_second
    if arguments.tokens_per_second:
        never_end(model)
        never_end(theirs)
    options = {
        "max_new_tokens": MAX_NEW_TOKENS,
        "max_tokens_per_second": arguments.tokens_per_second,
    }
    torch_engine = TorchEngine(model, options)
    ways: dict[str, Callable[[], list[str]]] = {
        "ours": lambda: decode(torch_engine, corpus, prompt, 240.0),
        "ours, busy": lambda: busy_decode(torch_engine, corpus, prompt),
        fixed: lambda: plain(*given, arguments.batch_size),
        "one by one": lambda: plain(*given, 1),
    }
    with contextlib.ExitStack() as stack:
        if arguments.vllm:
            settings = where, shards, arguments.dtype, arguments.weights, options, prompt
            ways["vLLM"] = stack.enter_context(vllm_process(*settings))
        seconds, texts, peaks = measure(ways, arguments.rounds)
    if distributed.rank() != 0:
        return {}
    audio = corpus.index.hours * 3600
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}",
        "ranks": distributed.world_size(),
        "threads a rank": torch.get_num_threads(),
        "dtype": arguments.dtype,
        "tokens a second": arguments.tokens_per_second,
        "rounds": arguments.rounds,
        "utterances": len(corpus.index),
        "seconds of audio": round(audio, 1),
        "seconds": seconds,
        "RTFx": {way: round(audio / s, 2) for way, s in seconds.items()},
        "peak GB": peaks,
        "speed to others": {
            way: round(other / seconds["ours"], 2) for way, other in seconds.items()
        },
        "texts that differ": {
            way: sum(a != b for a, b in zip(texts["ours"], other, strict=True))
            for way, other in texts.items()
        },
    }


if __name__ == "__main__":
    main()
