"""The HTTP interface: OpenAI's audio API, health and metrics."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles

import asrllm
from asrllm.errors import UserError
from asrllm.evaluation.prompt import prompt_languages
from asrllm.serving import openapi
from asrllm.serving.answers import EventStream, chat_answer, transcription, unless_disconnected
from asrllm.serving.api_errors import ApiError, invalid_audio, invalid_field, server_error
from asrllm.serving.chat import ChatRequest
from asrllm.serving.fields import (
    TranscriptionFields,
    check_fields,
    checked_prompt,
    prompt_of_request,
)
from asrllm.serving.forms import FormRoute
from asrllm.serving.gate import PROBLEM, Gate
from asrllm.serving.models import Models
from asrllm.serving.realtime.route import add_realtime
from asrllm.serving.transcriber import Transcriber
from asrllm.serving.translations import add_translations

PAGE = Path(__file__).parent / "page"
POLICY = "default-src 'self'; img-src data:; media-src blob:"


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of the HTTP interface.

    Attributes:
        api_key: key that requests below /v1 must have; None requires none.
        max_bytes: maximum size of a request's body.
        upload_seconds: how long an upload may take.
        origins: origins of web pages that may use the API; "*" allows all.
        access_log: called with a line of JSON for each request; None logs nothing.
        logs_texts: whether the line has the answer.
    """

    api_key: str | None
    max_bytes: int
    upload_seconds: float
    origins: Sequence[str] = ()
    access_log: Callable[[str], None] | None = None
    logs_texts: bool = False


def create_app(models: Models, options: ServerOptions) -> FastAPI:
    """Return the application.

    Args:
        models: the models.
        options: options of the interface.
    """
    # FastAPI's pages load scripts from a CDN
    app = FastAPI(
        title="asrllm",
        version=asrllm.__version__,
        docs_url=None,
        redoc_url=None,
        responses=openapi.ERRORS,
    )
    app.router.route_class = FormRoute
    app.add_middleware(
        Gate,
        api_key=options.api_key,
        max_bytes=options.max_bytes,
        upload_seconds=options.upload_seconds,
        metrics=models.metrics,
        access_log=options.access_log,
        logs_texts=options.logs_texts,
    )
    if options.origins:  # added last, it sees requests first: preflights have no key
        app.add_middleware(
            CORSMiddleware, allow_origins=options.origins, allow_methods=["*"], allow_headers=["*"]
        )
    _add_error_handlers(app)
    _add_audio_routes(app, models)
    add_translations(app, models)
    add_realtime(app, models, options.origins)
    _add_models(app, models)
    _add_status(app, models)
    _add_page(app)
    return app


def _add_audio_routes(app: FastAPI, models: Models) -> None:
    @app.post(
        "/v1/audio/transcriptions",
        response_class=Response,
        responses=openapi.TRANSCRIPTION,
    )
    async def transcribe(
        request: Request, fields: Annotated[TranscriptionFields, Depends()]
    ) -> Response:
        transcriber = models.get(fields.model)
        await check_fields(request, fields)
        prompt = prompt_of_request(
            transcriber.description,
            language=fields.language,
            prompt=fields.prompt,
            hotwords=fields.hotwords,
        )
        content = await fields.file.read()
        audio, place = await transcriber.open(fields.file.filename or "the file", content)
        if fields.stream:
            return EventStream(transcriber, audio, place, prompt)
        answer = asyncio.create_task(transcription(transcriber, audio, place, prompt, fields))
        return await unless_disconnected(request, answer)

    @app.post("/v1/chat/completions", response_class=Response, responses=openapi.CHAT)
    async def chat(request: Request, fields: ChatRequest) -> Response:
        transcriber = models.get(fields.model)
        content, instruction = fields.audio_and_prompt()
        prompt = checked_prompt(transcriber.description, prompt=instruction)
        audio, place = await transcriber.open("the audio", content)
        answer = asyncio.create_task(chat_answer(transcriber, audio, place, prompt))
        return await unless_disconnected(request, answer)


def _add_page(app: FastAPI) -> None:
    """Serve the page at /, which loads nothing from elsewhere."""
    app.mount("/page", StaticFiles(directory=PAGE))

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": POLICY})


def _add_models(app: FastAPI, models: Models) -> None:
    created = int(time.time())

    def described(transcriber: Transcriber) -> dict[str, Any]:
        return {
            "id": transcriber.name,
            "object": "model",
            "created": created,
            "owned_by": "asrllm",
            "languages": prompt_languages(transcriber.description),
            "hotwords": transcriber.description.hotwords_template is not None,
        }

    @app.get("/v1/models")
    def all_models() -> dict[str, Any]:
        return {"object": "list", "data": [described(model) for model in models]}

    @app.get("/v1/models/{model_id:path}")
    def one_model(model_id: str) -> dict[str, Any]:
        return described(models.get(model_id))


def _add_status(app: FastAPI, models: Models) -> None:
    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", response_class=Response, responses=openapi.READINESS)
    def ready() -> Response:
        status = 503 if models.queue.is_full() else 200
        return JSONResponse({"status": "full" if status == 503 else "ok"}, status)

    @app.get("/metrics", response_class=Response, responses=openapi.METRIC_RESPONSES)
    def metrics() -> Response:
        return Response(models.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_error_handlers(app: FastAPI) -> None:
    """Answer every error with OpenAI's error object."""

    def answer_of(error: ApiError) -> Response:
        # json.dumps escapes surrogates, which a field's name may contain
        body = json.dumps(error.body())
        return Response(body, error.status, error.headers, media_type="application/json")

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return answer_of(error)

    @app.exception_handler(UserError)
    async def on_user_error(request: Request, error: UserError) -> Response:
        return answer_of(invalid_audio(error))

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return answer_of(invalid_field(first, first["loc"][1:]))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        problem = request.scope.get(PROBLEM)
        if problem is None:
            message = f"{request.method} {request.url.path}: {str(error.detail).rstrip('.')}."
            problem = ApiError(error.status_code, message, headers=error.headers)
        return answer_of(problem)

    @app.exception_handler(Exception)  # uvicorn logs the traceback
    async def on_bug(request: Request, error: Exception) -> Response:
        return answer_of(server_error())
