"""The fields of chats."""

import pytest

from asrllm.serving.api_errors import ApiError
from asrllm.serving.chat import ChatRequest


@pytest.mark.parametrize("data", ["*", "abc", "3\u00cd"])
def test_audio_that_is_not_base64_is_refused(data):
    audio = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    chat = {"model": "tiny", "messages": [{"role": "user", "content": [audio]}]}
    with pytest.raises(ApiError, match="base64"):
        ChatRequest.model_validate(chat).audio_and_prompt()
