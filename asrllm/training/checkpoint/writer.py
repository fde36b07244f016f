"""Write DeepSpeed's checkpoint files, optionally in the background.

The tensors are copied at the step that saves, and written while the next steps run.
"""

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

NICENESS = 10  # priority of the writing thread, whose work can wait
StateTree = Any  # nested dicts, lists and tuples of tensors and plain objects


class CheckpointWriter(CheckpointEngine):
    """Collects what DeepSpeed saves, and writes it when `start` is called.

    In the background a thread writes the files. The copies are reused for the next checkpoint:
    they take as much host memory as a rank's files have bytes.

    Attributes:
        background: whether a thread writes the files.
        error: what went wrong in the last write, or None.
    """

    def __init__(self, *, background: bool) -> None:
        self.background = background
        self.pending: list[tuple[Path, StateTree]] = []
        self.copies = HostCopies()
        self.thread: threading.Thread | None = None
        self.error: str | None = None

    def save(self, state_dict: StateTree, path: str) -> None:
        """Add a file to write. DeepSpeed calls this."""
        if self.background:
            state = self.copies.copy_of(state_dict)
        else:
            state = map_tensors(state_dict, torch.Tensor.detach)
        self.pending.append((Path(path), state))

    def start(self) -> None:
        """Write the added files and sync them to the disk. `error` reports a failure."""
        self.error = None
        self.copies.finish()
        if self.background:
            self.thread = threading.Thread(target=self._write_all, name="checkpoint", daemon=True)
            self.thread.start()
        else:
            self._write_all()

    @property
    def writing(self) -> bool:
        """Whether the thread is writing."""
        return self.thread is not None and self.thread.is_alive()

    def wait(self) -> None:
        """Wait until the thread has written the files."""
        if self.thread is not None:
            self.thread.join()

    def _write_all(self) -> None:
        if self.background:
            # Linux takes a thread id here, so that only this thread gets a lower priority.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        for path, state in self.pending:
            try:
                torch.save(state, path)
                sync(path)
            except OSError as error:
                self.error = str(error)
            except RuntimeError as error:  # torch's error for a full disk, which gives no reason
                reason = " ".join(str(error).split())[:100]
                self.error = f"{path.name} was truncated: {reason}"
            if self.error:
                break
        self.pending.clear()

    def create(self, info: CheckpointCommitInfo) -> None:
        """Do nothing. DeepSpeed calls this before it saves."""

    def load(self, path: str, map_location: object = None) -> StateTree:
        """Raise NotImplementedError: this engine only writes."""
        raise NotImplementedError("CheckpointWriter only writes")

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Return True. DeepSpeed calls this after it has saved."""
        return True


def map_tensors(value: StateTree, change: Callable[[Tensor], Tensor]) -> StateTree:
    """Return nested containers with changed tensors. Plain objects are copied.

    Args:
        value: dicts, lists and tuples of tensors and plain objects.
        change: returns a plain tensor for a parameter. A parameter's attributes must not be
            pickled: under ZeRO-3 they hold DeepSpeed's own objects, which no reader accepts.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return type(value)((key, map_tensors(item, change)) for key, item in value.items())
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(map_tensors(item, change) for item in value)
    return copy.copy(value)  # for example a loss scaler


class HostCopies:
    """Copies of tensors in host memory, which is reused for the next checkpoint."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)
        self.used: dict[tuple[torch.Size, torch.dtype], int] = defaultdict(int)
        self.copied: dict[tuple[object, ...], Tensor] = {}  # so that tied weights are copied once

    def copy_of(self, value: StateTree) -> StateTree:
        """Return nested containers with copies of their tensors."""
        return map_tensors(value, self._copy)

    def _copy(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        where = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if where not in self.copied or not tensor.numel():
            buffer = self._buffer(tensor)
            self.copied[where] = buffer.copy_(tensor, non_blocking=True)
        return self.copied[where]

    def _buffer(self, tensor: Tensor) -> Tensor:
        """Return unused memory for a tensor. It is pinned if the tensor is on a CUDA device."""
        kind = (tensor.shape, tensor.dtype)
        buffers = self.buffers[kind]
        if self.used[kind] == len(buffers):
            # Only a copy to pinned memory runs beside the work of the GPU.
            pinned = tensor.device.type == "cuda"
            buffers.append(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned))
        buffer = buffers[self.used[kind]]
        self.used[kind] += 1
        return buffer

    def finish(self) -> None:
        """Wait for the copies. Their memory may be reused once they are written."""
        first_buffers = [buffers[0] for buffers in self.buffers.values() if buffers]
        if any(buffer.is_pinned() for buffer in first_buffers):
            # The copies were asynchronous, and the next step changes their sources.
            torch.cuda.synchronize()
        self.used.clear()
        self.copied.clear()
