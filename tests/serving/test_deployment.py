"""The Dockerfile and the systemd unit of the server, without Docker and a running systemd."""

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from asrllm.commands.dispatch import build_parser
from asrllm.commands.serve import SHUTDOWN_SECONDS
from tests.conftest import REPOSITORY
from tests.serving.test_api import BlockedEngine, engine, running  # noqa: F401

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LAUNCH = REPOSITORY / "launch"
UNIT = LAUNCH / "asrllm-serve.service"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def instructions():
    """Return the instructions of the Dockerfile as pairs (name, arguments)."""
    text = re.sub(r"^#.*\n", "", (LAUNCH / "Dockerfile").read_text(), flags=re.M)
    lines = text.replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def only(name):
    """Return the arguments of an instruction that occurs once."""
    (arguments,) = [arguments for found, arguments in instructions() if found == name]
    return arguments


def copied():
    """Return the paths that the Dockerfile copies from the repository."""
    found = [arguments.split()[:-1] for name, arguments in instructions() if name == "COPY"]
    return {path for paths in found for path in paths}


def test_image_copies_what_the_package_is_built_from():
    paths = copied()
    assert all((REPOSITORY / path).exists() for path in paths)
    build = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = [*build["packages"], *build["force-include"], PROJECT["project"]["readme"]]
    assert paths.issuperset([*needed, "pyproject.toml"])
    everything, *rules = (LAUNCH / "Dockerfile.dockerignore").read_text().split()
    assert everything == "*"
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == paths
    ignored = [rule for rule in rules if not rule.startswith("!")]
    assert not any(fnmatch.fnmatch(path, rule) for path in paths for rule in ignored)


def test_image_runs_the_server_without_root_rights():
    order = [name for name, _ in instructions()]
    assert order[0] == "FROM"
    assert order.index("USER") < order.index("ENTRYPOINT")
    assert max(i for i, name in enumerate(order) if name == "RUN") < order.index("USER")
    assert only("USER") not in ("root", "0")
    argv = json.loads(only("ENTRYPOINT")) + json.loads(only("CMD"))
    arguments = build_parser(argv[1:]).parse_args(argv[1:])
    assert (arguments.verb, arguments.host, arguments.port) == ("serve", "0.0.0.0", 8000)
    assert str(arguments.port) == only("EXPOSE")


def test_shell_commands_of_the_image_are_valid():
    for name, arguments in instructions():
        if name == "RUN":
            assert subprocess.run(["sh", "-n", "-c", arguments], timeout=10).returncode == 0
    torch = [name for name in PROJECT["project"]["dependencies"] if name.startswith("torch>")]
    installed = " ".join(arguments for name, arguments in instructions() if name == "RUN")
    assert f'"{torch[0]}"' in installed


@pytest.mark.slow
def test_health_check_of_the_image_follows_the_server(engine):  # noqa: F811
    options, _, command = only("HEALTHCHECK").partition(" CMD ")
    assert "--timeout" in options
    program, *arguments = json.loads(command)
    assert program == "python"

    def check(url):
        script = [argument.replace("http://127.0.0.1:8000", url) for argument in arguments]
        run = [sys.executable, "-S", "-E", *script]
        return subprocess.run(run, capture_output=True, timeout=20).returncode

    with running(BlockedEngine(), engine.model.config) as (url, _):
        assert check(url) == 0
    assert check(url) != 0


def unit():
    """Return the settings of the systemd unit, in lists."""
    settings = {}
    for line in UNIT.read_text().splitlines():
        name, found, value = line.partition("=")
        if found and not line.startswith("#"):
            settings.setdefault(name, []).append(value)
    return settings


def systemd_version():
    """Return the version of systemd-analyze, 0 if it is not installed."""
    if shutil.which("systemd-analyze") is None:
        return 0
    command = ["systemd-analyze", "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    return int(shown.split()[1])


def test_unit_starts_the_server_and_lets_it_stop():
    settings = unit()
    (command,) = settings["ExecStart"]
    program, *argv = shlex.split(command)
    assert program.endswith("/bin/asrllm")
    arguments = build_parser(argv).parse_args(argv)
    (credential,) = settings["LoadCredential"]
    assert arguments.api_key_file == "%d/" + credential.split(":")[0]
    assert int(settings["TimeoutStopSec"][0]) > SHUTDOWN_SECONDS
    assert settings["DynamicUser"] == ["yes"]
    assert settings["ProtectSystem"] == ["strict"]


@pytest.mark.skipif(systemd_version() < 250, reason="systemd-analyze 250 is not installed")
def test_unit_is_valid_and_hardened(tmp_path):
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace("/opt/asrllm/bin/asrllm", shutil.which("true")))
    analyze = ["systemd-analyze", "--no-pager"]
    verified = subprocess.run(
        [*analyze, "verify", "--man=no", path], capture_output=True, text=True, timeout=30
    )
    assert (verified.returncode, verified.stderr) == (0, "")
    rating = [*analyze, "security", "--offline=yes", "--threshold=20", path]  # of 0 to 100
    rated = subprocess.run(rating, capture_output=True, text=True, timeout=30)
    assert rated.returncode == 0, rated.stdout
