"""The HTTP interface: a real server in a thread, and OpenAI's client."""

import base64
import contextlib
import io
import json
import shutil
import socket
import subprocess
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
import soundfile
import torch
import uvicorn
from openai import OpenAI
from openai.types.audio import TranscriptionVerbose

from asrllm.audio.vad import Loudness
from asrllm.data.audio_files import open_audio
from asrllm.data.prompts import Prompt
from asrllm.defaults import RATE
from asrllm.evaluation.engine import TorchEngine, WholeBatch
from asrllm.evaluation.prompt import inference_prompt
from asrllm.evaluation.transcription import Segmentation, transcribe_files
from asrllm.models.asr_llm.generation import Answer
from asrllm.models.build import describe_prompts
from asrllm.serving.api_errors import ApiError
from asrllm.serving.app import ServerOptions, create_app
from asrllm.serving.connections import ConnectionLimits, LimitedConfig
from asrllm.serving.metrics import ServerMetrics
from asrllm.serving.models import Models
from asrllm.serving.transcriber import Queue, Transcriber
from asrllm.testing import vowels
from tests.models.asr_llm.test_modeling import make_model
from tests.processes import wait_for

MAX_BYTES = 1 << 20
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg")
SEGMENTATION = Segmentation(detector=Loudness, longest=32000)


@contextlib.contextmanager
def running(engine, description, segmentation=SEGMENTATION, others=None, **options):
    """Serve an engine named tiny and others, and yield the address and tiny's transcriber."""
    limits = {"batch_size": 8, "max_seconds": 60.0, "max_decoding_seconds": 60.0}
    queue = Queue(options.pop("max_queued_seconds", 600.0), ServerMetrics())
    gate = {
        "api_key": None,
        "max_bytes": MAX_BYTES,
        "upload_seconds": 20.0,
        "origins": [],
        "access_log": None,
        "logs_texts": False,
    }
    connections = ConnectionLimits(
        count=options.pop("max_connections", 100),
        header_seconds=options.pop("header_seconds", 20.0),
        upload_seconds=options.get("upload_seconds", 20.0),
    )
    for name, value in options.items():
        (gate if name in gate else limits)[name] = value
    transcriber = Transcriber("tiny", engine, description, segmentation, queue, **limits)
    others = [
        Transcriber(name, other, description, segmentation, queue, **limits)
        for name, other in (others or {}).items()
    ]
    models = Models([transcriber, *others])
    app = create_app(models, ServerOptions(**gate))
    config = LimitedConfig(app, connections, models.metrics, port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started, 20)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", transcriber
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
        models.close()


@pytest.fixture(scope="module")
def engine(world):
    model = make_model(world)
    prompts = [Prompt(text="Transcribe."), Prompt(text="Write.", lang="English")]
    describe_prompts(model.config, prompts)
    model.config.hotwords_template = "Names: {words}."
    return TorchEngine(model.eval(), {"max_new_tokens": 12})


@pytest.fixture(scope="module")
def server(engine):
    with running(engine, engine.model.config) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(server):
    return OpenAI(base_url=f"{server}/v1", api_key="-", max_retries=0, timeout=60)


class BlockedEngine:
    """An engine whose answers wait for an event."""

    limits = (1600, 480_000)
    padded_to = 0.0
    parallel = 1

    def __init__(self):
        self.waves = []
        self.prompts = []
        self.may_answer = threading.Event()

    def answer(self, waves, prompts):
        self.waves += waves
        self.prompts += prompts
        assert self.may_answer.wait(20)
        return [Answer(text="word") for _ in waves]

    def open_batch(self):
        return WholeBatch(self)

    def close(self):
        pass


def audio(seconds=1.5, seed=0, form="WAV"):
    """Return the bytes of an audio file."""
    file = io.BytesIO()
    soundfile.write(file, vowels(seconds, seed=seed, rate=16000), 16000, format=form)
    return file.getvalue()


def text_alone(engine, content, prompt="Transcribe."):
    """Return the text of `asrllm transcribe` for one file."""
    files = [open_audio("a.wav", content)]
    (found,) = transcribe_files(
        engine, files, SEGMENTATION, prompt=prompt, batch_size=1, advance=lambda _: None
    )
    return found.text


def send(url, content=None, **fields):
    """Send a request without OpenAI's client, which would reject some of them."""
    files = {"file": ("a.wav", audio() if content is None else content)}
    return httpx.post(
        f"{url}/v1/audio/transcriptions",
        files=files,
        data={"model": "tiny"} | fields,
        timeout=60,
    )


