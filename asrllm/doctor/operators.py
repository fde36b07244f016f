"""Operators that DeepSpeed compiles when a run needs them."""

import os
import shutil
from collections.abc import Mapping

import torch
from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import CUDA_HOME

from asrllm.doctor.findings import Finding, ok, warning

OPTIMIZER = "trainer.optimizer.name=deepspeed_adamw"


def check_compilers(environment: Mapping[str, str] = os.environ) -> Finding:
    """Look for ninja, a C++ compiler, and on a CUDA device nvcc."""
    compiler = environment.get("CXX", "c++")
    missing = [name for name in ("ninja", compiler) if not shutil.which(name)]
    is_cuda = get_accelerator().device_name() == "cuda" and torch.version.cuda is not None
    nvcc = os.path.join(CUDA_HOME or "", "bin", "nvcc")
    if is_cuda and not shutil.which(nvcc):
        missing.append("nvcc")
    if not missing:
        return ok("operators", f"DeepSpeed can compile the operators of {OPTIMIZER}")
    return warning(
        "operators",
        f"{', '.join(missing)} not found, so {OPTIMIZER} cannot be compiled",
        "Install ninja, a C++ compiler and, on a GPU, the CUDA toolkit to use that optimizer.",
    )
