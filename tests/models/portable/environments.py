#!/usr/bin/env python3
"""Make a virtual environment for each line of a file of versions, unless it exists.

python tests/models/portable/environments.py DIR [FILE]
"""

import subprocess
import sys
import venv
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
VERSIONS = Path(__file__).with_name("versions.txt")
DONE = "complete"


def requirements(versions: Path = VERSIONS) -> list[str]:
    """Return the requirements of each environment.

    Args:
        versions: a file with a line for each. A word that begins with "without:" is a package that
            is removed again.
    """
    lines = versions.read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def name_of(requirement: str) -> str:
    """Return the name of an environment: the versions of its packages."""
    names = [word for word in requirement.split() if "==" in word]
    return "_".join(names).replace("==", "-")


def make(folder: Path, requirement: str) -> None:
    """Make one environment. One that was interrupted is made again."""
    if (folder / DONE).exists():
        return
    print(f"making {folder}", flush=True)
    venv.create(folder, clear=True, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "-q"]
    words = requirement.split()
    unwanted = [word.removeprefix("without:") for word in words if word.startswith("without:")]
    wanted = [word for word in words if not word.startswith("without:")]
    # torch first: another package would choose a build of it with CUDA
    subprocess.run([*pip, "install", wanted[0]], check=True)
    subprocess.run([*pip, "install", *wanted], check=True, cwd=REPOSITORY)
    if unwanted:
        subprocess.run([*pip, "uninstall", "-y", *unwanted], check=True)
    (folder / DONE).touch()


if __name__ == "__main__":
    for requirement in requirements(*map(Path, sys.argv[2:3])):
        make(Path(sys.argv[1]) / name_of(requirement), requirement)
