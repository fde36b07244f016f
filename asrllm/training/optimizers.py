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

LR_PARTS = ("projector", "lora", "audio_encoder", "llm")
ParamGroup = dict[str, Any]  # one group of torch.optim.Optimizer.param_groups


def part_of(name: str) -> str:
    """Return the part of the model that a parameter belongs to. All adapters are "lora"."""
    return "lora" if "lora_" in name else name.split(".")[0]


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], *, lr: float, lr_of: PeakRates, weight_decay: float
) -> list[ParamGroup]:
    """Split the trained parameters into groups by part and by whether they decay.

    Matrices decay; biases and norms do not. The order of the groups is fixed.

    Args:
        parameters: all parameters of the model by name.
        lr: peak learning rate of the run.
        lr_of: peak learning rates of the parts.
        weight_decay: weight decay of matrices.

    Returns:
        The groups that are not empty. `lr_ratio` is the ratio of the group's rate to `lr`.

    Raises:
        UserError: a part has a learning rate but no trained parameter.
    """
    by_kind: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for part in LR_PARTS:
        by_kind[part, True] = []
        by_kind[part, False] = []
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            by_kind[part_of(name), _is_matrix(parameter)].append(parameter)
    for part, rate in vars(lr_of).items():
        if rate is not None and not by_kind[part, True] and not by_kind[part, False]:
            raise UserError(
                f"trainer.lr_of.{part}={rate} has no effect, because nothing of {part} is trained. "
                "Remove it, or shorten model.frozen_parameters."
            )
    groups = []
    for (part, decays), group in by_kind.items():
        if group:
            groups.append(
                {
                    "params": group,
                    "lr": lr,
                    "lr_ratio": (getattr(lr_of, part) or lr) / lr,
                    "weight_decay": weight_decay if decays else 0.0,
                }
            )
    return groups


def _is_matrix(parameter: nn.Parameter) -> bool:
    return len(full_shape(parameter)) > 1


def make_optimizer(
    name: str,
    groups: list[ParamGroup],
    *,
    lr: float,
    betas: tuple[float, float],
    device: torch.device,
    offload: bool,
) -> torch.optim.Optimizer:
    """Build an optimizer.

    Args:
        name: trainer.optimizer.name.
        groups: parameter groups.
        lr: peak learning rate.
        betas: AdamW's two decay rates.
        device: device of this rank.
        offload: whether the optimizer state is in host memory.

    Raises:
        UserError: an operator of DeepSpeed cannot be compiled.
    """
    if name == "scaled_adam":
        return ScaledAdam(groups, lr=lr, betas=betas)
    on_device = device.type != "cpu" and not offload
    if name == "deepspeed_adamw":
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        if on_device:
            with compiling("fused_adam"):
                return FusedAdam(groups, lr=lr, betas=betas)
        with compiling("cpu_adam"):
            return DeepSpeedCPUAdam(groups, lr=lr, betas=betas)
    fused = device.type == "cuda" and not offload
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Put the directory of Python on PATH, where ninja is even if no environment is active."""
    path_before = os.environ["PATH"]
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path_before}"
    try:
        yield
    finally:
        os.environ["PATH"] = path_before


@contextlib.contextmanager
def compiling(op: str) -> Iterator[None]:
    """Let one process at a time compile an operator of DeepSpeed at its first use.

    Args:
        op: the operator's name, for example "cpu_adam".

    Raises:
        UserError: the operator cannot be compiled.
    """
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _ninja_on_path(), FileLock(folder / f"{op}.asrllm.lock"):
            # a killed build leaves torch's own lock behind, on which torch would wait forever
            for stale_lock in folder.glob(f"**/{op}/lock"):
                stale_lock.unlink()
            yield
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"trainer.optimizer.name=deepspeed_adamw needs the operator {op}, which cannot be "
            f"compiled in {str(folder)!r} ({reason}). "
            "Install a C++ compiler, or set trainer.optimizer.name=adamw."
        ) from error
