"""The HTTP interface: OpenAI's audio API, health and metrics."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, File, Form, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import asrllm
from asrllm.data.audio_files import AudioFile
from asrllm.data.text import join_texts
from asrllm.errors import UserError
from asrllm.evaluation.prompt import inference_prompt, prompt_of_language
from asrllm.evaluation.subtitles import TRANSCRIPT_WRITERS
from asrllm.evaluation.transcription import EndOfFile, FileTranscript, TextSegment
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.serving.api_errors import ApiError
from asrllm.serving.chat import ChatRequest, completion
from asrllm.serving.gate import PROBLEM, Gate
from asrllm.serving.transcriber import Transcriber

LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*")
FIELDS = {
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
MAX_TEXT = 10_000  # characters of a prompt or a list of hotwords
ResponseFormat = Literal["json", "text", "srt", "verbose_json", "vtt"]


class TranscriptionFields:
    """The fields of a request for a transcription."""

    def __init__(
        self,
        file: Annotated[UploadFile, File(description="audio in any format")],
        model: Annotated[str, Form(description="a name from GET /v1/models")],
        language: Annotated[str | None, Form(description="for example en")] = None,
        prompt: Annotated[
            str | None, Form(max_length=MAX_TEXT, description="the instruction")
        ] = None,
        hotwords: Annotated[
            str | None, Form(max_length=MAX_TEXT, description="words that may occur: a,b,c")
        ] = None,
        response_format: Annotated[ResponseFormat, Form()] = "json",
        temperature: Annotated[float, Form(ge=0, le=1, description="only 0")] = 0.0,
        timestamp_granularities: Annotated[
            list[str] | None, Form(alias="timestamp_granularities[]", description="only segment")
        ] = None,
        stream: Annotated[bool, Form(description="server-sent events")] = False,
        chunking_strategy: Annotated[Literal["auto"] | None, Form()] = None,
    ) -> None:
        self.file = file
        self.model = model
        self.language = language or None
        self.prompt = prompt or None
        self.hotwords = hotwords or None
        self.response_format = response_format
        self.temperature = temperature
        self.timestamp_granularities = timestamp_granularities or []
        self.stream = stream


def create_app(
    transcriber: Transcriber,
    *,
    name: str,
    api_key: str | None,
    max_bytes: int,
    upload_seconds: float,
    origins: Sequence[str] = (),
    access_log: Callable[[str], None] | None = None,
) -> FastAPI:
    """Return the application.

    Args:
        transcriber: transcribes the audio.
        name: name of the model.
        api_key: key that requests below /v1 must have; None requires none.
        max_bytes: maximum size of a request's body.
        upload_seconds: how long an upload may take.
        origins: origins of web pages that may use the API; "*" allows all.
        access_log: called with a line of JSON for each request.
    """
    app = FastAPI(title="asrllm", version=asrllm.__version__)
    app.add_middleware(
        Gate,
        api_key=api_key,
        max_bytes=max_bytes,
        upload_seconds=upload_seconds,
        metrics=transcriber.metrics,
        access_log=access_log,
    )
    if origins:  # the last one added is the first to see a request: preflights have no key
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]
        )
    _add_error_handlers(app)
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "asrllm"}

    @app.post("/v1/audio/transcriptions", response_model=None)
    async def transcribe(
        request: Request, fields: Annotated[TranscriptionFields, Depends()]
    ) -> Response:
        _check_model(fields.model, name)
        await _check_fields(request, fields)
        prompt = _prompt(transcriber.description, fields)
        audio = await transcriber.open(fields.file.filename or "the file", await fields.file.read())
        if fields.stream:
            return await _streamed(transcriber, audio, prompt)
        answer = asyncio.create_task(_transcription(transcriber, audio, prompt, fields))
        return await _unless_disconnected(request, answer)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request, fields: ChatRequest) -> Response:
        _check_model(fields.model, name)
        content, instruction = fields.audio_and_prompt()
        prompt = _checked_prompt(transcriber.description, prompt=instruction)
        audio = await transcriber.open("the audio", content)
        answer = asyncio.create_task(_chat_answer(transcriber, audio, prompt, name))
        return await _unless_disconnected(request, answer)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{model_id:path}")
    def one_model(model_id: str) -> dict[str, Any]:
        _check_model(model_id, name)
        return model

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    def ready() -> Response:
        status = 503 if transcriber.is_full() else 200
        return JSONResponse({"status": "full" if status == 503 else "ok"}, status)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(transcriber.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


# --- checks ---


def _check_model(given: str, name: str) -> None:
    if given != name:
        raise ApiError(
            404,
            f"the model {given!r} does not exist. Use {name!r}.",
            param="model",
            code="model_not_found",
        )


async def _check_fields(request: Request, fields: TranscriptionFields) -> None:
    """Raise ApiError for a field that this server does not know, or cannot honour."""
    form = await request.form()
    for field in form:
        if field not in FIELDS:
            raise ApiError(
                400,
                f"the field {field!r} is not supported. Leave it out.",
                param=field,
                code="unsupported_field",
            )
    if fields.temperature:
        raise ApiError(
            400,
            f"temperature={fields.temperature:g} is not supported: texts are not sampled. Use 0.",
            param="temperature",
            code="unsupported_value",
        )
    unknown = set(fields.timestamp_granularities) - {"segment"}
    if unknown:
        raise ApiError(
            400,
            f"the granularity {min(unknown)!r} is not supported. Use 'segment'.",
            param="timestamp_granularities[]",
            code="unsupported_value",
        )
    if fields.timestamp_granularities and fields.response_format != "verbose_json":
        raise ApiError(
            400,
            f"response_format={fields.response_format!r} has no timestamps. Use 'verbose_json'.",
            param="timestamp_granularities[]",
            code="unsupported_value",
        )
    if fields.stream and fields.response_format not in ("json", "text"):
        raise ApiError(
            400,
            f"response_format={fields.response_format!r} cannot be streamed. Use 'json'.",
            param="stream",
            code="unsupported_value",
        )


def _prompt(description: AsrLlmConfig, fields: TranscriptionFields) -> str:
    """Return the prompt of a request.

    Raises:
        ApiError: the language, the prompt or the hotwords cannot be used.
    """
    language = fields.language
    if language and not LANGUAGE.fullmatch(language):
        raise ApiError(
            400,
            f"language={language!r} is not a language code. Use for example 'en'.",
            param="language",
            code="invalid_language",
        )
    languages = description.prompt_languages or {}
    is_trained = not language or prompt_of_language(description, language) is not None
    if languages and not is_trained and set(description.prompts or []) <= languages.keys():
        raise ApiError(
            400,
            f"the model was not trained for language={language!r}. "
            f"Use one of {', '.join(sorted(set(languages.values())))}.",
            param="language",
            code="unsupported_language",
        )
    if fields.hotwords and fields.hotwords.startswith("@"):  # a file of the server
        raise ApiError(
            400, "hotwords must not begin with '@'. Separate words by commas.", param="hotwords"
        )
    return _checked_prompt(
        description, prompt=fields.prompt, language=language, hotwords=fields.hotwords
    )


def _checked_prompt(
    description: AsrLlmConfig,
    *,
    prompt: str | None,
    language: str | None = None,
    hotwords: str | None = None,
) -> str:
    """Return the prompt, or raise ApiError if it contains the audio token or no hotword."""
    try:
        # a log of the server must not contain the content of requests
        return inference_prompt(
            description, prompt=prompt, language=language, hotwords=hotwords, warn=False
        )
    except UserError as error:
        param = "prompt" if prompt else "hotwords"
        raise ApiError(400, str(error), param=param) from error


# --- answers ---


async def _transcript(transcriber: Transcriber, audio: AudioFile, prompt: str) -> FileTranscript:
    """Return the transcript of a whole file."""
    texts: list[TextSegment] = []
    duration = 0.0
    with transcriber.admitted(audio):
        async for item in transcriber.segments(audio, prompt):
            if isinstance(item, EndOfFile):
                duration = item.duration
            else:
                texts.append(item)
    return FileTranscript(audio=audio.path, duration=duration, segments=texts)


async def _chat_answer(
    transcriber: Transcriber, audio: AudioFile, prompt: str, name: str
) -> Response:
    transcript = await _transcript(transcriber, audio, prompt)
    is_cut = any(segment.end_reason == "limit" for segment in transcript.segments)
    return JSONResponse(completion(name, transcript.text, is_cut=is_cut))


async def _transcription(
    transcriber: Transcriber, audio: AudioFile, prompt: str, fields: TranscriptionFields
) -> Response:
    """Transcribe a file, and return the text in the requested format."""
    transcript = await _transcript(transcriber, audio, prompt)
    form = fields.response_format
    if form == "json":
        usage = _usage(transcript.duration)
        return JSONResponse({"text": transcript.text, "usage": usage})
    if form == "verbose_json":
        return JSONResponse(_verbose(transcript, fields.language))
    if form == "text":
        return PlainTextResponse(transcript.text + "\n")
    return PlainTextResponse(TRANSCRIPT_WRITERS[form](transcript, fields.language))


def _usage(seconds: float) -> dict[str, Any]:
    return {"type": "duration", "seconds": round(seconds, 3)}


def _verbose(transcript: FileTranscript, language: str | None) -> dict[str, Any]:
    """Return a transcript as OpenAI's verbose_json. What is not computed is null."""
    segments: list[dict[str, Any]] = [
        {
            "id": number,
            "seek": 0,
            "start": round(segment.start, 3),
            "end": round(segment.end, 3),
            "text": segment.text,
            "tokens": None,
            "temperature": 0.0,
            "avg_logprob": None,
            "compression_ratio": None,
            "no_speech_prob": None,
        }
        for number, segment in enumerate(transcript.segments)
    ]
    return {
        "task": "transcribe",
        "language": language,
        "duration": round(transcript.duration, 3),
        "text": transcript.text,
        "segments": segments,
        "usage": _usage(transcript.duration),
    }


