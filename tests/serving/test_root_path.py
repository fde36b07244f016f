"""The server behind a path of a proxy."""

import threading

import httpx
import pytest
import uvicorn
from openai import OpenAI
from websockets.exceptions import InvalidStatus

from asrllm.serving.app import ServerOptions, create_app
from asrllm.serving.metrics import ServerMetrics
from asrllm.serving.models import Models
from asrllm.serving.transcriber import Queue, Transcriber
from tests.processes import wait_for
from tests.serving.test_api import SEGMENTATION, BlockedEngine, audio, engine  # noqa: F401
from tests.serving.test_realtime import live


@pytest.fixture(params=["/asr", "/asr/"])
def url(engine, request):  # noqa: F811
    """Yield the address of a server with a key, whose root path the proxy has removed."""
    blocked = BlockedEngine()
    blocked.may_answer.set()
    transcriber = Transcriber(
        "tiny",
        blocked,
        engine.model.config,
        SEGMENTATION,
        Queue(600.0, ServerMetrics()),
        batch_size=1,
        max_seconds=60.0,
        max_decoding_seconds=60.0,
    )
    options = ServerOptions(api_key="secret", max_bytes=1 << 20, upload_seconds=20.0)
    app = create_app(Models([transcriber]), options)
    config = uvicorn.Config(app, port=0, root_path=request.param, log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started, 20)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        transcriber.close()


@pytest.mark.slow
def test_key_is_required_behind_a_proxy(url):
    assert httpx.get(f"{url}/v1/models").status_code == 401
    with pytest.raises(InvalidStatus) as rejected, live(url):
        pass
    assert rejected.value.response.status_code == 401
    assert httpx.get(f"{url}/health").status_code == 200
    client = OpenAI(base_url=f"{url}/v1", api_key="secret")
    answer = client.audio.transcriptions.create(file=("a.wav", audio()), model="tiny")
    assert answer.text
    with live(url, additional_headers={"Authorization": "Bearer secret"}):
        pass