@pytest.mark.slow
def test_every_format_has_the_text_of_transcribe(client, engine):
    content = audio(5)
    expected = text_alone(engine, content)
    assert expected

    def create(form):
        return client.audio.transcriptions.create(
            file=("a.wav", content), model="tiny", response_format=form
        )

    assert create("json").text == expected
    assert create("text") == expected + "\n"
    verbose = TranscriptionVerbose.model_validate(create("verbose_json").model_dump())
    assert (verbose.text, verbose.language) == (expected, "und")
    assert verbose.duration == pytest.approx(5, abs=0.01)
    first = verbose.segments[0]
    assert first.start < first.end <= 5
    assert engine.model.processor.tokenizer.decode(first.tokens).strip() == first.text
    assert first.avg_logprob < 0
    assert 0 <= first.no_speech_prob <= 0.5
    text = first.text.encode()
    assert first.compression_ratio == pytest.approx(len(text) / len(zlib.compress(text)), abs=1e-4)
    assert create("srt").startswith("1\n00:00:0")
    assert create("vtt").startswith("WEBVTT\n\n1\n00:00:0")


@pytest.mark.slow
def test_streamed_events_join_to_the_text(client, engine):
    content = audio(6)
    stream = client.audio.transcriptions.create(file=("a.wav", content), model="tiny", stream=True)
    events = list(stream)
    assert [event.type for event in events[:-1]] == ["transcript.text.delta"] * (len(events) - 1)
    assert len(events) > 2
    assert events[-1].type == "transcript.text.done"
    assert "".join(event.delta for event in events[:-1]) == events[-1].text
    assert events[-1].text == text_alone(engine, content)
    for event in events:  # the client itself does not validate
        type(event).model_validate_json(event.to_json())


def chat_part(content):
    data = base64.b64encode(content).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


@pytest.mark.slow
def test_chat_with_audio_has_the_text_of_its_instruction(client, engine):
    content = audio()
    for texts, prompt in (([], "Transcribe."), ([{"type": "text", "text": "Do it."}], "Do it.")):
        messages = [{"role": "user", "content": [*texts, chat_part(content)]}]
        # clients that write out the defaults
        answer = client.chat.completions.create(
            model="tiny", messages=messages, n=1, stream=False, temperature=0.0
        )
        (choice,) = answer.choices
        assert choice.message.content == text_alone(engine, content, prompt)
        assert choice.finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 1},
        {"n": 2},
        {"stream": True},
        {"messages": []},
        {"messages": [{"role": "user", "content": "Hello."}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello."}]}]},
        {"messages": [{"role": "user", "content": [chat_part(audio())] * 2}]},
        {"messages": [{"role": "user", "content": [chat_part(b"")]}]},
        {"messages": [{"role": "system", "content": [chat_part(audio())]}]},
    ],
)
def test_chat_that_cannot_be_answered_is_rejected(server, changes):
    chat = {"model": "tiny", "messages": [{"role": "user", "content": [chat_part(audio())]}]}
    answer = httpx.post(f"{server}/v1/chat/completions", json=chat | changes, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"]


@pytest.mark.slow
def test_fields_change_the_prompt(server, engine):
    content = audio()
    description = engine.model.config
    for fields in ({"language": "en"}, {"prompt": "Write it."}, {"hotwords": "one,two"}):
        given = {"language": None, "prompt": None, "hotwords": None} | fields
        prompt = inference_prompt(description, **given)
        assert send(server, content, **fields).json()["text"] == text_alone(engine, content, prompt)


@pytest.mark.parametrize("form", ["FLAC", "OGG", "MP3"])
def test_other_audio_formats_are_read(server, form):
    assert send(server, audio(form=form)).status_code == 200


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "whisper-1"}, 404, "model"),
        ({"temperature": "0.5"}, 400, "temperature"),
        ({"temperature": "warm"}, 400, "temperature"),
        ({"response_format": "diarized_json"}, 400, "response_format"),
        ({"timestamp_granularities[]": "word", "response_format": "verbose_json"}, 400, None),
        ({"timestamp_granularities[]": "segment"}, 400, "timestamp_granularities[]"),
        ({"include[]": "logprobs"}, 400, "include[]"),
        ({"stream": "true", "response_format": "srt"}, 400, "stream"),
        ({"language": "../en"}, 400, "language"),
        ({"language": "de"}, 400, "language"),
        ({"language": "en", "prompt": "Write it."}, 400, "language"),
        ({"hotwords": "@/etc/hostname"}, 400, "hotwords"),
        ({"hotwords": ","}, 400, "hotwords"),
        ({"prompt": "<|AUDIO|>"}, 400, "prompt"),
        ({"prompt": "x" * 2000}, 400, "prompt"),
        ({"unknown": "1"}, 400, "unknown"),
        ({"language": ["en", "en"]}, 400, "language"),
    ],
)
def test_field_that_cannot_be_honoured_is_rejected(server, fields, status, param):
    answer = send(server, **fields)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == (param or "timestamp_granularities[]")


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"this is no audio " * 50, audio()[: len(audio()) // 2], audio(0.002)],
    ids=["empty", "one byte", "text", "truncated", "too short"],
)
def test_bad_audio_is_an_error_object_and_the_server_continues(server, content):
    answer = send(server, content)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "file"
    assert httpx.get(f"{server}/health").json() == {"status": "ok"}


