"""DeepSpeed's checkpoint files, copied at the step that saves and written beside the steps that follow."""

import copy
import os
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from torch import Tensor

from asrllm.atomic import sync

NICENESS = 10  # of the writing thread, whose work can wait


class CheckpointWriter(CheckpointEngine):
    """What DeepSpeed saves is noted by `save`, and written by `start` or, with `background`, by a thread that `start` begins.

    The copies are kept from one checkpoint to the next: as much host memory as a rank's files have bytes.
    """

    def __init__(self, *, background: bool) -> None:
        self.background = background
        self.noted: list[tuple[Path, Any]] = []
        self.copies = Copies()
        self.thread: threading.Thread | None = None
        self.error: str | None = None

    def save(self, state_dict: Any, path: str) -> None:
        copied = (
            self.copies.of(state_dict)
            if self.background
            else mapped(state_dict, torch.Tensor.detach)
        )
        self.noted.append((Path(path), copied))

    def start(self) -> None:
        """Every noted file, whole and on the disk. `error` says what went wrong."""
        self.error = None
        self.copies.end()
        if self.background:
            self.thread = threading.Thread(target=self._write_all, name="checkpoint", daemon=True)
            self.thread.start()
        else:
            self._write_all()

    @property
    def writing(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def wait(self) -> None:
        if self.thread is not None:
            self.thread.join()

    def _write_all(self) -> None:
        if self.background:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        for path, state in self.noted:
            try:
                torch.save(state, path)
                sync(path)
            except OSError as error:
                self.error = str(error)
            except (
                RuntimeError
            ) as error:  # so torch says that the disk is full, and does not say why
                self.error = f"{path.name} was cut short, {' '.join(str(error).split())[:100]}"
            if self.error:
                break
        self.noted.clear()

    def create(self, info: CheckpointCommitInfo) -> None:
        """DeepSpeed is about to save."""

    def load(self, path: str, map_location: Any = None) -> Any:
        raise NotImplementedError("it writes only")

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return nested containers with changed tensors.

    Args:
        value: dicts, lists and tuples of tensors and plain objects, which are copied.
        change: makes a plain tensor of a parameter, whose attributes are not to be pickled:
            under ZeRO-3 they hold DeepSpeed's own objects, which no reader accepts.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return type(value)((key, mapped(item, change)) for key, item in value.items())
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(mapped(item, change) for item in value)
    return copy.copy(value)  # such as a loss scaler


class Copies:
    """Copies of tensors in host memory, which are used again for the next checkpoint's."""

    def __init__(self) -> None:
        self.kept: dict[Any, list[Tensor]] = defaultdict(list)
        self.used: dict[Any, int] = defaultdict(int)
        self.copied: dict[Any, Tensor] = {}  # tied weights once

    def of(self, value: Any) -> Any:
        """The value with copies in the place of tensors."""
        return mapped(value, self._copy)

    def _copy(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        where = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if where not in self.copied or not tensor.numel():
            kind = (tensor.shape, tensor.dtype)
            if self.used[kind] == len(self.kept[kind]):
                self.kept[kind].append(
                    torch.empty(
                        tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda"
                    )
                )
            copied = self.kept[kind][self.used[kind]]
            self.used[kind] += 1
            self.copied[where] = copied.copy_(tensor, non_blocking=True)
        return self.copied[where]

    def end(self) -> None:
        """The copies are complete, and free for the next checkpoint when these are written."""
        if any(tensor.is_pinned() for tensors in self.kept.values() for tensor in tensors[:1]):
            torch.cuda.synchronize()
        self.used.clear()
        self.copied.clear()
