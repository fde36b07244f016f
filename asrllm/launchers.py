"""Ranks and addresses from the environment of whichever launcher started a process.

The variables of torchrun and DeepSpeed are used as they are; those of srun and MPI are translated.
"""

import contextlib
import os
import re
import socket
from collections.abc import Iterator, Mapping, MutableMapping
from typing import NamedTuple

from asrllm.errors import UserError

DEFAULT_PORT = 29500
MAX_PORT = 65535
JOB_PORTS = 20000  # number of ports for Slurm jobs, and the first of them


class Names(NamedTuple):
    """Environment variables in which a launcher passes a process its rank.

    Attributes:
        launcher: name of the launcher, for messages.
        rank: variable of the rank.
        world_size: variable of the number of processes.
        local_rank: variable of the rank on the node.
    """

    launcher: str
    rank: str
    world_size: str
    local_rank: str


# A shell or a batch script inside a Slurm job has most of these variables as well, but only a
# process that srun started has SLURM_STEP_ID.
SLURM = Names("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
MPI = (
    Names(
        "Open MPI's mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    Names("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


@contextlib.contextmanager
def switched_on(variable: str) -> Iterator[None]:
    """Set an environment variable to 1 in the block."""
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before


def adopt_launcher(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from the launcher's variables.

    Variables that are set already remain. A process that no launcher started is left as it is.

    Args:
        environment: environment of the process, which is changed.

    Raises:
        UserError: the address of the first rank is unknown, or the variables are not valid.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        check_ranks(environment)
        return
    names = find_launcher(environment)
    if names is None:
        return
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = first_address(names, environment)
    environment.setdefault("MASTER_PORT", str(port_of_job(environment.get("SLURM_JOB_ID"))))
    environment["WORLD_SIZE"] = environment[names.world_size]
    environment["LOCAL_RANK"] = environment.get(names.local_rank, "0")
    environment["RANK"] = environment[names.rank]
    check_ranks(environment)


def find_launcher(environment: Mapping[str, str]) -> Names | None:
    """Return the variables of the launcher that started several processes, or None."""
    launchers: tuple[Names, ...] = MPI
    if "SLURM_STEP_ID" in environment:
        launchers = (SLURM, *MPI)
    for names in launchers:
        if names.rank in environment and non_negative_integer(environment, names.world_size, 1) > 1:
            return names
    return None


def first_address(names: Names, environment: Mapping[str, str]) -> str:
    """Return the host of the first rank.

    Raises:
        UserError: the launcher does not pass it on.
    """
    hosts = ""
    if names is SLURM:
        hosts = environment.get("SLURM_JOB_NODELIST", "")
        hosts = environment.get("SLURM_STEP_NODELIST", hosts)
    if not hosts:
        raise UserError(
            f"{names.launcher} does not pass on the host of the first rank. "
            "Set MASTER_ADDR to its name for all ranks."
        )
    return first_host(hosts)


def check_ranks(environment: MutableMapping[str, str]) -> None:
    """Check the variables that place a process among the others of its run.

    If a process is the only one of its run, missing variables are set.

    Raises:
        UserError: a variable is missing or is not a number, or they contradict each other.
    """
    size = non_negative_integer(environment, "WORLD_SIZE", 1)
    if size < 1:
        raise UserError(f"WORLD_SIZE={size} is not above 0. Set it to the number of processes.")
    if size == 1 and "RANK" not in environment:
        return
    defaults = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(DEFAULT_PORT)}
    if size == 1:
        environment.setdefault("WORLD_SIZE", "1")
        for name, value in defaults.items():
            environment.setdefault(name, value)
    for name in ("RANK", *defaults):
        if name not in environment:
            raise UserError(
                f"WORLD_SIZE={size} is set, but {name} is not. Start the processes with torchrun "
                "or deepspeed, or unset WORLD_SIZE to run a single process."
            )
    for name in ("RANK", "LOCAL_RANK"):
        number = non_negative_integer(environment, name, 0)
        if number >= size:
            raise UserError(
                f"{name}={number} is not below WORLD_SIZE={size}. "
                "Number the processes from 0, or raise WORLD_SIZE."
            )
    port = non_negative_integer(environment, "MASTER_PORT", DEFAULT_PORT)
    if not 0 < port <= MAX_PORT:
        raise UserError(f"MASTER_PORT={port} is not a port. Use a number from 1 to {MAX_PORT}.")


def non_negative_integer(environment: Mapping[str, str], name: str, default: int) -> int:
    """Return the integer from 0 on in an environment variable.

    Args:
        environment: environment of the process.
        name: name of the variable.
        default: value if the variable is not set.

    Raises:
        UserError: the variable is not a non-negative integer.
    """
    text = environment.get(name, str(default))
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*", text):
        raise UserError(
            f"the environment variable {name}={text!r} is not a non-negative integer. "
            "Correct or unset it."
        )
    return int(text)


def first_host(nodes: str) -> str:
    """Return the first host of Slurm's node list: "gpu[07-09,12],cpu1" -> "gpu07"."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def port_of_job(job: str | None) -> int:
    """Return the port of a Slurm job, so that jobs on one node use different ports.

    Args:
        job: id of the job, or None outside of Slurm.
    """
    if not job:
        return DEFAULT_PORT
    return JOB_PORTS + int(job) % JOB_PORTS


def free_port() -> int:
    """Return a TCP port that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
