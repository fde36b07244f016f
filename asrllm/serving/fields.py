"""The fields of a request for a transcription, and what they may be."""

import re
from typing import Annotated, Literal

from fastapi import File, Form, Request, UploadFile

from asrllm.errors import UserError
from asrllm.evaluation.prompt import check_hotwords, check_language, inference_prompt
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.serving.api_errors import ApiError

LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*")
REQUEST_FIELDS = frozenset(
    {
        "file",
        "model",
        "language",
        "prompt",
        "hotwords",
        "response_format",
        "temperature",
        "timestamp_granularities[]",
        "stream",
        "chunking_strategy",
    }
)
MAX_TEXT = 1000  # characters of a prompt or a list of hotwords; LLMs have 2048 positions or more
ResponseFormat = Literal["json", "text", "srt", "verbose_json", "vtt"]


# fields of both kinds of requests
Audio = Annotated[UploadFile, File(description="audio in any format")]
Name = Annotated[str, Form(description="a name from GET /v1/models")]
Instruction = Annotated[str | None, Form(max_length=MAX_TEXT, description="the instruction")]
HotwordsField = Annotated[
    str | None, Form(max_length=MAX_TEXT, description="words that may occur: a,b,c")
]
Temperature = Annotated[float, Form(ge=0, le=1, description="only 0")]


class TranscriptionFields:
    """The fields of a request for a transcription."""

    task = "transcribe"
    supported = REQUEST_FIELDS

    def __init__(
        self,
        file: Audio,
        model: Name,
        language: Annotated[str | None, Form(description="for example en")] = None,
        prompt: Instruction = None,
        hotwords: HotwordsField = None,
        response_format: Annotated[ResponseFormat, Form()] = "json",
        temperature: Temperature = 0.0,
        timestamp_granularities: Annotated[
            list[str] | None, Form(alias="timestamp_granularities[]", description="only segment")
        ] = None,
        stream: Annotated[bool, Form(description="server-sent events")] = False,
        chunking_strategy: Annotated[Literal["auto"] | None, Form()] = None,
    ) -> None:
        self.file = file
        self.model = model
        self.language = (language or "").strip().lower() or None
        self.prompt = prompt or None
        self.hotwords = hotwords or None
        self.response_format = response_format
        self.temperature = temperature
        self.timestamp_granularities = timestamp_granularities or []
        self.stream = stream


class TranslationFields(TranscriptionFields):
    """The fields of a request for a translation."""

    task = "translate"
    supported = frozenset({"file", "model", "prompt", "hotwords", "response_format", "temperature"})

    def __init__(
        self,
        file: Audio,
        model: Name,
        prompt: Instruction = None,
        hotwords: HotwordsField = None,
        response_format: Annotated[ResponseFormat, Form()] = "json",
        temperature: Temperature = 0.0,
    ) -> None:
        super().__init__(
            file=file,
            model=model,
            prompt=prompt,
            hotwords=hotwords,
            response_format=response_format,
            temperature=temperature,
        )


async def check_fields(request: Request, fields: TranscriptionFields) -> None:
    """Raise ApiError for a field that is unknown or not supported."""
    given = [field for field, _ in (await request.form()).multi_items()]
    for field in [*given, *request.query_params]:
        if field not in fields.supported or field in request.query_params:
            raise _unsupported(field, f"the field {field!r} is not supported. Leave it out.")
        if given.count(field) > 1 and not field.endswith("[]"):
            raise _unsupported(field, f"the field {field!r} is repeated. Send it once.")
    form = fields.response_format
    if fields.temperature:
        value = f"{fields.temperature:g}"
        problem = f"temperature={value} is not supported, because texts are not sampled. Use 0."
        raise _unsupported("temperature", problem)
    if fields.stream and form not in ("json", "text"):
        raise _unsupported("stream", f"response_format={form!r} cannot be streamed. Use 'json'.")
    param = "timestamp_granularities[]"
    for granularity in fields.timestamp_granularities:
        if granularity != "segment":
            problem = f"the granularity {granularity!r} is not supported. Use 'segment'."
            raise _unsupported(param, problem)
        if form != "verbose_json":
            problem = f"response_format={form!r} has no timestamps. Use 'verbose_json'."
            raise _unsupported(param, problem)


def _unsupported(param: str, problem: str) -> ApiError:
    return ApiError(400, problem, param=param, code="unsupported_value")


def prompt_of_request(
    description: AsrLlmConfig, *, language: str | None, prompt: str | None, hotwords: str | None
) -> str:
    """Return the prompt of a request. Empty fields have no effect.

    Raises:
        ApiError: the language, the prompt or the hotwords cannot be used.
    """
    language = (language or "").strip().lower() or None
    if language:
        _check_language(description, language, prompt or None)
    if hotwords:
        try:
            check_hotwords(description, hotwords)
        except UserError as error:
            raise _unsupported("hotwords", str(error)) from error
    return checked_prompt(
        description, prompt=prompt or None, language=language, hotwords=hotwords or None
    )


def _check_language(description: AsrLlmConfig, language: str, prompt: str | None) -> None:
    """Raise ApiError if a language is malformed, or would have no effect."""
    if not LANGUAGE.fullmatch(language):
        problem = f"language={language!r} is not a language code. Use for example 'en'."
        raise ApiError(400, problem, param="language", code="invalid_language")
    try:
        check_language(description, language, prompt)
    except UserError as error:
        code = "unsupported_language"
        raise ApiError(400, str(error), param="language", code=code) from error


def checked_prompt(
    description: AsrLlmConfig,
    *,
    prompt: str | None,
    language: str | None = None,
    hotwords: str | None = None,
) -> str:
    """Return the prompt.

    Raises:
        ApiError: the prompt contains the audio token or half a character, or the list of hotwords
            is empty.
    """
    param = "prompt" if prompt else "hotwords"
    if any("\ud800" <= c <= "\udfff" for c in f"{prompt}{hotwords}"):  # JSON may contain them
        raise ApiError(400, "the text has half a character. Send whole characters.", param=param)
    try:
        # a log of the server must not contain the content of requests
        return inference_prompt(
            description, prompt=prompt, language=language, hotwords=hotwords, warn=False
        )
    except UserError as error:
        raise ApiError(400, str(error), param=param) from error
