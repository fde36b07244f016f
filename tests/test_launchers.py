"""Ranks and addresses from the environment of each launcher, and the files in launch/."""

import re
import subprocess

import pytest
import yaml
from deepspeed.launcher.runner import fetch_hostfile

from asrllm.errors import UserError
from asrllm.launchers import adopt_launcher, first_host
from tests.conftest import REPOSITORY

DEPLOYMENT = ("Dockerfile", "Dockerfile.dockerignore", "asrllm-serve.service")
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "41234",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
TORCHRUN = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            SRUN,
            {
                "RANK": "3",
                "WORLD_SIZE": "4",
                "LOCAL_RANK": "1",
                "MASTER_ADDR": "gpu07",
                "MASTER_PORT": "21234",
            },
        ),
        (
            SRUN | {"MASTER_ADDR": "head", "MASTER_PORT": "5"},
            {"RANK": "3", "MASTER_ADDR": "head", "MASTER_PORT": "5"},
        ),
        (
            OPEN_MPI | {"MASTER_ADDR": "a"},
            {
                "RANK": "1",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "0",
                "MASTER_ADDR": "a",
                "MASTER_PORT": "29500",
            },
        ),
        (HYDRA | {"MASTER_ADDR": "a"}, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}),
        (SRUN | TORCHRUN, TORCHRUN),  # torchrun or deepspeed below srun
    ],
)
def test_variables_of_the_launcher_are_translated(given, expected):
    environment = dict(given)
    adopt_launcher(environment)
    assert environment | expected == environment


@pytest.mark.parametrize(
    "given",
    [
        {},
        # in a batch script, or in a shell of salloc
        {key: value for key, value in SRUN.items() if key != "SLURM_STEP_ID"},
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_environment_of_a_single_process_is_not_changed(given):
    environment = dict(given)
    adopt_launcher(environment)
    assert environment == given


def test_error_if_the_host_of_the_first_rank_is_unknown():
    with pytest.raises(UserError, match="MASTER_ADDR"):
        adopt_launcher(dict(OPEN_MPI))


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu07", "gpu07"),
        ("gpu07,gpu09", "gpu07"),
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("r[2-3]n[4,6]", "r2n4"),
        ("a-b.c[10]", "a-b.c10"),
    ],
)
def test_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


SHIPPED = [
    path
    for path in (REPOSITORY / "launch").rglob("*")
    if path.is_file()
    and "__pycache__" not in path.parts
    and path.name not in DEPLOYMENT  # see tests/serving/test_deployment.py
]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_file_in_launch_is_valid(path):
    if path.suffix == ".sh":
        assert subprocess.run(["bash", "-n", path], timeout=10).returncode == 0
    elif path.name == "hostfile":
        assert list(fetch_hostfile(str(path)).values()) == [8, 8]
    elif path.suffix == ".yaml":
        service, job = yaml.safe_load_all(path.read_text())
        assert service["spec"]["clusterIP"] == "None"
        pod = job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert job["spec"]["completionMode"] == "Indexed"
        assert pod["subdomain"] == service["metadata"]["name"]
        assert f"--nnodes={job['spec']['completions']}" in " ".join(
            container["command"] + container["args"]
        )
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    else:
        assert path.suffix == ".py"
        compile(path.read_text(), path, "exec")
        assert re.search(r'console\("\w[\w-]*"', path.read_text())