async def _streamed(transcriber: Transcriber, audio: AudioFile, prompt: str) -> Response:
    """Return the text as server-sent events, one for each segment."""
    admitted = transcriber.admitted(audio)
    admitted.__enter__()  # a full queue is an error before the answer begins

    async def events() -> AsyncIterator[str]:
        texts: list[str] = []
        text = ""
        try:
            async for item in transcriber.segments(audio, prompt):
                if isinstance(item, EndOfFile):
                    usage = _usage(item.duration)
                    yield _event({"type": "transcript.text.done", "text": text, "usage": usage})
                    continue
                texts.append(item.text)
                longer = join_texts(texts)
                delta = longer.removeprefix(text)
                text = longer
                yield _event({"type": "transcript.text.delta", "delta": delta})
        except (UserError, ApiError) as error:
            reason = error if isinstance(error, ApiError) else ApiError(400, str(error))
            yield _event(reason.body())
        finally:
            admitted.__exit__(None, None, None)

    return StreamingResponse(events(), media_type="text/event-stream")


def _event(fields: dict[str, Any]) -> str:
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"


async def _unless_disconnected(request: Request, answer: "asyncio.Task[Response]") -> Response:
    """Wait for an answer, and give it up if the client disconnects."""

    async def disconnection() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.create_task(disconnection())
    try:
        await asyncio.wait([answer, watch], return_when=asyncio.FIRST_COMPLETED)
    finally:
        watch.cancel()
        if not answer.done():
            answer.cancel()
    if answer.cancelled() or not answer.done():
        return Response(status_code=499)  # nobody reads it
    return answer.result()


# --- errors ---


def _add_error_handlers(app: FastAPI) -> None:
    """Answer every error with OpenAI's error object."""

    def answer_of(error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return answer_of(error)

    @app.exception_handler(UserError)
    async def on_user_error(request: Request, error: UserError) -> Response:
        return answer_of(ApiError(400, str(error), param="file", code="invalid_audio"))

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"][1:])) or "body"
        problem = f"the field {field!r} is invalid: {first['msg']}. Correct it."
        return answer_of(ApiError(400, problem, param=field, code=first["type"]))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        problem = request.scope.get(PROBLEM)
        if problem is None:
            message = f"{request.method} {request.url.path}: {error.detail}."
            problem = ApiError(error.status_code, message, headers=error.headers)
        return answer_of(problem)

    @app.exception_handler(Exception)  # uvicorn logs the traceback
    async def on_bug(request: Request, error: Exception) -> Response:
        return answer_of(
            ApiError(500, "the server failed. Its log has the reason.", kind="server_error")
        )
