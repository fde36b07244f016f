"""Choose the prompt for inference: one from training, with hotwords in the form of training."""

import logging
import re

from asrllm.collator.hotwords import filled, with_context
from asrllm.data.prompts import (
    DEFAULT_PROMPTS,
    TRANSLATE,
    Prompt,
    check_prompts,
    for_transcripts,
)
from asrllm.data.text import language_tag
from asrllm.defaults import HOTWORDS_TEMPLATE
from asrllm.errors import UserError
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.text_files import read_text

logger = logging.getLogger(__name__)


def inference_prompt(
    config: AsrLlmConfig,
    *,
    prompt: str | None,
    language: str | None,
    hotwords: str | None,
    warn: bool = True,
) -> str:
    """Return the prompt for inference.

    Args:
        config: configuration of the model.
        prompt: the prompt; None uses the first trained one for the language, else the first one.
        language: language of the speech, if known.
        hotwords: words separated by commas, or @FILE with one word per line.
        warn: whether to log a warning if training did not use the prompt, or hotwords.

    Raises:
        UserError: the prompt or a hotword contains the audio token, or the list has no word.
    """
    prompts = for_transcripts(config.prompts or [], config.prompt_tasks)
    if prompt is None:
        prompt = prompt_of_language(config, language)
        if not prompt:
            prompt = prompts[0] if prompts else DEFAULT_PROMPTS[0].text
    elif warn and prompts and prompt not in (config.prompts or []):
        logger.warning(
            "prompt=%r was not used in training. Prompts of training: %s",
            prompt,
            "; ".join(prompts),
        )
    words = [] if hotwords is None else read_hotwords(hotwords)
    if warn and words and not config.hotwords_template:
        logger.warning(
            "The model may ignore hotwords, because its configuration has none from training. "
            "Set data.hotwords in training."
        )
    context = filled(config.hotwords_template or HOTWORDS_TEMPLATE, words)
    prompt = with_context(prompt, context)
    check_prompts([prompt], config.audio_token)
    return prompt


def prompt_of_language(config: AsrLlmConfig, language: str | None) -> str | None:
    """Return the first trained prompt for transcripts of this language alone, or None."""
    if language is None:
        return None
    languages = config.prompt_languages or {}
    for text in for_transcripts(config.prompts or [], config.prompt_tasks):
        if text in languages and Prompt(text=text, lang=languages[text]).fits(language, None):
            return text
    return None


def check_language(config: AsrLlmConfig, language: str, prompt: str | None) -> None:
    """Raise UserError if the language in a request to a server would have no effect.

    Args:
        config: configuration of the model.
        language: the language.
        prompt: the prompt in the request.
    """
    if prompt_of_language(config, language) is None:
        known = ", ".join(prompt_languages(config))
        fix = f"Use one of {known}, or leave it out" if known else "Leave it out"
        raise UserError(f"the model has no training prompt for language={language!r} alone. {fix}.")
    if prompt is not None:
        raise UserError("the language selects a prompt. Set the language or a prompt, not both.")


def prompt_languages(config: AsrLlmConfig) -> list[str]:
    """Return the codes of the languages for which the model has training prompts, sorted."""
    languages = config.prompt_languages or {}
    prompts = for_transcripts(config.prompts or [], config.prompt_tasks)
    return sorted({language_tag(languages[prompt]) for prompt in prompts if prompt in languages})


def check_hotwords(config: AsrLlmConfig, hotwords: str) -> None:
    """Raise UserError if the hotwords in a request to a server cannot be used."""
    if hotwords.startswith("@"):  # a request must not read a file of the server
        raise UserError("hotwords must not begin with '@'. Separate words by commas.")
    if config.hotwords_template is None:
        raise UserError(
            "the model was not trained with hotwords. Leave them out, or name them in the prompt."
        )


def prompt_of_translation(config: AsrLlmConfig) -> str | None:
    """Return the first trained prompt for translations into English, or None."""
    tasks = config.prompt_tasks or {}
    return next((text for text in config.prompts or [] if tasks.get(text) == TRANSLATE), None)


def read_hotwords(given: str) -> list[str]:
    """Return the distinct words of a list of hotwords.

    Args:
        given: words separated by commas, or @FILE with one word per line.

    Raises:
        UserError: there is no word.
    """
    if given.startswith("@"):
        lines = read_text(given[1:], "--hotwords").splitlines()
        fix = "Write one word per line."
    else:
        lines = re.split("[,，、\n]", given)
        fix = "Separate words by commas."
    words = [line.strip() for line in lines if line.strip()]
    if not words:
        raise UserError(f"hotwords={given!r} contains no word. {fix}")
    return list(dict.fromkeys(words))
