"""The prompts of training: files of weighted prompts, and the choice of one per utterance."""

import hashlib
import logging
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from asrllm.data.text import language_tag
from asrllm.errors import UserError
from asrllm.schema import PositiveFloat, Text, build, component
from asrllm.text_files import read_text, read_yaml

logger = logging.getLogger(__name__)


@component
class Prompt:
    """A prompt, and the utterances for which it may be used."""

    text: Text = Field(validation_alias="prompt")
    """the prompt"""
    weight: PositiveFloat = 1.0
    """how often it is drawn, relative to the other prompts"""
    lang: Text | None = None
    """language of the utterances; None fits every language"""
    task: Text | None = None
    """task of the utterances; None fits every task"""

    def fits(self, lang: str | None, task: str | None) -> bool:
        """Return whether the prompt may be used for an utterance of this language and task.

        'zh' fits utterances of 'zh-CN', 'ZH_tw' and 'Chinese'. 'zh-CN' does not fit 'zh'.
        """
        if self.task is not None and self.task != task:
            return False
        if self.lang is None:
            return True
        return f"{language_tag(lang)}-".startswith(f"{language_tag(self.lang)}-")


# how lines begin that are probably not meant as prompts
MARKUP = re.compile(r"\s*(#|---|\{|- |prompts?\s*:)")
TRANSLATE = "translate"  # task of prompts for translations into English, as Whisper calls it
DEFAULT_PROMPTS = (Prompt(text="Transcribe the speech."),)


def for_transcripts(prompts: Sequence[str], tasks: Mapping[str, str] | None) -> list[str]:
    """Return the prompts that do not ask for a translation, or all prompts if each of them does.

    Args:
        prompts: prompts of training.
        tasks: {prompt: task} of those that are for one task.
    """
    found = [text for text in prompts if (tasks or {}).get(text) != TRANSLATE]
    return found or list(prompts)


def read_prompts(path: str | Path | None) -> tuple[Prompt, ...]:
    """Read a prompt file: a YAML list, or one prompt per line. The file name does not matter.

    Args:
        path: the file, or None for the default prompt.

    Raises:
        UserError: the file has no prompt, or an entry of its list is invalid.
    """
    if path is None:
        return DEFAULT_PROMPTS
    path = Path(path)
    where = f"prompt_file={str(path)!r}"
    text = read_text(path, "prompt_file")
    lines = [line for line in text.splitlines() if line.strip()]
    entries: list[Any] = lines
    if _is_yaml_list(lines):
        entries = _read_yaml_or_lines(path, lines)
    else:
        _warn_of_markup(lines, where)
    prompts = parse_prompts(entries, where)
    if not prompts:
        raise UserError(f"{where} has no prompt. Write one prompt per line.")
    return prompts


def _read_yaml_or_lines(path: Path, lines: list[str]) -> list[Any]:
    """Return the entries of a YAML list, or its lines if they turn out to be plain text."""
    try:
        return read_yaml(path, "prompt_file")
    except UserError as error:
        if any(map(_is_yaml_entry, lines)):
            raise
        logger.warning("%s. Its lines are taken as prompts.", str(error).rstrip("."))
        return lines


def _warn_of_markup(lines: Sequence[str], where: str) -> None:
    """Warn if a line that becomes a prompt looks like a comment, a YAML mapping or JSON."""
    for line in lines:
        if MARKUP.match(line):
            logger.warning(
                "%s: the line %r is taken as a prompt. If it is not one, remove it, or write all "
                "prompts as a YAML list ('- Transcribe.').",
                where,
                line.strip(),
            )
            return


def _is_yaml_entry(line: str) -> bool:
    """Return whether a line is an entry with keys, which nobody writes as a prompt."""
    return re.match(r"\s*-\s*(\{|prompt\s*:)", line) is not None


def _is_yaml_list(lines: Sequence[str]) -> bool:
    """Return whether the first line is the start of a YAML list, which no free text begins with."""
    content = (line.lstrip() for line in lines if not line.startswith(("#", "---")))
    first = next(content, "")
    return first == "-" or first.startswith(("- ", "["))


def parse_prompts(entries: Sequence[Any], where: str) -> tuple[Prompt, ...]:
    """Parse a list of prompts.

    Args:
        entries: texts, or mappings with the keys prompt, weight, lang and task.
        where: the place of the list, for messages.

    Raises:
        UserError: an entry is invalid. The message names the place and the entry.
    """
    return tuple(_parse_prompt(entry, f"{where}, prompt {i}") for i, entry in enumerate(entries, 1))


def _parse_prompt(entry: Any, where: str) -> Prompt:
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, Mapping):
        raise UserError(
            f"{where}: {entry!r} is neither a text nor a mapping with the key 'prompt'. "
            "Put a text in quotes."
        )
    return build(Prompt, entry, where=f"{where}: ")


def choose_prompt(
    prompts: Sequence[Prompt],
    *,
    seed: int,
    pass_index: int,
    key: str,
    lang: str | None = None,
    task: str | None = None,
) -> str:
    """Draw the prompt of an utterance by weight, among those that fit it.

    The draw depends on (seed, pass_index, key) alone, so workers and ranks do not change it.

    Args:
        prompts: the prompts to choose from.
        seed: seed of the run.
        pass_index: how often the utterance was trained on before.
        key: the utterance's key.
        lang: the utterance's language.
        task: the utterance's task.

    Raises:
        UserError: no prompt fits the utterance.
    """
    fitting = [prompt for prompt in prompts if prompt.fits(lang, task)]
    if not fitting:
        available = "; ".join(map(_summary, prompts))
        raise UserError(
            f"no prompt fits the utterance {key!r} with lang={lang!r}, task={task!r}. "
            f"Add a prompt for it, or one without lang and task. Available: {available}"
        )
    digest = hashlib.blake2b(f"{seed}/{pass_index}/prompt/{key}".encode(), digest_size=8).digest()
    rng = random.Random(int.from_bytes(digest, "little"))
    weights = [prompt.weight for prompt in fitting]
    return rng.choices(fitting, weights)[0].text


def _summary(prompt: Prompt) -> str:
    return f"{prompt.text!r} (lang={prompt.lang or 'any'}, task={prompt.task or 'any'})"


def check_prompts(prompts: Sequence[str], audio_token: str) -> None:
    """Raise UserError if a prompt contains the audio token."""
    for prompt in prompts:
        if audio_token in prompt:
            raise UserError(
                f"the prompt {prompt!r} contains the audio token {audio_token!r}, which is added "
                "before it. Remove the token."
            )
