"""Ranks and collectives of torch.distributed, under any launcher."""

import atexit
import contextlib
import logging
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from asrllm import siblings
from asrllm.defaults import MIN_DESCRIPTORS
from asrllm.errors import UserError
from asrllm.launchers import free_port, non_negative_integer
from asrllm.progress import waiting

logger = logging.getLogger(__name__)
SHOWN_OF_VALUES = 200  # characters of a value in the error message
RESOLVE_WITHIN = 120.0  # seconds; the name of a pod in Kubernetes appears once it runs
Signature = dict[str, object]  # what must be the same on all ranks, by description


def rank() -> int:
    """Return the number of this process among all processes of the run."""
    return non_negative_integer(os.environ, "RANK", 0)


def world_size() -> int:
    """Return the number of processes of the run."""
    return non_negative_integer(os.environ, "WORLD_SIZE", 1)


def local_rank() -> int:
    """Return the number of this process among those on its node."""
    return non_negative_integer(os.environ, "LOCAL_RANK", 0)


def start() -> torch.device:
    """Join the process group and return the device of this process.

    A process without a launcher is a group of one.

    Raises:
        UserError: the limit of open files is too low, the first rank cannot be reached, its port is
            in use, or there are fewer devices than processes.
    """
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(free_port()),
        )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    check_descriptors()
    address = os.environ["MASTER_ADDR"]
    with waiting(f"resolving MASTER_ADDR={address}"):
        wait_for_address(address)
    siblings.mine().join()
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # Otherwise DeepSpeed compiles an operator for a minute. It changes no loss, and it leaves
        # shared memory behind.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        with explained_port(), waiting(f"connecting {world_size()} processes at {address}"):
            deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        connect_nodes()
        # Otherwise gloo's threads release their tensors while the interpreter ends, which aborts
        # the process: https://github.com/pytorch/pytorch/issues/190489
        atexit.register(finish)
        return torch.device("cpu")
    index = device_index(accelerator.device_count())
    accelerator.set_device(index)
    with explained_port(), waiting(f"connecting {world_size()} processes at {address}"):
        deepspeed.init_distributed(verbose=False)
    connect_nodes()
    return torch.device(accelerator.device_name(index))


def connect_nodes() -> None:
    """Connect one rank of every other node to the first rank, so that all notice when one ends."""
    own = siblings.mine()
    if own.rank < 0:
        return
    node = own.ranks_of_node()
    if all(0 in ranks for ranks in gather_objects(node)):
        return
    address = gather_objects(own.listen() if rank() == 0 else None)[0]
    if 0 in node or rank() != node[0]:
        return
    host = os.environ["MASTER_ADDR"]
    try:
        own.connect(host, address)
    except OSError as error:
        logger.warning(
            "rank %d cannot connect to port %d of %s (%s), so its node may wait up to step_timeout "
            "for a killed rank. Allow connections between the nodes on all ports.",
            rank(),
            address.port,
            host,
            error,
        )


def check_descriptors() -> None:
    """Check the limit of open files.

    Beyond the limit torch.distributed tries to open a socket for 30 minutes, and ignores signals.

    Raises:
        UserError: the limit is too low for sockets, data and checkpoints.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= limit < MIN_DESCRIPTORS:
        raise UserError(
            f"the limit of {limit} open files is too low. "
            "Raise it with 'ulimit -n 4096', then run the same command again."
        )


def wait_for_address(host: str) -> None:
    """Wait until the first rank's host name resolves.

    Raises:
        UserError: it does not resolve within RESOLVE_WITHIN seconds.
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
    """Raise UserError if another process uses the port on which the first rank listens."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed.DistNetworkError
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"MASTER_PORT={os.environ['MASTER_PORT']} is used by another process on "
            f"{socket.gethostname()!r}. Set MASTER_PORT to another port, the same for all ranks."
        ) from error


def device_index(devices: int) -> int:
    """Return the index of this process's device.

    Slurm may show each task only its own device, whose index is then 0.

    Args:
        devices: number of devices that this process can see.

    Raises:
        UserError: there are fewer devices than processes on the node.
    """
    if local_rank() < devices:
        return local_rank()
    if devices == 1 and "SLURM_STEP_ID" in os.environ:
        return 0
    raise UserError(
        f"LOCAL_RANK={local_rank()} on {socket.gethostname()!r} has no device: "
        f"the node has {devices}. Start as many processes as GPUs."
    )


def finish() -> None:
    """Leave the process group, which a later run of this process may start again."""
    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()  # torch's leaves groups in DeepSpeed's cache


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks in place, and return it."""
    dist.all_reduce(values)
    return values


def gather_objects(own: Any) -> list[Any]:
    """Return the objects of all ranks in order, on every rank."""
    if not dist.is_initialized() or world_size() == 1:
        return [own]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, own)
    return gathered


def first_rank_does(action: Callable[[], None]) -> None:
    """Run an action on the first rank while the others wait.

    Raises:
        UserError: the action raised it. All ranks raise it.
        OSError: likewise.
    """
    failure: UserError | OSError | None = None
    if rank() == 0:
        try:
            action()
        except (UserError, OSError) as error:
            failure = error
    for failed in gather_objects(failure):
        if failed is not None:
            raise failed


def barrier() -> None:
    """Wait until all ranks are here."""
    dist.barrier()


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16.

    A processor without them takes about twenty times as long as for float32.
    """
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def default_device() -> torch.device:
    """Return the first accelerator if there is one, else the CPU."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    return torch.device(accelerator.device_name(0))


def flat_settings(settings: Mapping[str, object], prefix: str = "") -> Signature:
    """Return nested settings as one object, in which "a.b" is the name of `b` in `a`."""
    flat: Signature = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flat_settings(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def check_same(when: str, everywhere: Sequence[Signature]) -> None:
    """Compare the signatures of all ranks.

    Args:
        when: when they are compared, for the error message.
        everywhere: signatures by rank.

    Raises:
        UserError: they differ. The message names what differs, the values and their ranks.
    """
    differences = []
    for what in sorted(set().union(*everywhere)):
        ranks: dict[str, list[int]] = {}
        for rank, values in enumerate(everywhere):
            ranks.setdefault(str(values.get(what)), []).append(rank)
        if len(ranks) > 1:
            found = [
                f"{value[:SHOWN_OF_VALUES]} on rank {', '.join(map(str, ranks[value]))}"
                for value in ranks
            ]
            differences.append(f"{what}: {'; '.join(found)}")
    if differences:
        raise UserError(
            f"the ranks differ {when} in {' | '.join(differences)}. "
            "Start all of them with the same command, code and data."
        )
