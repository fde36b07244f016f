"""asrllm plan: estimate the steps, padding and memory of a run before it starts."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from asrllm.atomic import check_text_output, write_whole
from asrllm.defaults import RATE
from asrllm.hydra_app import run_app
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.asr_llm.processing import AsrLlmProcessor
from asrllm.progress import waiting
from asrllm.text_files import JsonObject
from asrllm.training.data import TrainingData
from asrllm.training.ds_config import read_ds_config
from asrllm.training.memory_estimate import (
    CUDA_CONTEXT,
    SLACK,
    Activations,
    Memory,
    Sizes,
    count_sizes,
    measure_activations,
    on_meta,
    state_memory,
)
from asrllm.training.prepare import read_model_and_data
from asrllm.training.run_config import PlanRun
from asrllm.training.run_table import millions

DS_CONFIGS = (
    "ds_configs/zero0.json",
    "ds_configs/zero1.json",
    "ds_configs/zero2.json",
    "ds_configs/zero2_offload.json",
    "ds_configs/zero3.json",
    "ds_configs/zero3_offload.json",
)
GB = 1e9
DEFAULT_GPU_MEMORY = 80.0  # GB, on a machine without a GPU
# columns of the table, beside the DeepSpeed JSON and the budget; keys of Memory.as_dict
MEMORY_COLUMNS = (
    "weights",
    "masters",
    "moments",
    "gradients",
    "gathered",
    "activations",
    "device",
    "host",
)


def run(arguments: argparse.Namespace) -> None:
    """Run `asrllm plan`."""
    run_app("plan", arguments, PlanRun, plan_and_show)


def plan_and_show(config: PlanRun) -> None:
    """Print the plan, and write it as JSON if the configuration names a file."""
    if config.output:
        check_text_output(Path(config.output))  # before the work
    estimate = plan(config)
    print_estimate(estimate)
    if config.output:
        write_whole(Path(config.output), json.dumps(estimate, indent=1) + "\n")


def plan(config: PlanRun) -> JsonObject:
    """Estimate what a run needs.

    Returns:
        A JSON object. "data" describes an epoch, "model" has numbers of weights, and "memory" has
        bytes on each GPU by DeepSpeed JSON.
    """
    processor, training_data = read_model_and_data(config)
    data = describe_epoch(training_data, config.gpus)
    with waiting("estimating the memory of each ZeRO stage"):
        memory = estimate_memory(
            config,
            processor,
            tokens=data["tokens of the largest row"],
            audio_ratio=data["ratio of audio tokens"],
        )
    return {"gpus": config.gpus, "data": data, **memory}


def describe_epoch(data: TrainingData, ranks: int) -> JsonObject:
    """Count the corpora's utterances, and describe the batches of the plan's first window.

    Args:
        data: the training data.
        ranks: the number of ranks.
    """
    batches = [batch for batch in data.plan.typical_batches(ranks) if len(batch)]
    audio_tokens = sum(_audio_tokens(data, batch) for batch in batches)
    samples = sum(_exact_sum(batch["samples"]) for batch in batches)
    padded_samples = sum(len(batch) * int(batch["samples"].max()) for batch in batches)
    prompt_tokens = longest_prompt(data)
    row_tokens = [_exact_sum(batch["tokens"]) + prompt_tokens * len(batch) for batch in batches]
    utterances = sum(len(batch) for batch in batches)
    return {
        "utterances": sum(corpus.usable for corpus in data.corpora),
        "hours": round(sum(corpus.usable_hours for corpus in data.corpora), 2),
        "steps per epoch": _steps_of_epoch(data, ranks),
        "utterances per batch": round(utterances / len(batches), 1),
        "audio seconds per batch": round(samples / RATE / len(batches), 1),
        "audio padding ratio": round(1 - samples / padded_samples, 4),
        "ratio of audio tokens": round(audio_tokens / sum(row_tokens), 3),
        "tokens of the largest row": max(row_tokens),
    }


def _steps_of_epoch(data: TrainingData, ranks: int) -> int | None:
    """Return the number of steps of an epoch, or None if the data has no end."""
    if data.plan.endless:
        return None
    return data.plan.estimate_steps(ranks=ranks, accumulation=data.accumulation)


def longest_prompt(data: TrainingData) -> int:
    """Return the number of tokens of the longest prompt with its chat template."""
    lengths: list[int] = []
    for prompt in data.prompts:
        messages = data.renderer.user_messages(prompt.text)
        lengths.append(len(data.renderer.encode_prompt(messages, [0])))
    return max(lengths)


def _audio_tokens(data: TrainingData, batch: np.ndarray) -> int:
    return int(data.tokens(batch["samples"].astype("int64")).sum())


def _exact_sum(values: np.ndarray) -> int:
    return int(values.sum(dtype="int64"))


def estimate_memory(
    config: PlanRun, processor: AsrLlmProcessor, *, tokens: int, audio_ratio: float
) -> JsonObject:
    """Estimate the memory of each GPU for each DeepSpeed JSON.

    Args:
        config: the run and its hardware.
        processor: describes the model.
        tokens: tokens of the largest packed row.
        audio_ratio: ratio of audio tokens to all tokens.
    """
    trainer = config.trainer
    model = on_meta(processor.config, config.model, trainer.dtype)
    activations = measure_activations(
        model, dtype=trainer.dtype, recompute=trainer.gradient_checkpointing, audio=audio_ratio
    )
    total = (config.gpu_memory or this_gpu_memory()) * GB
    usable = (total - CUDA_CONTEXT) * (1 - SLACK)
    by_stage: JsonObject = {}
    for name in dict.fromkeys((*DS_CONFIGS, trainer.deepspeed_config)):
        sizes, memory, limit = memory_with(name, config, model, activations, tokens, usable)
        by_stage[name] = memory.as_dict() | {
            "fits": memory.device <= usable,
            "largest data.sampler.max_tokens": limit,
        }
    return {
        "model": dataclasses.asdict(sizes),
        "activations": dataclasses.asdict(activations),
        "gpu": {"bytes": int(total), "usable": int(usable)},
        "data.sampler.max_tokens": config.data.sampler.max_tokens,
        "memory": by_stage,
    }


def memory_with(
    ds_config: str,
    config: PlanRun,
    model: AsrLlmModel,
    activations: Activations,
    tokens: int,
    usable: float,
) -> tuple[Sizes, Memory, int]:
    """Estimate the memory of each GPU with one DeepSpeed JSON.

    Args:
        ds_config: the DeepSpeed JSON.
        config: the run and its hardware.
        model: model on the meta device.
        activations: bytes by number of tokens.
        tokens: tokens of the largest packed row.
        usable: bytes of a GPU that tensors can use.

    Returns:
        The model's sizes, the memory, and the largest data.sampler.max_tokens that fits.
    """
    trainer = dataclasses.replace(config.trainer, deepspeed_config=ds_config)
    ds = read_ds_config(trainer, world_size=config.gpus)
    threshold = ds["zero_optimization"].get("stage3_param_persistence_threshold", 0)
    sizes = count_sizes(model, threshold=threshold)

    def memory_of(activation_bytes: int) -> Memory:
        return state_memory(
            sizes,
            ds,
            ranks=config.gpus,
            width=trainer.dtype.itemsize,
            activations=activation_bytes,
        )

    memory = memory_of(activations.bytes(tokens))
    row_limit = activations.tokens(usable - memory_of(0).device)
    # the largest row has more tokens than the budget, which does not count prompts
    limit = int(row_limit * config.data.sampler.max_tokens / max(tokens, 1))
    return sizes, memory, limit


def this_gpu_memory() -> float:
    """Return the memory of this machine's GPU in GB, or 80 without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / GB
    return DEFAULT_GPU_MEMORY


