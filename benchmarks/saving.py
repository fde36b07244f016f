"""Time that writing a checkpoint adds to a step, in the background and in the foreground.

    python benchmarks/saving.py [--rounds R] [--steps N] [--every K] [--tiny] [--output FILE]

`launch/train.py` trains an LLM of SmolLM2-135M's shape with random weights, fully in float32 with
AdamW and ZeRO-1 in one process. Background ("beside training") and foreground ("at once") take
turns. The results are medians over all steps of a kind, relative to steps without a checkpoint. A
step that saves takes from the end of its arithmetic to the end of the next step's. "steps after"
are those during which the files may still be written."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from asrllm.data.shards import write_shards
from asrllm.data.sources import read_kaldi
from asrllm.testing import (
    data_config,
    kaldi_directory,
    tiny_llm,
    tiny_tokenizer,
    tiny_whisper,
    tone_sentences,
)

REPOSITORY = Path(__file__).resolve().parents[1]
WAYS = {"beside training": "true", "at once": "false"}


def make_world(folder: Path, *, tiny: bool) -> None:
    """Write models and training data."""
    tiny_whisper(folder / "whisper")
    if tiny:
        tiny_llm(folder / "llm")
    else:
        config = Qwen2Config(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49152,
            tie_word_embeddings=True,
        )
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "llm")
        tiny_tokenizer().save_pretrained(folder / "llm")
    write_shards(
        folder / "shards",
        read_kaldi(kaldi_directory(folder / "kaldi", tone_sentences(400))),
        utterances_per_shard=400,
    )
    data_config(folder / "train.yaml", [{"name": "train", "shards": str(folder / "shards")}])


def train(folder: Path, exp: Path, *launcher: str, **others: Any) -> None:
    """Train with the models and data of `make_world`.

    Args:
        folder: directory of `make_world`.
        exp: the run's directory.
        launcher: the command before the script; default: the Python interpreter.
        others: overrides, with '__' in place of '.'.
    """
    overrides = {
        "exp_dir": exp,
        "model.audio_encoder.model_type": "whisper",
        "model.audio_encoder.pretrained_model": folder / "whisper",
        "model.llm.pretrained_model": folder / "llm",
        "model.llm.frozen": "false",
        "model.llm.lora.r": 0,
        "data.train_data_config": folder / "train.yaml",
        "data.sampler.max_tokens": 600,
        "data.sampler.max_utterances": 6,  # so that all steps have about the same work
        "data.filter.min_duration": 0.1,
        "data.filter.max_chars_per_second": 100,
        "data.use_infinite_dataset": "true",
        "trainer.deepspeed_config": "ds_configs/zero1.json",
        "trainer.num_epochs": "null",
        "trainer.precision": "fp32",  # faster than bf16 on a processor
        "trainer.log_every": 1,
        "trainer.sinks": "[]",
    } | {key.replace("__", "."): value for key, value in others.items()}
    command = [
        *(launcher or [sys.executable]),
        str(REPOSITORY / "launch" / "train.py"),
        *(f"{k}={v}" for k, v in overrides.items()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")


def seconds_of_steps(
    folder: Path, exp: Path, background: str, steps: int, every: int
) -> list[float]:
    """Train, and return the seconds of each step."""
    settings = {
        "num_steps": steps,
        "save_every": every,
        "keep_last_k": 1,
        "background_checkpoints": background,
    }
    train(folder, exp, **{f"trainer__{key}": value for key, value in settings.items()})
    records = [json.loads(line) for line in (exp / "metrics.jsonl").read_text().splitlines()]
    return [record["seconds_per_step"] for record in records if "loss" in record]


def kinds(seconds: list[float], every: int) -> dict[str, list[float]]:
    """Return the seconds of the steps by kind.

    A record includes the time since the previous one, so step k * every + 1 has the cost of saving.
    """
    found: dict[str, list[float]] = {"saves": [], "steps after": [], "others": []}
    for step, value in enumerate(seconds[:-1], start=1):
        place = (step - 1) % every
        # the first checkpoint allocates memory for the copies, and the steps before it are warm-up
        if step > 2 * every:
            kind = "saves" if place == 0 else "steps after" if place <= 2 else "others"
            found[kind].append(value)
    return found


def main() -> None:
    """Run the benchmark, and print and write its results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--steps", type=int, default=31, help="steps of a run; default: %(default)s"
    )
    parser.add_argument(
        "--every", type=int, default=6, help="steps between checkpoints; default: %(default)s"
    )
    parser.add_argument("--tiny", action="store_true", help="use a tiny LLM, to test the script")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    measured: dict[str, dict[str, list[float]]] = {
        way: {"saves": [], "steps after": [], "others": []} for way in WAYS
    }
    with tempfile.TemporaryDirectory() as name:
        make_world(Path(name), tiny=arguments.tiny)
        for round_ in range(arguments.rounds):
            for way, background in WAYS.items():
                exp = Path(name) / f"{round_}-{background}"
                for kind, values in kinds(
                    seconds_of_steps(Path(name), exp, background, arguments.steps, arguments.every),
                    arguments.every,
                ).items():
                    measured[way][kind] += values
                size = sum(
                    file.stat().st_size for file in exp.glob(f"checkpoint-{arguments.steps}/*")
                )
                subprocess.run(["rm", "-r", str(exp)], check=True)
    normal = statistics.median(
        measured["beside training"]["others"] + measured["at once"]["others"]
    )
    results = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}",
        "checkpoint bytes": size,
        "seconds of a step that does not save": round(normal, 4),
        "ratios to it": {
            way: {
                kind: round(statistics.median(values) / normal, 3)
                for kind, values in by_kind.items()
                if values
            }
            for way, by_kind in measured.items()
        },
    }
    text = json.dumps(results, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
