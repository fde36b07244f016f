"""The prompts that training mixes."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asrllm.data.text import language_tag
from asrllm.errors import UserError, nearest
from asrllm.text_files import read_text, read_yaml

KEYS: dict[str, Any] = {"prompt": str, "weight": (int, float), "lang": str, "task": str}


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """weight: how often it is drawn, relative to the others; lang, task: of the utterances that it is for, None for all."""

    text: str
    weight: float = 1.0
    lang: str | None = None
    task: str | None = None

    def fits(self, lang: str | None, task: str | None) -> bool:
        """'zh' fits utterances of 'zh-CN', 'ZH_tw' and 'Chinese', not the other way round."""
        is_spoken = self.lang is None or f"{language_tag(lang)}-".startswith(
            f"{language_tag(self.lang)}-"
        )
        return is_spoken and (self.task is None or self.task == task)


DEFAULT_PROMPTS = (Prompt(text="Transcribe the speech."),)


def read_prompts(path: str | Path | None) -> tuple[Prompt, ...]:
    """Read the prompts of a file: a YAML list, or one prompt a line, whatever the file's name.

    Args:
        path: the file; None for the default prompt.

    Raises:
        UserError: the file has no prompt, or an entry of its list is wrong.
    """
    if path is None:
        return DEFAULT_PROMPTS
    path, where = Path(path), f"prompt_file={str(path)!r}"
    text = read_text(path, "prompt_file")
    entries = [line for line in text.splitlines() if line.strip()]
    first = next((line.lstrip() for line in entries if not line.startswith(("#", "---"))), "")
    if first == "-" or first.startswith(("- ", "[")):  # a line of free text begins otherwise
        entries = read_yaml(path, "prompt_file")
    prompts = parse_prompts(entries, where)
    if not prompts:
        raise UserError(f"{where} holds no prompt: write one a line")
    return prompts


def parse_prompts(entries: Sequence[Any], where: str) -> tuple[Prompt, ...]:
    """From texts and mappings {prompt, weight, lang, task}. Raises UserError naming `where` and the entry."""
    return tuple(_parse_prompt(entry, f"{where}, prompt {i}") for i, entry in enumerate(entries, 1))


def _parse_prompt(entry: Any, where: str) -> Prompt:
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, Mapping):
        raise UserError(
            f"{where}: {entry!r} is neither a text (put it in quotes) nor a mapping with the key 'prompt'"
        )
    for key, value in entry.items():
        if key not in KEYS:
            raise UserError(f"{where}: unknown key {key!r}: {nearest(str(key), KEYS)}")
        if not isinstance(value, KEYS[key]) or isinstance(value, bool):
            expected = "a number" if key == "weight" else "text: put it in quotes"
            raise UserError(f"{where}: {key}={value!r} must be {expected}")
        if isinstance(value, str) and not value.strip():
            raise UserError(f"{where}: {key} is empty: write something, or take it out")
    if "prompt" not in entry:
        raise UserError(f"{where}: {dict(entry)!r} lacks the key 'prompt': add its text")
    weight = float(entry.get("weight", 1.0))
    if not 0 < weight < float("inf"):
        raise UserError(
            f"{where}: weight={weight} must be above 0; leave the prompt out instead of weighing it 0"
        )
    lang, task = (entry[key].strip() if key in entry else None for key in ("lang", "task"))
    return Prompt(text=entry["prompt"].strip(), weight=weight, lang=lang, task=task)


def choose_prompt(
    prompts: Sequence[Prompt],
    *,
    seed: int,
    pass_index: int,
    key: str,
    lang: str | None = None,
    task: str | None = None,
) -> str:
    """One that fits the utterance, by weight, drawn from (seed, pass_index, key) alone: workers and ranks change nothing.

    round: how often the utterance was dealt before. Raises UserError where none fits.
    """
    fitting = [prompt for prompt in prompts if prompt.fits(lang, task)]
    if not fitting:
        there = "; ".join(
            f"{p.text!r} (lang={p.lang or 'any'}, task={p.task or 'any'})" for p in prompts
        )
        raise UserError(
            f"no prompt fits the utterance {key!r} of lang={lang!r}, task={task!r}: add one for it, or for all; there are {there}"
        )
    digest = hashlib.blake2b(f"{seed}/{pass_index}/prompt/{key}".encode(), digest_size=8).digest()
    draws = random.Random(int.from_bytes(digest, "little"))
    return draws.choices(fitting, [prompt.weight for prompt in fitting])[0].text
