"""Linear layers of float32 on the CPU, computed by oneDNN.

torch computes them with MKL, which does not use AVX-512 on processors of AMD: there it takes two to
four times as long (torch 2.13, EPYC).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CpuLinear(nn.Linear):
    """A linear layer that oneDNN computes on the CPU in float32, if no gradient is needed.

    Otherwise, and in a graph that is compiled or exported, it is torch's layer.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if not self._suits(x):
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def _suits(self, x: Tensor) -> bool:
        # inductor compiles the operator only for frozen weights, and exported files cannot have it
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if torch.is_autocast_enabled("cpu"):
            return False
        return self._is_plain(x) and self._is_plain(self.weight) and not self._needs_gradient(x)

    def _is_plain(self, tensor: Tensor) -> bool:
        """Return whether oneDNN can read a tensor. Quantized weights are subclasses of Tensor."""
        is_dense = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        is_float = tensor.dtype == torch.float32 and tensor.device.type == "cpu"
        return is_dense and is_float and tensor.numel() > 0

    def _needs_gradient(self, x: Tensor) -> bool:
        if not torch.is_grad_enabled():
            return False
        has_trained_bias = self.bias is not None and self.bias.requires_grad
        return x.requires_grad or self.weight.requires_grad or has_trained_bias


def use_onednn(model: nn.Module) -> None:
    """Let oneDNN compute the linear layers of a model, if this build of torch has it."""
    if not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = CpuLinear
