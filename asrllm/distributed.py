"""Ranks and processes, as whichever launcher started them says."""

import atexit
import contextlib
import logging
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from asrllm import siblings
from asrllm.errors import UserError
from asrllm.launchers import whole_number

MIN_DESCRIPTORS = 64  # fewer do not suffice for the sockets of a run
RESOLVE_WITHIN = 120.0  # seconds: the name of a pod in Kubernetes appears once it runs


def rank() -> int:
    return whole_number(os.environ, "RANK", 0)


def world_size() -> int:
    return whole_number(os.environ, "WORLD_SIZE", 1)


def local_rank() -> int:
    return whole_number(os.environ, "LOCAL_RANK", 0)


def start() -> torch.device:
    """Join the other processes and take this one's device. A process started plainly is a world of one."""
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(_free_port()),
        )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    check_descriptors()
    wait_for_address(os.environ["MASTER_ADDR"])
    siblings.mine().join()
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # else DeepSpeed compiles an operator for a minute that changes no loss and leaves shared memory behind
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        with explained_port():
            deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        # gloo's threads would release their tensors while the interpreter ends and abort the
        # process: https://github.com/pytorch/pytorch/issues/190489
        atexit.register(finish)
        return torch.device("cpu")
    index = device_index(accelerator.device_count())
    accelerator.set_device(index)
    with explained_port():
        deepspeed.init_distributed(verbose=False)
    return torch.device(accelerator.device_name(index))


def check_descriptors() -> None:
    """Check the limit of open files.

    torch.distributed tries for 30 minutes to open a socket beyond the limit, whatever signal comes.

    Raises:
        UserError: the limit is too low for sockets, data and checkpoints.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= limit < MIN_DESCRIPTORS:
        raise UserError(
            f"only {limit} files may be open at a time. Raise the limit with 'ulimit -n 4096', then run the same command again."
        )


def wait_for_address(host: str) -> None:
    """Wait until the first rank's host name resolves.

    Raises:
        UserError: it does not within RESOLVE_WITHIN.
    """
    deadline = time.monotonic() + RESOLVE_WITHIN
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"MASTER_ADDR={host!r} does not resolve to an address ({error}). "
                    "Set it to the name or address of the first rank's host."
                ) from error
        time.sleep(1.0)


@contextlib.contextmanager
def explained_port() -> Iterator[None]:
    """Raise UserError if another process listens on the port at which the ranks are to meet."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed.DistNetworkError
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"MASTER_PORT={os.environ['MASTER_PORT']} is used by another process on {socket.gethostname()!r}. "
            "Set MASTER_PORT to another port, the same for all ranks."
        ) from error


def device_index(devices: int) -> int:
    """Of this process on its host. Where Slurm shows each task a device of its own, that one. Raises UserError where there is none."""
    if local_rank() < devices:
        return local_rank()
    if devices == 1 and "SLURM_STEP_ID" in os.environ:
        return 0
    raise UserError(
        f"process {local_rank()} of {socket.gethostname()!r} has no device, there are {devices}: start as many processes as GPUs"
    )


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(values: Tensor) -> Tensor:
    dist.all_reduce(values)
    return values


def gather_objects(mine: Any) -> list[Any]:
    """What every rank gives, in the order of the ranks, on every rank."""
    if not dist.is_initialized() or world_size() == 1:
        return [mine]
    everywhere: list[Any] = [None] * world_size()
    dist.all_gather_object(everywhere, mine)
    return everywhere


def first_rank_does(action: Callable[[], None]) -> None:
    """Run it on the first rank while the others wait; a UserError or OSError there is a UserError on all."""
    failure = None
    if rank() == 0:
        try:
            action()
        except (UserError, OSError) as error:
            failure = str(error)
    for failed in gather_objects(failure):
        if failed:
            raise UserError(failed)


def barrier() -> None:
    dist.barrier()


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether it has instructions for it; a processor without them takes some twenty times as long as for float32."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def default_device() -> torch.device:
    """An accelerator where there is one."""
    accelerator = get_accelerator()
    return torch.device("cpu" if accelerator.device_name() == "cpu" else accelerator.device_name(0))
