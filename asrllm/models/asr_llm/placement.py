"""The data type and the device of a model that is loaded."""

from collections import Counter
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from asrllm.errors import UserError, nearest
from asrllm.text_files import first_words

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
Dtype: TypeAlias = torch.dtype | str | None
DeviceMap: TypeAlias = str | int | torch.device | dict[str, str | int | torch.device] | None


def device_of_map(device_map: DeviceMap) -> torch.device:
    """Return the device that a `device_map` in the sense of accelerate gives to a whole model.

    Args:
        device_map: a device, {"": device}, or "auto" for the first accelerator; None means the CPU.

    Raises:
        UserError: it divides the model, or is not a device of this machine.
    """
    if isinstance(device_map, dict):
        if set(device_map) != {""}:
            raise UserError(
                f"device_map={device_map} divides the model. Use one device: 'auto', 'cpu', 'cuda'."
            )
        device_map = device_map[""]
    if device_map is None:
        return torch.device("cpu")
    if device_map == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return _usable_device(device_map)


def _usable_device(device_map: str | int | torch.device) -> torch.device:
    """Return a device of this machine, or raise UserError if an allocation on it fails."""
    try:
        device = torch.device(device_map)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise UserError(
            f"device_map={device_map!r} is not a device of this machine: {first_words(error)}. "
            "Use 'auto', 'cpu' or 'cuda'."
        ) from error
    return device


def as_dtype(dtype: Dtype) -> torch.dtype | None:
    """Return the dtype that a user asked for, or None for None and "auto".

    Raises:
        UserError: the dtype is unknown, or is not a floating-point dtype.
    """
    if isinstance(dtype, str) and dtype != "auto":
        name = dtype.removeprefix("torch.")
        if name not in DTYPES:
            raise UserError(f"dtype={dtype!r} is unknown. {nearest(dtype, DTYPES)}")
        return DTYPES[name]
    if not isinstance(dtype, torch.dtype):
        return None
    if dtype not in DTYPES.values():
        raise UserError(f"dtype={dtype} is not a dtype of weights. Available: {', '.join(DTYPES)}.")
    return dtype


def prevailing_dtype(state: Mapping[str, Tensor], where: str) -> torch.dtype:
    """Return the floating-point dtype that most elements of a state dict have."""
    elements: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        if tensor.is_floating_point():
            elements[tensor.dtype] += tensor.numel()
    if not elements.total():
        raise UserError(f"the weights of {where!r} are empty. Save the model again.")
    return elements.most_common(1)[0][0]
