"""Linear layers of float32 on the CPU, computed by oneDNN.

torch computes them with MKL, which does not use AVX-512 on processors of AMD: there it takes two to
four times as long (torch 2.13, EPYC).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CpuLinear(nn.Linear):
    """A linear layer that oneDNN computes on the CPU in float32, if no gradient is needed.

    Otherwise it is torch's layer.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if not self._suits(x):
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def _suits(self, x: Tensor) -> bool:
        for tensor in (x, self.weight):
            if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.numel():
                return False
        needs_gradient = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        return not needs_gradient and not torch.is_autocast_enabled("cpu")


def use_onednn(model: nn.Module) -> None:
    """Let oneDNN compute the linear layers of a model, if this build of torch has it."""
    if not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = CpuLinear
