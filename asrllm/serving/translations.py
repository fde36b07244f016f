"""Translations into English, of models that were trained for them."""

import asyncio
from typing import Annotated

from fastapi import Depends, FastAPI, Request, Response

from asrllm.data.prompts import TRANSLATE
from asrllm.evaluation.prompt import prompt_of_translation
from asrllm.serving import openapi
from asrllm.serving.answers import transcription, unless_disconnected
from asrllm.serving.api_errors import ApiError
from asrllm.serving.fields import (
    TranslationFields,
    check_fields,
    prompt_of_request,
)
from asrllm.serving.models import Models


def add_translations(app: FastAPI, models: Models) -> None:
    """Add /v1/audio/translations."""

    @app.post("/v1/audio/translations", response_class=Response, responses=openapi.TRANSLATION)
    async def translate(
        request: Request, fields: Annotated[TranslationFields, Depends()]
    ) -> Response:
        transcriber = models.get(fields.model)
        await check_fields(request, fields)
        trained = prompt_of_translation(transcriber.description)
        if trained is None:
            problem = (
                f"the model {fields.model!r} was not trained to translate: none of its prompts has "
                f"the task {TRANSLATE!r}. Use /v1/audio/transcriptions."
            )
            raise ApiError(400, problem, param="model", code="unsupported_task")
        prompt = prompt_of_request(
            transcriber.description,
            language=None,
            prompt=fields.prompt or trained,
            hotwords=fields.hotwords,
        )
        content = await fields.file.read()
        audio, place = await transcriber.open(fields.file.filename or "the file", content)
        answer = asyncio.create_task(transcription(transcriber, audio, place, prompt, fields))
        return await unless_disconnected(request, answer)
