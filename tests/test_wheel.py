"""The wheel, installed in an environment of its own, outside the repository."""

import json
import os
import shutil
import site
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, assert_done, clean_environment, free_port
from tests.test_tutorial import BLOCKS, PAGE, recordings

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Installation:
    """An environment with the wheel, which shares the packages of the tests' environment.

    Attributes:
        root: its directory.
        work: the working directory of commands.
    """

    root: Path
    work: Path

    def run(self, *words: object) -> str:
        """Run a command with the environment's programs first, and return what it printed."""
        programs = f"{self.root / 'bin'}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            list(map(str, words)),
            cwd=self.work,
            env=clean_environment(PATH=programs),
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert_done(done)
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Build the wheel from a clean tree, and install it."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, check=True, capture_output=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / "tree" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "tree"]
    subprocess.run([*pip, *build], check=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    root = folder / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root], check=True, timeout=60)
    subprocess.run([*pip, "--python", root, "install", "--no-deps", wheel], check=True, timeout=60)
    # packages, but not the editable installation of the repository, whose .pth is not read there
    (packages,) = (root / "lib").glob("python*/site-packages")
    (packages / "shared.pth").write_text("\n".join(site.getsitepackages()))
    work = folder / "work"
    work.mkdir()
    return Installation(root, work)


def test_package_is_the_installed_one(installed):
    script = "import asrllm, torch; print(asrllm.__file__)"
    assert installed.run("python", "-c", script).startswith(str(installed.root))


@pytest.mark.longest(60, reason="both launchers and an evaluation with all their imports")
def test_installed_package_trains_under_both_launchers_and_evaluates(installed, world):
    for module, ranks, train, steps in (
        ("torch.distributed.run", "--nproc_per_node=2", "-m", 1),
        ("deepspeed.launcher.runner", "--num_gpus=2", "--module", 2),  # resumes
    ):
        launcher = ("python", "-m", module, ranks, f"--master_port={free_port()}")
        run = world.overrides("exp", trainer__num_steps=steps, trainer__save_every=1)
        installed.run(*launcher, train, "asrllm", "train", *run)
    data = f"data.test_data_config={world.root / 'test.yaml'}"
    installed.run("asrllm", "evaluate", "exp_dir=exp", data, "max_new_tokens=4")
    results = installed.work / "exp" / "greedy_search"
    assert json.loads((results / "results.json").read_text())["test"]["utterances"] == 9
    assert "<html" in (results / "report.html").read_text()


@pytest.mark.soak(only=True)
@pytest.mark.timeout(600)
def test_installed_package_runs_the_tutorial(installed, world):
    recordings(installed.work / "recordings")
    (installed.work / "whisper").symlink_to(world.whisper)
    (installed.work / "llm").symlink_to(world.llm)
    script = "".join(BLOCKS.findall(PAGE.read_text(encoding="utf-8")))
    script = script.replace("num_epochs: 3", "num_epochs: 1")
    installed.run("bash", "-euo", "pipefail", "-c", script)
    assert (installed.work / "model" / "model.safetensors").exists()
