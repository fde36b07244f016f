"""Translations of models that were trained for them, and the rejection of others."""

import httpx
import pytest
from openai import BadRequestError, OpenAI

from asrllm.data.prompts import Prompt
from asrllm.evaluation.prompt import inference_prompt
from asrllm.models.build import describe_prompts
from tests.models.asr_llm.test_modeling import make_model
from tests.serving.test_api import BlockedEngine, audio, engine, running  # noqa: F401

PROMPTS = [
    Prompt(text="Translate.", lang="de", task="translate"),
    Prompt(text="Transcribe."),
    Prompt(text="Schreibe.", lang="de"),
]


@pytest.fixture(scope="module")
def translating(world):
    """Yield an engine that can translate, and its server's address."""
    config = make_model(world).config
    describe_prompts(config, PROMPTS)
    made = BlockedEngine()
    made.may_answer.set()
    with running(made, config) as (url, _):
        yield made, url


def translate(url, **fields):
    client = OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
    return client.audio.translations.create(file=("a.wav", audio()), model="tiny", **fields)


@pytest.mark.slow
def test_translation_uses_the_trained_prompt(translating):
    made, url = translating
    assert set(translate(url).text.split()) == {"word"}
    assert made.prompts[-1] == "Translate."
    assert translate(url, prompt="In English!", response_format="text").startswith("word")
    assert made.prompts[-1] == "In English!"
    assert "-->" in translate(url, response_format="srt")
    verbose = translate(url, response_format="verbose_json")
    assert verbose.language == "english"
    assert verbose.segments[0].text == "word"


@pytest.mark.slow
def test_model_without_a_prompt_for_translations_rejects_them(engine):  # noqa: F811
    with running(BlockedEngine(), engine.model.config) as (url, _):
        for fields in ({}, {"prompt": "Translate."}):
            with pytest.raises(BadRequestError) as rejected:
                translate(url, **fields)
            assert rejected.value.code == "unsupported_task"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"language": "de"}, "language"),
        ({"stream": "true"}, "stream"),
        ({"temperature": "0.5"}, "temperature"),
        ({"prompt": "<|AUDIO|>"}, "prompt"),
        ({"model": "other"}, "model"),
    ],
)
def test_field_that_translations_do_not_have_is_rejected(translating, fields, param):
    answer = httpx.post(
        f"{translating[1]}/v1/audio/translations",
        files={"file": ("a.wav", audio())},
        data={"model": "tiny"} | fields,
        timeout=60,
    )
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


def test_prompt_for_translations_is_not_one_for_transcripts(world):
    config = make_model(world).config
    describe_prompts(config, PROMPTS)
    for language, expected in (("de", "Schreibe."), (None, "Transcribe.")):
        prompt = inference_prompt(config, prompt=None, language=language, hotwords=None)
        assert prompt == expected
