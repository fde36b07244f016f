"""The events that a client of a live session sends, and the settings of the session."""

import base64
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from asrllm.serving.api_errors import SHOWN_LENGTH, ApiError, invalid_field
from asrllm.serving.fields import MAX_TEXT
from asrllm.text_files import parse_json

PCM_RATE = 24000  # Hz of the audio of a client


class _EventModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class PcmFormat(_EventModel):
    """Format of the audio: 16-bit samples of one channel, little-endian."""

    type: Literal["audio/pcm"] = "audio/pcm"
    rate: Literal[24000] = 24000


class TranscriptionSettings(_EventModel):
    """How to transcribe. None selects the model's default."""

    model: Annotated[str | None, Field(max_length=MAX_TEXT)] = None
    language: Annotated[str | None, Field(max_length=MAX_TEXT)] = None
    prompt: Annotated[str | None, Field(max_length=MAX_TEXT)] = None
    keywords: list[str] | None = None


class ServerVad(_EventModel):
    """Voice activity detection that ends an item at a pause."""

    type: Literal["server_vad"] = "server_vad"
    threshold: Annotated[float, Field(ge=0.2, lt=1)] = 0.5
    prefix_padding_ms: Annotated[int, Field(ge=0, le=1000)] = 300
    silence_duration_ms: Annotated[int, Field(ge=100, le=2000)] = 500


class AudioInput(_EventModel):
    """Settings of the audio. Without turn detection, items end when the client commits them."""

    format: PcmFormat = PcmFormat()
    noise_reduction: None = None
    transcription: TranscriptionSettings = TranscriptionSettings()
    turn_detection: ServerVad | None = ServerVad()


class AudioSettings(_EventModel):
    """Settings of the audio of a session."""

    input: AudioInput = AudioInput()


class SessionSettings(_EventModel):
    """Settings of a live session."""

    type: Literal["transcription"] = "transcription"
    audio: AudioSettings = AudioSettings()
    include: Annotated[list[str] | None, Field(max_length=0)] = None

    @property
    def turns(self) -> ServerVad | None:
        """How turns are detected, None if the client ends them."""
        return self.audio.input.turn_detection

    def updated(self, changes: dict[str, Any]) -> "SessionSettings":
        """Return the settings with those of a session.update.

        Raises:
            ApiError: a setting is unknown or not supported.
        """
        if "type" not in changes:
            raise ApiError(400, "session.type is missing. Use 'transcription'.", param="session")
        try:
            return SessionSettings.model_validate(_merged(self.model_dump(), changes))
        except ValidationError as error:
            raise _invalid(error, "session") from error


def _merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = settings | changes
    for name in settings.keys() & changes.keys():
        if isinstance(settings[name], dict) and isinstance(changes[name], dict):
            merged[name] = _merged(settings[name], changes[name])
    return merged


class Event(_EventModel):
    """An event of a client."""

    type: str
    event_id: Annotated[str | None, Field(max_length=512)] = None


class SessionUpdate(Event):
    """Changes the settings that it contains."""

    session: dict[str, Any]


class Append(Event):
    """Appends audio to the buffer."""

    audio: str

    def samples(self) -> np.ndarray:
        """Return the audio as (samples,) float32 at PCM_RATE.

        Raises:
            ApiError: it is not base64, or has half a sample.
        """
        try:
            content = base64.b64decode(self.audio, validate=True)
        except ValueError as error:  # also of characters beyond ASCII
            problem = f"the audio is not base64 ({error}). Encode its bytes."
            raise ApiError(400, problem, param="audio", code="invalid_audio") from error
        if len(content) % 2:
            problem = f"the audio has {len(content)} bytes. Send whole samples of two bytes."
            raise ApiError(400, problem, param="audio", code="invalid_audio")
        return np.frombuffer(content, "<i2").astype(np.float32) / 32768


class Commit(Event):
    """Ends the item whose audio is in the buffer."""


class Clear(Event):
    """Discards the audio in the buffer."""


EVENTS: dict[str, type[Event]] = {
    "session.update": SessionUpdate,
    "input_audio_buffer.append": Append,
    "input_audio_buffer.commit": Commit,
    "input_audio_buffer.clear": Clear,
}


def parse_event(message: dict[str, Any]) -> Event:
    """Return the event in a message of a client.

    Args:
        message: a decoded JSON object.

    Raises:
        ApiError: the event is unknown, or one of its fields is wrong.
    """
    kind = message.get("type")
    if not isinstance(kind, str) or kind not in EVENTS:
        problem = (
            f"the event type {_shorten(kind)} is not supported. Use one of {', '.join(EVENTS)}."
        )
        raise ApiError(400, problem, param="type", code="invalid_event")
    try:
        return EVENTS[kind].model_validate(message)
    except ValidationError as error:
        raise _invalid(error) from error


def parse_message(text: str | None) -> dict[str, Any]:
    """Return the JSON object in a frame.

    Args:
        text: content of the frame, None for a binary one.

    Raises:
        ApiError: the frame is binary, or is not a JSON object.
    """
    if text is None:
        problem = "the frame is binary. Send events as text, with the audio in base64."
        raise ApiError(400, problem, code="invalid_event")
    try:
        message = parse_json(text)
    except ValueError as error:
        problem = f"the event is not valid JSON: {str(error)[:SHOWN_LENGTH]}. Send a JSON object."
        raise ApiError(400, problem, code="invalid_json") from error
    if not isinstance(message, dict):
        problem = f"the event {_shorten(message)} is not an object. Send a JSON object."
        raise ApiError(400, problem, code="invalid_event")
    return message


def _shorten(value: object) -> str:
    return repr(value)[:SHOWN_LENGTH]


def _invalid(error: ValidationError, *parents: str) -> ApiError:
    first = error.errors()[0]
    return invalid_field(first, [*parents, *first["loc"]])
