"""What a model is asked when it is used: a prompt that it was trained with, and hotwords as in training."""

import logging
import re

from asrllm.collator.hotwords import filled, with_context
from asrllm.data.prompts import DEFAULT_PROMPTS, Prompt
from asrllm.errors import UserError
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.build import check_prompts
from asrllm.text_files import read_text

TEMPLATE = "Hotwords: {words}."  # where training had none

logger = logging.getLogger(__name__)


def prompt_to_ask(
    description: AsrLlmConfig, *, prompt: str | None, language: str | None, hotwords: str | None
) -> str:
    """`prompt`, else the first trained one that is for `language`, else the first; behind it the hotwords.

    hotwords: words parted by commas, or @FILE of one a line. Warns of what training never saw. Raises UserError for a prompt or a
    hotword that holds the audio token, and for a list without a word.
    """
    prompts = description.prompts or []
    if prompt is None:
        prompt = of_language(description, language) or (prompts or [DEFAULT_PROMPTS[0].text])[0]
    elif prompts and prompt not in prompts:
        logger.warning(
            "prompt=%r was never seen in training; seen were: %s", prompt, "; ".join(prompts)
        )
    words = read_hotwords(hotwords) if hotwords is not None else []
    if words and not description.hotwords_template:
        logger.warning(
            "the model's training is not known to have given hotwords (data.hotwords): it may not heed them"
        )
    asked = with_context(prompt, filled(description.hotwords_template or TEMPLATE, words))
    check_prompts([asked], description.audio_token)
    return asked


def of_language(description: AsrLlmConfig, language: str | None) -> str | None:
    """The first trained prompt that is for this language and not for any."""
    if language is None:
        return None
    of = description.prompt_languages or {}
    fitting = (
        text
        for text in description.prompts or []
        if text in of and Prompt(text=text, lang=of[text]).fits(language, None)
    )
    return next(fitting, None)


def read_hotwords(given: str) -> list[str]:
    text = (
        "\n".join(read_text(given[1:], "--hotwords").splitlines())
        if given.startswith("@")
        else re.sub("[,，、]", "\n", given)
    )
    words = [word.strip() for word in text.split("\n") if word.strip()]
    if not words:
        raise UserError(
            f"--hotwords {given!r} holds no word: give words parted by commas, or @FILE of one a line"
        )
    return list(dict.fromkeys(words))
