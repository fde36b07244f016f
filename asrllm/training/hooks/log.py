"""Logs of JSON lines that a resumed run goes on with."""

import json
from pathlib import Path
from typing import TextIO

from asrllm.writing import write_whole


def reopen_log(path: Path, step: int) -> TextIO:
    """A log of JSON lines to append to; what an interrupted run wrote past the step it is resumed from is taken out."""
    kept = []
    if step and path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_whole(path, "".join(line + "\n" for line in kept))
    return open(path, "a", encoding="utf-8")
