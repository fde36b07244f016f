"""Chats with audio, in the form of OpenAI's chat completions."""

import base64
import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from asrllm.serving.api_errors import ApiError

Content = list[Annotated["TextPart | AudioPart", Field(discriminator="type")]]


class _ChatModel(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_ChatModel):
    """Text of a message."""

    type: Literal["text"]
    text: str


class InputAudio(_ChatModel):
    """Audio of a message: a file in base64, and its format, which is also found in its header."""

    data: str
    format: str


class AudioPart(_ChatModel):
    """Audio of a message."""

    type: Literal["input_audio"]
    input_audio: InputAudio


class UserMessage(_ChatModel):
    """A message of the user."""

    role: Literal["user"]
    content: Annotated[Content, Field(min_length=1)]


class ChatRequest(_ChatModel):
    """A request for a chat completion: one message with one audio and an instruction."""

    model: str
    messages: Annotated[list[UserMessage], Field(min_length=1, max_length=1)]
    temperature: Literal[0] | None = None
    n: Literal[1] | None = None
    stream: Literal[False] | None = None

    def audio_and_prompt(self) -> tuple[bytes, str | None]:
        """Return the audio file, and the instruction or None.

        Raises:
            ApiError: the message has no audio or several, or the audio is not base64.
        """
        parts = self.messages[0].content
        audios = [part.input_audio for part in parts if isinstance(part, AudioPart)]
        texts = [part.text for part in parts if isinstance(part, TextPart)]
        if len(audios) != 1:
            raise ApiError(
                400,
                f"the message has {len(audios)} audios. Send one 'input_audio' part.",
                param="messages.0.content",
            )
        try:
            content = base64.b64decode(audios[0].data, validate=True)
        except ValueError as error:  # also of characters beyond ASCII
            raise ApiError(
                400, f"the audio is not base64 ({error}).", param="input_audio.data"
            ) from error
        return content, " ".join(texts).strip() or None


def completion(model: str, text: str, *, is_cut: bool) -> dict[str, Any]:
    """Return the answer to a ChatRequest.

    Args:
        model: name of the model.
        text: the text.
        is_cut: whether the text ended at its maximum length.
    """
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "length" if is_cut else "stop",
            }
        ],
    }
