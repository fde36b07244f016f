"""Which rank a process is, as its launcher says: torchrun's and DeepSpeed's names are taken as they are, others' are turned into them."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, MutableMapping
from typing import NamedTuple

from asrllm.errors import UserError

DEFAULT_PORT = 29500
MAX_PORT = 65535


class Names(NamedTuple):
    """Under which names a launcher tells a process where it stands."""

    launcher: str
    rank: str
    world_size: str
    local_rank: str


# a shell or a batch script within a Slurm job has most of its names too, but only what srun starts is a step
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
    """Within the block an environment variable is 1."""
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before


def adopt_launcher(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where the launcher has other names for them. What is set stays.

    A process that no launcher started is left alone. Raises UserError where the first rank's address is not known.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        check_ranks(environment)
        return
    known = (SLURM, *MPI) if "SLURM_STEP_ID" in environment else MPI
    names = next(
        (
            names
            for names in known
            if names.rank in environment and whole_number(environment, names.world_size, 1) > 1
        ),
        None,
    )
    if names is None:
        return
    if "MASTER_ADDR" not in environment:
        if names is not SLURM or not (
            hosts := environment.get(
                "SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", "")
            )
        ):
            raise UserError(
                f"{names.launcher} does not say where the first rank is: set MASTER_ADDR to its host's name, for all ranks"
            )
        environment["MASTER_ADDR"] = first_host(hosts)
    environment.setdefault("MASTER_PORT", str(port_of_job(environment.get("SLURM_JOB_ID"))))
    environment["WORLD_SIZE"] = environment[names.world_size]
    environment["LOCAL_RANK"] = environment.get(names.local_rank, "0")
    environment["RANK"] = environment[names.rank]
    check_ranks(environment)


def check_ranks(environment: MutableMapping[str, str]) -> None:
    """Check the variables that place a process among the others of its run.

    A process that is the only one of its run may lack them.

    Raises:
        UserError: a variable is missing or is not a number, or they contradict each other.
    """
    size = whole_number(environment, "WORLD_SIZE", 1)
    if size < 1:
        raise UserError(f"WORLD_SIZE={size} is not above 0. Set it to the number of processes.")
    if size == 1 and "RANK" not in environment:
        return
    alone = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(DEFAULT_PORT)}
    if size == 1:
        environment.setdefault("WORLD_SIZE", "1")
        for name, value in alone.items():
            environment.setdefault(name, value)
    for name in ("RANK", *alone):
        if name not in environment:
            raise UserError(
                f"WORLD_SIZE={size} is set, but {name} is not. Start the processes with torchrun or "
                "deepspeed, or unset WORLD_SIZE to run a single process."
            )
    for name in ("RANK", "LOCAL_RANK"):
        number = whole_number(environment, name, 0)
        if number >= size:
            raise UserError(
                f"{name}={number} is not below WORLD_SIZE={size}. Number the processes from 0, or raise WORLD_SIZE."
            )
    port = whole_number(environment, "MASTER_PORT", DEFAULT_PORT)
    if not 0 < port <= MAX_PORT:
        raise UserError(f"MASTER_PORT={port} is not a port. Use a number from 1 to {MAX_PORT}.")


def whole_number(environment: Mapping[str, str], name: str, default: int) -> int:
    """Return the whole number in an environment variable.

    Raises:
        UserError: the variable holds something else.
    """
    text = environment.get(name, str(default))
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*", text):
        raise UserError(
            f"the environment has {name}={text!r}, which is not a whole number. Correct or unset it."
        )
    return int(text)


def first_host(nodes: str) -> str:
    """Of Slurm's node list: "gpu[07-09,12],cpu1" -> "gpu07"."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def port_of_job(job: str | None) -> int:
    """Jobs that share a node have ports of their own."""
    return 20000 + int(job) % 20000 if job else DEFAULT_PORT
