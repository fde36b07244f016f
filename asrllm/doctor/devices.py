"""Accelerators, their number formats, and the attention kernels that they can run."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from asrllm.doctor.findings import Finding, ok, problem, warning
from asrllm.doctor.system import GIB
from asrllm.models.attention import backends

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
CPU_INFO = Path("/proc/cpuinfo")
# flags of CPUs that multiply bfloat16: of x86, and of ARM
BF16_FLAGS = re.compile(r"\b(avx512_bf16|amx_bf16|bf16)\b")


def check_devices(environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Report the accelerators that torch can use."""
    if not torch.accelerator.is_available():
        return [*check_unused_gpu(environment), *check_cpu()]
    if not torch.cuda.is_available():
        kind = torch.accelerator.current_accelerator()
        return [ok("accelerator", f"{torch.accelerator.device_count()} accelerators ({kind})")]
    return [check_gpu(index) for index in range(torch.cuda.device_count())]


def check_unused_gpu(environment: Mapping[str, str]) -> list[Finding]:
    """Report a machine with a GPU that torch cannot use, so that training would run on the CPU."""
    if not NVIDIA_DRIVER.exists():
        return []
    text = f"there is an NVIDIA driver, but torch {torch.__version__} cannot use a GPU"
    fix = "Run nvidia-smi. If it lists the GPU, install a torch for a CUDA version of the driver."
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        text = f"{text} with CUDA_VISIBLE_DEVICES={visible!r}"
        fix = f"Run 'unset CUDA_VISIBLE_DEVICES' if the job may use all GPUs. {fix}"
    if torch.version.cuda is None:
        text = f"there is an NVIDIA driver, but torch {torch.__version__} is built without CUDA"
        fix = "Install a torch with CUDA: https://pytorch.org/get-started/locally."
    return [problem("accelerator", text, fix)]


def check_cpu() -> list[Finding]:
    """Report that training runs on the CPU, and whether bfloat16 is slow there."""
    findings = [
        warning(
            "accelerator",
            "torch finds no accelerator, so training runs on the CPU",
            "Use a machine with a GPU for models larger than those of the quickstart.",
        )
    ]
    if CPU_INFO.exists() and not BF16_FLAGS.search(CPU_INFO.read_text(errors="replace")):
        text = "the CPU has no bfloat16 instructions, so trainer.precision=bf16 is slow"
        findings.append(warning("bfloat16", text, "Set trainer.precision=fp32 on this machine."))
    return findings


def check_gpu(index: int) -> Finding:
    """Report one GPU, and whether it computes in bfloat16."""
    about = torch.cuda.get_device_properties(index)
    memory = about.total_memory / GIB
    text = f"GPU {index} is a {about.name} with {memory:.0f} GiB"
    # Before Ampere (8.0), bfloat16 is emulated.
    if torch.version.cuda and (about.major, about.minor) < (8, 0):
        fix = "Set trainer.precision=fp16 or fp32."
        return warning("bfloat16", f"{text} and has no bfloat16", fix)
    return ok("accelerator", f"{text} and bfloat16")


def check_attention() -> list[Finding]:
    """Report which attention backends can run here, see asrllm/models/attention.py."""
    missing = {name: reason for name, reason in backends().items() if reason}
    usable = [name for name in backends() if name not in missing]
    text = f"attention over packed rows can use {' and '.join(usable)}"
    reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
    if reasons:
        text = f"{text} ({reasons})"
    if torch.cuda.is_available() and not {"flash", "varlen"} & set(usable):
        fix = "Run pip install 'asrllm[gpu]', which is faster than one call for each utterance."
        return [warning("attention", text, fix)]
    return [ok("attention", text)]
