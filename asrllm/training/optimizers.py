"""The optimizer and its parameter groups."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.cpp_extension import get_default_build_root

from asrllm.errors import UserError
from asrllm.locks import FileLock
from asrllm.training.checkpoint.partitions import full_shape
from asrllm.training.run_config import PeakRates
from asrllm.training.scaled_adam import ScaledAdam

PARTS = ("projector", "lora", "audio_encoder", "llm")


def part_of(name: str) -> str:
    """Adapters are `lora` wherever they are; all else goes by the model's part."""
    return "lora" if "lora_" in name else name.split(".")[0]


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], *, lr: float, lr_of: PeakRates, weight_decay: float
) -> list[dict[str, Any]]:
    """One group for each part and for what of it decays (matrices) and does not, in a fixed order; `lr_ratio` is to `lr`."""
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    by_kind: dict[tuple[str, bool], list[nn.Parameter]] = {
        (part, decays): [] for part in PARTS for decays in (True, False)
    }
    for name, parameter in trained.items():
        by_kind[part_of(name), _is_matrix(parameter)].append(parameter)
    for part, rate in vars(lr_of).items():
        if rate is not None and not any(by_kind[part, decays] for decays in (True, False)):
            raise UserError(
                f"trainer.lr_of.{part}={rate}, but nothing of {part} is trained: leave it out, or train it"
            )
    return [
        {
            "params": group,
            "lr": lr,
            "lr_ratio": (getattr(lr_of, part) or lr) / lr,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (part, decays), group in by_kind.items()
        if group
    ]


def _is_matrix(parameter: nn.Parameter) -> bool:
    return len(full_shape(parameter)) > 1


def make_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float],
    device: torch.device,
    offload: bool,
) -> torch.optim.Optimizer:
    if name == "scaled_adam":
        return ScaledAdam(groups, lr=lr, betas=betas)
    if name == "deepspeed_adamw":
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        on_device = device.type != "cpu" and not offload
        kind, op = (FusedAdam, "fused_adam") if on_device else (DeepSpeedCPUAdam, "cpu_adam")
        with building(op):
            return kind(groups, lr=lr, betas=betas)
    return torch.optim.AdamW(
        groups, lr=lr, betas=betas, fused=device.type == "cuda" and not offload
    )


@contextlib.contextmanager
def building(op: str) -> Iterator[None]:
    """An operator of DeepSpeed's is compiled inside at its first use, by one process at a time. Raises UserError where it cannot be."""
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    folder.mkdir(parents=True, exist_ok=True)
    before, programs = (
        os.environ["PATH"],
        str(Path(sys.executable).parent),
    )  # ninja is there, also where the environment is not activated
    os.environ["PATH"] = f"{programs}{os.pathsep}{before}"
    try:
        with FileLock(folder / f"{op}.asrllm.lock"):
            for left in folder.glob(
                f"**/{op}/lock"
            ):  # by a build that was killed; torch would wait for it without end
                left.unlink()
            yield
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"trainer.optimizer.name=deepspeed_adamw: its operator {op} cannot be compiled in {str(folder)!r} "
            f"({' '.join(str(error).split())[:200]}): install a C++ compiler, or take trainer.optimizer.name=adamw"
        ) from error
    finally:
        os.environ["PATH"] = before
