"""The prompts that training mixes."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asrllm.config import read_text, read_yaml
from asrllm.errors import UserError

DEFAULT_PROMPTS = ("Transcribe the speech.",)


def read_prompts(path: str | Path | None) -> tuple[str, ...]:
    """The prompts of a file: one a line, or a YAML list of strings. None: the default prompt."""
    if path is None:
        return DEFAULT_PROMPTS
    path = Path(path)
    text = read_text(path, "prompt_file")
    lines: list[Any] = text.splitlines()
    if text.lstrip().startswith("- "):  # a line of free text begins otherwise
        lines = read_yaml(path, "prompt_file")
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise UserError(f"prompt_file={str(path)!r} is a YAML list with other things than text: write one prompt a line")
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise UserError(f"prompt_file={str(path)!r} holds no prompt: write one a line")
    return prompts


def choose_prompt(prompts: Sequence[str], *, seed: int, epoch: int, key: str) -> str:
    """Drawn from (seed, epoch, key) alone: workers and ranks change nothing."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=8).digest()
    return prompts[int.from_bytes(digest, "little") % len(prompts)]
