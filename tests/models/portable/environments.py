#!/usr/bin/env python3
"""Make a virtual environment for each line of versions.txt, unless it exists.

python tests/models/portable/environments.py DIR
"""

import subprocess
import sys
import venv
from pathlib import Path

VERSIONS = Path(__file__).with_name("versions.txt")
DONE = "complete"


def requirements() -> list[str]:
    """Return the requirements of each environment."""
    lines = VERSIONS.read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def name_of(requirement: str) -> str:
    """Return the name of an environment: its versions."""
    return requirement.replace("==", "-").replace(" ", "_")


def make(folder: Path, requirement: str) -> None:
    """Make one environment. One that was interrupted is made again."""
    if (folder / DONE).exists():
        return
    print(f"making {folder}", flush=True)
    venv.create(folder, clear=True, with_pip=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, *requirement.split()], check=True)
    (folder / DONE).touch()


if __name__ == "__main__":
    for requirement in requirements():
        make(Path(sys.argv[1]) / name_of(requirement), requirement)
