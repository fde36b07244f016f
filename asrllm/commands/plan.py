"""asrllm plan: what a run will take, before it is started."""

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from asrllm.atomic import write_whole
from asrllm.data.index import RATE
from asrllm.data.prompts import read_prompts
from asrllm.errors import UserError
from asrllm.hydra_app import run_app
from asrllm.models.asr_llm.processing import AsrLlmProcessor
from asrllm.models.build import describe_model
from asrllm.training.data import TrainingData
from asrllm.training.ds_config import read_ds_config
from asrllm.training.memory_estimate import (
    CONTEXT,
    SLACK,
    count_sizes,
    measure_activations,
    on_meta,
    state_memory,
)
from asrllm.training.run_config import TrainRun

DS_CONFIGS = tuple(
    f"ds_configs/{name}.json"
    for name in ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
)
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class PlanRun(TrainRun):
    gpus: int
    gpu_memory: float | None
    output: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus < 1:
            raise UserError(f"gpus={self.gpus} must be at least 1")
        if self.gpu_memory is not None and not 0 < self.gpu_memory < 1e5:
            raise UserError(
                f"gpu_memory={self.gpu_memory} must be a number of GB above 0; null: of the GPU at hand, else 80"
            )


def run(arguments: argparse.Namespace) -> None:
    run_app("plan", arguments, PlanRun, plan_and_show)


def plan_and_show(config: PlanRun) -> None:
    found = plan(config)
    show(found)
    if config.output:
        write_whole(Path(config.output), json.dumps(found, indent=1) + "\n")


def plan(config: PlanRun) -> dict[str, Any]:
    """{"data": of an epoch, "model": numbers of weights, "memory": by DeepSpeed JSON}; bytes."""
    prompts = read_prompts(config.prompt_file)
    processor = describe_model(
        config.model,
        pad_to_30s=config.data.pad_to_30s,
        prompts=tuple(prompt.text for prompt in prompts),
    )
    data = data_of_an_epoch(TrainingData(config, processor, prompts), config.gpus)
    return {
        "data": data,
        **memory_by_stage(
            config, processor, data["tokens of the largest row"], data["share of audio tokens"]
        ),
    }


def data_of_an_epoch(data: Any, ranks: int) -> dict[str, Any]:
    """Counts of the corpora, and what the batches of the plan's first window look like on so many ranks."""
    batches = [batch for batch in data.plan.typical_batches(ranks) if len(batch)]
    audio = sum(int(data.tokens(batch["samples"].astype("int64")).sum()) for batch in batches)
    samples = sum(int(batch["samples"].sum(dtype="int64")) for batch in batches)
    prompt = max(
        len(data.renderer.encode_prompt(data.renderer.user_messages(prompt.text), [0]))
        for prompt in data.prompts
    )
    return {
        "utterances": sum(corpus.kept for corpus in data.corpora),
        "hours": round(sum(corpus.kept_hours for corpus in data.corpora), 2),
        "steps an epoch": None
        if data.plan.endless
        else data.plan.estimate_steps(ranks=ranks, accumulation=data.accumulation),
        "utterances a batch": round(sum(map(len, batches)) / len(batches), 1),
        "audio seconds a batch": round(samples / RATE / len(batches), 1),
        "padding of the audio": round(
            1 - samples / sum(len(batch) * int(batch["samples"].max()) for batch in batches), 4
        ),
        "share of audio tokens": round(
            audio
            / sum(
                int(batch["tokens"].sum(dtype="int64")) + prompt * len(batch) for batch in batches
            ),
            3,
        ),
        "tokens of the largest row": max(
            int(batch["tokens"].sum(dtype="int64")) + prompt * len(batch) for batch in batches
        ),
    }


def memory_by_stage(
    config: PlanRun, processor: AsrLlmProcessor, tokens: int, audio: float
) -> dict[str, Any]:
    trainer, budget = config.trainer, config.data.sampler.max_tokens
    model = on_meta(processor.config, config.model, trainer.dtype)
    activations = measure_activations(
        model, dtype=trainer.dtype, recompute=trainer.gradient_checkpointing, audio=audio
    )
    total = (config.gpu_memory or gpu_at_hand()) * GB
    usable, by_stage = (total - CONTEXT) * (1 - SLACK), {}
    for name in dict.fromkeys((*DS_CONFIGS, trainer.deepspeed_config)):
        ds = read_ds_config(
            dataclasses.replace(trainer, deepspeed_config=name), world_size=config.gpus
        )
        sizes = count_sizes(
            model, threshold=ds["zero_optimization"].get("stage3_param_persistence_threshold", 0)
        )
        arguments = {"ranks": config.gpus, "width": trainer.dtype.itemsize}
        memory = state_memory(sizes, ds, **arguments, activations=activations.bytes(tokens))
        without = state_memory(sizes, ds, **arguments, activations=0)
        most = activations.tokens(usable - without.device)
        by_stage[name] = memory.as_dict() | {
            "fits": memory.device <= usable,
            "largest data.sampler.max_tokens": int(
                most * budget / max(tokens, 1)
            ),  # prompts come on top of the budget
        }
    return {
        "model": dataclasses.asdict(sizes),
        "activations": dataclasses.asdict(activations),
        "gpu": {"bytes": int(total), "usable": int(usable)},
        "data.sampler.max_tokens": budget,
        "memory": by_stage,
    }


def gpu_at_hand() -> float:
    """GB of this machine's GPU; 80 without one."""
    return (
        torch.cuda.get_device_properties(0).total_memory / GB if torch.cuda.is_available() else 80.0
    )


def show(found: dict[str, Any]) -> None:
    console = Console(width=130, highlight=False)
    for key, value in found["data"].items():
        console.print(f"{key}: {value}")
    model = found["model"]
    console.print(
        f"weights: {model['weights'] / 1e6:,.1f} M, of which {model['trained'] / 1e6:,.1f} M are trained"
    )
    table = Table(
        title=f"GB on each of the GPUs of {found['gpu']['bytes'] / GB:.0f} GB, data.sampler.max_tokens={found['data.sampler.max_tokens']}"
    )
    columns = (
        "weights",
        "masters",
        "moments",
        "gradients",
        "gathered",
        "activations",
        "device",
        "host",
    )
    for column in ("DeepSpeed JSON", *columns, "fits", "max_tokens"):
        table.add_column(
            column, justify="left" if column == "DeepSpeed JSON" else "right", no_wrap=True
        )
    for name, memory in found["memory"].items():
        sizes = [f"{memory[column] / GB:.2f}" for column in columns]
        table.add_row(
            Path(name).stem,
            *sizes,
            "yes" if memory["fits"] else "no",
            str(memory["largest data.sampler.max_tokens"]),
        )
    console.print(table)
    console.print(
        "max_tokens: the largest data.sampler.max_tokens that fits; try one below it first"
    )
