"""The fields of chats."""

import pytest

from asrllm.serving.api_errors import ApiError
from asrllm.serving.chat import ChatRequest
from asrllm.serving.fields import checked_prompt
from tests.models.asr_llm.test_modeling import make_model


@pytest.mark.parametrize("data", ["*", "abc", "3\u00cd"])
def test_audio_that_is_not_base64_is_rejected(data):
    audio = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    chat = {"model": "tiny", "messages": [{"role": "user", "content": [audio]}]}
    with pytest.raises(ApiError, match="base64"):
        ChatRequest.model_validate(chat).audio_and_prompt()


@pytest.mark.parametrize("field", ["prompt", "hotwords"])
def test_half_a_character_is_rejected(world, field):
    """Tokenizers fail on it, and with it the texts of the whole batch would fail."""
    fields = {"prompt": None, "hotwords": None} | {field: "a \ud800"}
    with pytest.raises(ApiError):
        checked_prompt(make_model(world).config, **fields)
