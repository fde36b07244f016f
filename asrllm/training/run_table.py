"""Table printed at the start of a training run: what is trained, on what, and from where."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from asrllm.models.state_dict import is_adapter
from asrllm.training.checkpoint.partitions import full_shape
from asrllm.training.run_config import TrainerConfig


@dataclass(frozen=True, kw_only=True)
class PartSize:
    """Parameters of one part of the model.

    Attributes:
        name: "audio_encoder", "projector", "llm" or "adapters".
        trained: number of parameters that the optimizer updates.
        total: number of all parameters of the part.
    """

    name: str
    trained: int
    total: int


def part_sizes(model: nn.Module) -> list[PartSize]:
    """Count the parameters of each part, including those that ZeRO-3 partitions.

    Adapters count as a separate part.
    """
    trained: dict[str, int] = {}
    total: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = "adapters" if is_adapter(name) else name.partition(".")[0]
        size = math.prod(full_shape(parameter))
        total[part] = total.get(part, 0) + size
        trained[part] = trained.get(part, 0) + size * parameter.requires_grad
    return [PartSize(name=part, trained=trained[part], total=total[part]) for part in total]


def run_rows(
    config: TrainerConfig,
    sizes: Sequence[PartSize],
    *,
    ranks: int,
    stage: int,
    total_steps: int,
    max_tokens: int,
    checkpoint: Path | None,
    init_from: str | None,
    step: int,
) -> list[tuple[str, str]]:
    """Return the rows of the table as (label, value).

    Args:
        config: `trainer` part of the run's configuration.
        sizes: parameters of each part, from `part_sizes`.
        ranks: number of processes.
        stage: ZeRO stage.
        total_steps: number of steps of the whole run.
        max_tokens: largest number of tokens in a micro-batch of one rank.
        checkpoint: checkpoint to resume from, or None for a new run.
        init_from: exp_dir of the run whose weights a new run starts with, or None.
        step: optimizer steps done.
    """
    rows = []
    for size in sizes:
        rows.append((size.name, f"{millions(size.trained)} of {millions(size.total)} trained"))
    trained = sum(size.trained for size in sizes)
    total = sum(size.total for size in sizes)
    rows.append(("all parameters", f"{millions(trained)} of {millions(total)} trained"))
    rows.append(("processes", f"{ranks}, ZeRO stage {stage}, {config.precision}"))
    steps = f"{step} of {total_steps} done"
    if step >= total_steps:
        steps = f"{step} done, {total_steps} wanted: the training is complete"
    rows.append(("steps", steps))
    tokens = max_tokens * config.gradient_accumulation_steps * ranks
    rows.append(("tokens per step", f"at most {tokens}, prompts not counted"))
    rows.append(("starts from", _starting_point(checkpoint, init_from)))
    scored = "pretrained.pt, the last checkpoint"
    if config.use_averaged_model:
        scored += "; the running average with checkpoint.model.use_averaged_model=true"
    rows.append(("evaluated weights", scored))
    return rows


def _starting_point(checkpoint: Path | None, init_from: str | None) -> str:
    """Return where the first weights come from."""
    if checkpoint is not None:
        return str(checkpoint)
    if init_from:
        return f"the weights of {init_from}"
    return "new weights"


def millions(count: int) -> str:
    """Return a number of parameters in millions with three significant digits."""
    value = count / 1e6
    digits = max(0, 2 - math.floor(math.log10(value))) if value >= 0.01 else 4
    return f"{value:.{digits}f}M" if count else "0"


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Print the table to standard error."""
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:<{width}}  {value}", file=sys.stderr, flush=True)