def unknown_length(seconds):
    """Return a FLAC of silence whose header has no length."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(round(16000 * seconds)), 16000, format="FLAC")
    data = bytearray(file.getvalue())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    return bytes(data)


@pytest.mark.slow
@needs_ffmpeg
def test_audio_of_unknown_length_counts_and_is_limited(engine):
    blocked = BlockedEngine()
    blocked.may_answer.set()
    with running(blocked, engine.model.config, max_seconds=5.0) as (url, transcriber):
        assert send(url, unknown_length(4)).status_code == 200
        answer = send(url, unknown_length(300))
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "audio_too_long"
        assert not transcriber.queue.places


def test_place_in_the_queue_grows_with_the_audio_and_ends_exactly():
    metrics = ServerMetrics()
    waiting = Queue(10.0, metrics)
    places = [waiting.enter(samples) for samples in (1600, 3200)]
    places[0].grow(5 * RATE)
    places[0].grow(4 * RATE)
    with pytest.raises(ApiError, match="queued"):
        waiting.enter(6 * RATE)
    for place in [*places, places[0]]:
        place.close()
    places[0].grow(6 * RATE)  # a reader may still be in a block
    assert (waiting.samples, waiting.places) == (0, {})
    waiting.enter(100 * RATE)  # a single request is always admitted


@pytest.mark.slow
@needs_ffmpeg
@pytest.mark.parametrize("name", ["a.wav", "a.m3u8", "a.mpd"])
def test_playlist_cannot_read_a_file_of_the_server(server, tmp_path, name):
    secret = tmp_path / "secret.aac"
    (tmp_path / "a.wav").write_bytes(audio())
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", secret]
    subprocess.run(command, check=True, timeout=60)
    playlists = [
        f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:3,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile {secret}\n",
    ]
    for playlist in playlists:
        answer = httpx.post(
            f"{server}/v1/audio/transcriptions",
            files={"file": (name, playlist.encode())},
            data={"model": "tiny"},
            timeout=60,
        )
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "invalid_audio"


@pytest.mark.slow
def test_long_audio_and_large_files_are_rejected(server, engine):
    assert send(server, audio(61)).status_code == 413
    assert send(server, bytes(MAX_BYTES)).json()["error"]["code"] == "file_too_large"

    def chunks():
        yield b"--x\r\nContent-Disposition: form-data; name=file; filename=a\r\n\r\n"
        for _ in range(40):
            yield bytes(1 << 15)

    answer = httpx.post(
        f"{server}/v1/audio/transcriptions",
        content=chunks(),
        headers={"Content-Type": "multipart/form-data; boundary=x"},
        timeout=60,
    )
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "file_too_large"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/audio/transcriptions", 405),
        ("POST", "/v1/audio/transcriptions", 400),
        ("GET", "/v1/models/other", 404),
    ],
)
def test_unknown_requests_get_an_error_object(server, method, path, status):
    answer = httpx.request(method, server + path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    tiny = client.models.retrieve("tiny")
    assert (tiny.id, tiny.languages, tiny.hotwords) == ("tiny", ["en"], True)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.slow
def test_field_that_the_model_was_not_trained_with_is_rejected(world):
    plain = make_model(world).config
    with running(BlockedEngine(), plain) as (url, _):
        for field, value in (("language", "en"), ("hotwords", "one")):
            answer = send(url, **{field: value})
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == field
        (listed,) = httpx.get(f"{url}/v1/models").json()["data"]
        assert (listed["languages"], listed["hotwords"]) == ([], False)


@pytest.mark.slow
def test_each_model_answers_by_its_name(engine):
    words = {}
    for name in ("one", "two"):
        words[name] = BlockedEngine()
        words[name].answer = lambda waves, _, name=name: [Answer(text=name) for _ in waves]
    config = engine.model.config
    with running(BlockedEngine(), config, others=words, max_queued_seconds=3.0) as (url, _):
        listed = httpx.get(f"{url}/v1/models").json()["data"]
        assert [model["id"] for model in listed] == ["tiny", *words]
        for name in words:
            assert set(send(url, model=name).json()["text"].split()) == {name}
        assert send(url, model="three").status_code == 404


@pytest.mark.slow
def test_api_key_is_required_below_v1(engine):
    with running(engine, engine.model.config, api_key="secret") as (url, _):
        assert httpx.get(f"{url}/health").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()
        assert list(OpenAI(base_url=f"{url}/v1", api_key="secret").models.list())


def test_web_pages_of_other_origins_are_allowed_by_option(engine, server):
    headers = {"Origin": "https://a.org", "Access-Control-Request-Method": "POST"}
    path = "/v1/audio/transcriptions"
    options = {"origins": ["https://a.org"], "api_key": "secret"}
    with running(engine, engine.model.config, **options) as (url, _):
        answer = httpx.options(url + path, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == "https://a.org"
    assert httpx.options(server + path, headers=headers).status_code == 405


@pytest.mark.slow
def test_requests_are_logged_without_their_content(engine, caplog):
    lines = []
    with running(engine, engine.model.config, access_log=lines.append) as (url, _):
        send(url, prompt="A secret.")
        httpx.get(f"{url}/no")
        wait_for(lambda: len(lines) == 2, 20)
        metrics = httpx.get(f"{url}/metrics").text
    first, second = map(json.loads, lines[:2])
    assert (first["method"], first["status"]) == ("POST", 200)
    assert first["seconds"] > 0
    assert second["status"] == 404
    assert "secret" not in "".join(lines) + caplog.text
    path = "/v1/audio/transcriptions"
    assert f'asrllm_requests_total{{path="{path}",status="200"}} 1.0' in metrics
    assert 'asrllm_requests_total{path="other",status="404"} 1.0' in metrics


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"stream": "true"}])
def test_request_that_takes_too_long_ends(engine, fields):
    blocked = BlockedEngine()
    options = {"max_decoding_seconds": 0.2}
    with running(blocked, engine.model.config, **options) as (url, transcriber):
        answer = send(url, **fields)
        blocked.may_answer.set()
        wait_for(lambda: not transcriber.queue.places, 20)
    assert "decoding_too_slow" in answer.text
    if not fields:
        assert answer.status_code == 503
        assert answer.headers["x-should-retry"] == "false"


@pytest.mark.slow
def test_texts_are_logged_if_the_option_is_set(engine):
    lines = []
    options = {"access_log": lines.append, "logs_texts": True}
    with running(engine, engine.model.config, **options) as (url, _):
        text = send(url, prompt="A secret.").json()["text"]
        httpx.get(f"{url}/metrics")
        wait_for(lambda: len(lines) == 2, 20)
    first, second = map(json.loads, lines)
    assert json.loads(first["answer"])["text"] == text
    assert "answer" not in second
    assert "secret" not in "".join(lines)


@pytest.mark.slow
def test_concurrent_requests_have_the_texts_of_single_ones(server, engine):
    contents = [audio(0.5 + i % 3, seed=i) for i in range(16)]
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda content: send(server, content).json(), contents))
    for content, answer in zip(contents, answers, strict=True):
        assert answer["text"] == text_alone(engine, content)
    metrics = httpx.get(f"{server}/metrics").text
    assert 'asrllm_batch_size_bucket{le="1.0"}' in metrics
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line[0] != "#")
    assert float(values["asrllm_batch_size_sum"]) > float(values["asrllm_batch_size_count"])
    assert float(values["asrllm_queued_audio_seconds"]) == 0


@pytest.mark.slow
def test_full_queue_is_rejected_until_there_is_room(engine):
    blocked = BlockedEngine()
    config = engine.model.config
    with (
        running(blocked, config, max_queued_seconds=2.0) as (url, _),
        ThreadPoolExecutor(1) as threads,
    ):
        first = threads.submit(send, url)
        wait_for(lambda: blocked.waves, 20)
        rejected = send(url)
        assert rejected.status_code == 429
        assert httpx.get(f"{url}/ready").status_code == 503
        assert int(rejected.headers["Retry-After"]) > 0
        blocked.may_answer.set()
        assert set(first.result(20).json()["text"].split()) == {"word"}
        wait_for(lambda: httpx.get(f"{url}/ready").status_code == 200, 20)
        assert send(url).status_code == 200


@pytest.mark.slow
def test_client_that_disconnects_frees_its_place(engine):
    blocked = BlockedEngine()
    with running(blocked, engine.model.config, batch_size=1) as (url, transcriber):
        with ThreadPoolExecutor(2) as threads:
            first = threads.submit(send, url)
            wait_for(lambda: blocked.waves, 20)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(
                    f"{url}/v1/audio/transcriptions",
                    files={"file": ("b.wav", audio(1.0))},
                    data={"model": "tiny", "prompt": "Abandoned."},
                    timeout=httpx.Timeout(20, read=1),
                )
            wait_for(lambda: len(transcriber.queue.places) == 1, 20)
            blocked.may_answer.set()
            assert first.result(20).status_code == 200
        assert send(url).status_code == 200
        assert set(blocked.prompts) == {"Transcribe."}


@pytest.mark.slow
def test_reading_stops_when_the_client_disconnects(engine, monkeypatch):
    """Without speech no segment ends, and only the end of a segment would show the loss."""
    closed = threading.Event()

    def endless(file):
        try:
            while True:
                yield np.zeros(1 << 16, np.float32)
        finally:
            closed.set()

    monkeypatch.setattr("asrllm.evaluation.transcription.read_blocks", endless)
    blocked = BlockedEngine()
    silent = Segmentation(detector=Silent, longest=32000)
    with running(blocked, engine.model.config, silent, max_seconds=1e9) as (url, transcriber):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{url}/v1/audio/transcriptions",
                files={"file": ("b.wav", audio(1.0))},
                data={"model": "tiny"},
                timeout=httpx.Timeout(20, read=1),
            )
        wait_for(lambda: not transcriber.queue.places, 20)
        assert closed.wait(20)
    assert not blocked.waves


class Silent(Loudness):
    """A detector that finds no speech."""

    def _probabilities(self, frames):
        return np.zeros(len(frames), np.float32)


def test_number_of_threads_does_not_depend_on_concurrent_requests(engine):
    threads = torch.get_num_threads()
    found = []

    class Counting(BlockedEngine):
        def answer(self, waves, prompts):
            found.append(torch.get_num_threads())
            torch.set_num_threads(1)  # as voice activity detection may leave it
            return [Answer(text="word") for _ in waves]

    with running(Counting(), engine.model.config, batch_size=1) as (url, _):
        assert send(url, audio(6)).status_code == 200
    torch.set_num_threads(threads)
    assert len(found) > 1
    assert set(found) == {threads}


@pytest.mark.slow
def test_slow_upload_is_ended(engine):
    with running(BlockedEngine(), engine.model.config, upload_seconds=0.3) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        head = (
            "POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
            "Content-Type: multipart/form-data; boundary=x\r\n\r\n--x"
        )
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(head.encode())
            began = time.monotonic()
            answer = connection.recv(4096).decode()
            assert " 408 " in answer.splitlines()[0]
            assert time.monotonic() - began < 10


@pytest.mark.slow
def test_engine_that_fails_is_a_server_error(engine):
    class Failing(BlockedEngine):
        def answer(self, waves, prompts):
            raise ZeroDivisionError

    with running(Failing(), engine.model.config) as (url, _):
        answer = send(url)
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        (line,) = send(url, stream="true").text.strip().splitlines()
        assert json.loads(line.removeprefix("data: "))["error"]["type"] == "server_error"
        assert 'status="500"} 1.0' in httpx.get(f"{url}/metrics").text
        assert httpx.get(f"{url}/health").status_code == 200


@pytest.mark.slow
def test_samples_are_those_of_the_file(engine):
    blocked = BlockedEngine()
    blocked.may_answer.set()
    with running(blocked, engine.model.config) as (url, _):
        assert send(url, audio(1.5)).status_code == 200
    wave, _ = soundfile.read(io.BytesIO(audio(1.5)), dtype="float32")
    heard = np.concatenate(blocked.waves)
    assert any((wave[i : i + len(heard)] == heard).all() for i in range(len(wave) - len(heard) + 1))
