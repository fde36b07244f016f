"""`asrllm doctor` on this machine, and with planted faults."""

import json
import shutil
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from asrllm.commands.dispatch import main
from asrllm.doctor import devices, packages, system
from asrllm.doctor.network import check_environment, check_hostfile, has_interface
from asrllm.errors import UserError
from tests.conftest import REPOSITORY
from tests.processes import clean_environment
from tests.test_cli import does, fails

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def without_launcher(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def levels(findings):
    return [finding.level for finding in findings]


def write_hostfile(folder, text):
    path = folder / "hostfile"
    path.write_text(text)
    return path


# --- the command ---


@pytest.mark.slow
def test_doctor_finds_no_problem_on_this_machine(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hosts = write_hostfile(tmp_path, "# two names of this machine\nlocalhost slots=2\n")
    lines = does(capsys, "doctor", "--hostfile", hosts).splitlines()
    reported = [line.partition(":")[0] for line in lines]
    order = ["ok", "warning", "problem"]
    assert reported == sorted(reported, key=order.index)
    assert "problem" not in reported
    assert any(torch.__version__ in line for line in lines)
    assert any("sdpa" in line for line in lines)
    assert any("'localhost'" in line for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["hostfile"]


@pytest.mark.slow
def test_planted_faults_are_reported_with_status_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", str(tmp_path))
    hosts = write_hostfile(tmp_path, "host.invalid slots=2\n")
    assert main(["doctor", "--json", "--hostfile", str(hosts)]) == 2
    printed = capsys.readouterr()
    rows = json.loads(printed.out)["findings"]
    found = {row["check"]: row["level"] for row in rows}
    assert found["launcher"] == "problem"
    assert found["host"] == "problem"
    assert found["temporary files"] == "warning"
    assert found["ffmpeg"] == "warning"
    assert found["operators"] == "warning"
    assert found["torch"] == "ok"
    assert all(row["fix"] for row in rows if row["level"] != "ok")
    assert printed.err.startswith(f"asrllm doctor: 2 of {len(rows)} ")


def test_unreadable_hostfile_is_an_error(tmp_path, capsys):
    assert repr(str(tmp_path / "no")) in fails(capsys, "doctor", "--hostfile", tmp_path / "no")


def test_torch_that_cannot_be_imported_is_a_problem(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.99 is not found')\n")
    environment = clean_environment()
    environment["PYTHONPATH"] = f"{tmp_path}:{REPOSITORY}"
    done = subprocess.run(
        [sys.executable, "-m", "asrllm", "doctor"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "libcudart.so.99" in done.stdout
    assert "Traceback" not in done.stderr


# --- packages ---


def test_packages_outside_their_range_and_missing_ones_are_problems(monkeypatch):
    required = ["torch>=99", "asrllm-no-such-package>=1", "numpy>=1", "other>=1; extra == 'test'"]
    monkeypatch.setattr(metadata, "requires", lambda name: required)
    found = {finding.check: finding for finding in packages.check_packages()}
    assert found["torch"].level == "problem"
    assert "torch>=99" in found["torch"].fix
    assert found["asrllm-no-such-package"].level == "problem"
    assert found.keys() == {"python", "torch", "asrllm-no-such-package"}


def test_unsupported_python_is_a_problem():
    assert packages.check_python(">=3.99").level == "problem"
    assert packages.check_python(">=3.10").level == "ok"


def test_uninstalled_clone_is_a_warning(monkeypatch):
    monkeypatch.setattr(packages, "PACKAGE", "asrllm-no-such-package")
    assert levels(packages.check_packages()) == ["warning"]


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_package_with_a_missing_library_is_a_problem(tmp_path, monkeypatch, error):
    name = f"broken_{error.lower()}"
    (tmp_path / f"{name}.py").write_text(f"raise {error}('libx.so is missing')\n")
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = packages.check_imports([name, "json"])
    assert finding.level == "problem"
    assert name in finding.text
    assert "libx.so" in finding.text


# --- the system ---


def test_full_disks_are_warnings(tmp_path, monkeypatch):
    nearly_full = SimpleNamespace(total=1 << 40, used=1 << 40, free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: nearly_full)
    for finding in (
        system.check_disk(tmp_path),
        system.check_temporary(None),
        system.check_shared_memory(tmp_path),
    ):
        assert finding.level == "warning"
        assert "0.0 GiB" in finding.text


def test_missing_shared_memory_is_a_problem(tmp_path):
    assert system.check_shared_memory(tmp_path / "shm").level == "problem"


@pytest.mark.parametrize(
    ("limit", "level"), [(20, "problem"), (256, "warning"), (1024, "ok"), (-1, "ok")]
)
def test_limit_of_open_files(limit, level):
    assert system.check_open_files(limit).level == level


# --- hosts and environment ---


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "names no host"),
        ("# localhost slots=2\n", "names no host"),
        ("localhost\n", ":1 "),
        ("localhost slots=2\nlocalhost slots=two\n", ":2 "),
        ("localhost slots=2\nlocalhost slots=2\n", "2 times"),
        ("host.invalid slots=2\n", "'host.invalid'"),
        (f"{'x' * 70}.y slots=2\n", "x" * 70),
    ],
)
def test_faults_of_a_hostfile_are_problems(tmp_path, text, named):
    found = check_hostfile(write_hostfile(tmp_path, text))
    problems = [finding for finding in found if finding.level == "problem"]
    assert len(problems) == 1
    assert named in problems[0].text


def test_hostfile_of_the_repository_has_the_right_form():
    assert {f.check for f in check_hostfile(REPOSITORY / "launch" / "hostfile")} == {"host"}


def test_hostfile_that_is_not_text_is_an_error(tmp_path):
    (tmp_path / "hostfile").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="hostfile"):
        check_hostfile(tmp_path / "hostfile")


@pytest.mark.parametrize(
    ("environment", "level"),
    [
        ({}, "ok"),
        ({"HOME": "/root"}, "ok"),
        ({"NCCL_DEBUG": "INFO"}, "ok"),
        ({"NCCL_SOCKET_IFNAME": "lo"}, "ok"),
        ({"NCCL_SOCKET_IFNAME": "^docker0"}, "ok"),
        ({"GLOO_SOCKET_IFNAME": "lo"}, "ok"),
        ({"NCCL_IB_DISABLE": "0"}, "ok"),
        ({"MASTER_ADDR": "10.0.0.1"}, "warning"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "warning"),
        ({"NCCL_P2P_DISABLE": "1"}, "warning"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "problem"),
        ({"WORLD_SIZE": "two"}, "problem"),
        ({"NCCL_SOCKET_IFNAME": "none7"}, "problem"),
        ({"GLOO_SOCKET_IFNAME": "none7"}, "problem"),
    ],
)
def test_variables_of_distributed_training(environment, level):
    found = check_environment(environment)
    assert levels(found) == [level]
    if level != "ok":
        (name, *_) = environment
        assert name in found[0].text


@pytest.mark.parametrize(
    ("wanted", "exact", "expected"),
    [
        ("eth", False, True),
        ("eth", True, False),
        ("=eth", False, False),
        ("=eth0", False, True),
        ("ib,eth", False, True),
        ("ib", False, False),
        ("^lo", False, True),
        ("^lo,eth", False, False),
        ("^=eth", False, True),
    ],
)
def test_network_interfaces_match_as_in_nccl_and_gloo(wanted, exact, expected):
    assert has_interface(wanted, ["lo", "eth0"], exact=exact) is expected


# --- devices ---


def test_gpu_that_torch_cannot_use_is_a_problem(tmp_path, monkeypatch):
    (tmp_path / "version").touch()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(devices, "NVIDIA_DRIVER", tmp_path / "none")
    assert "problem" not in levels(devices.check_devices({}))
    monkeypatch.setattr(devices, "NVIDIA_DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in devices.check_devices({})[0].text
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert levels(devices.check_devices({}))[0] == "problem"
    hidden = devices.check_devices({"CUDA_VISIBLE_DEVICES": ""})[0]
    assert "CUDA_VISIBLE_DEVICES=''" in hidden.text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("avx512f avx512_bf16", ["warning"]), ("avx2 avx512f", ["warning", "warning"])],
)
def test_cpu_without_bfloat16_instructions_is_a_warning(tmp_path, monkeypatch, flags, expected):
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu {flags} sse\n")
    monkeypatch.setattr(devices, "CPU_INFO", tmp_path / "cpuinfo")
    assert levels(devices.check_cpu()) == expected


@pytest.mark.parametrize(("major", "level"), [(7, "warning"), (9, "ok")])
def test_gpu_without_bfloat16_is_a_warning(monkeypatch, major, level):
    about = SimpleNamespace(name="Tesla", total_memory=16 << 30, major=major, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    found = devices.check_gpu(0)
    assert found.level == level
    assert "16 GiB" in found.text


def test_gpu_without_a_packed_attention_kernel_is_a_warning(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    missing = {"sdpa": "", "flash": "it is not installed", "varlen": "torch is too old"}
    monkeypatch.setattr(devices, "backends", lambda: missing)
    (finding,) = devices.check_attention()
    assert finding.level == "warning"
    assert "it is not installed" in finding.text
    monkeypatch.setattr(devices, "backends", lambda: missing | {"varlen": ""})
    assert levels(devices.check_attention()) == ["ok"]