def print_estimate(estimate: JsonObject) -> None:
    """Print the result of `plan`."""
    console = Console(width=130, highlight=False)
    for key, value in estimate["data"].items():
        console.print(f"{key}: {value}")
    weights = millions(estimate["model"]["weights"])
    trained = millions(estimate["model"]["trained"])
    console.print(f"weights: {weights}, of which {trained} are trained")
    console.print(memory_table(estimate))
    console.print(
        "max_tokens: the largest data.sampler.max_tokens that fits. Try a smaller value first."
    )


def memory_table(estimate: JsonObject) -> Table:
    """Return the table of memory by DeepSpeed JSON, in GB."""
    gpus = f"{estimate['gpus']} GPUs of {estimate['gpu']['bytes'] / GB:.0f} GB"
    budget = estimate["data.sampler.max_tokens"]
    table = Table(title=f"GB on each of {gpus}, data.sampler.max_tokens={budget}")
    table.add_column("DeepSpeed JSON", justify="left", no_wrap=True)
    for column in (*MEMORY_COLUMNS, "fits", "max_tokens"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, memory in estimate["memory"].items():
        table.add_row(Path(name).stem, *memory_cells(memory))
    return table


def memory_cells(memory: JsonObject) -> Sequence[str]:
    """Return the cells of one row of the memory table, without the name of the DeepSpeed JSON."""
    sizes = [f"{memory[column] / GB:.2f}" for column in MEMORY_COLUMNS]
    fits = "yes" if memory["fits"] else "no"
    return [*sizes, fits, str(memory["largest data.sampler.max_tokens"])]
