"""Live sessions: a real server, and OpenAI's client or a bare WebSocket."""

import base64
import contextlib
import functools
import io
import json
import logging
import signal

import httpx
import numpy as np
import pytest
import soundfile
import soxr
from openai import OpenAI
from openai.types.realtime import RealtimeServerEvent
from pydantic import TypeAdapter
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from asrllm.audio.vad import Loudness, Silero, load_silero
from asrllm.evaluation.transcription import Segmentation
from asrllm.models.asr_llm.generation import Answer
from asrllm.serving.realtime.items import SpeechItem, agreed_text
from asrllm.testing import vowels
from tests.conftest import REPOSITORY
from tests.processes import started, wait_for
from tests.serving.test_api import BlockedEngine, engine, running, send  # noqa: F401
from tests.serving.test_server import address, model  # noqa: F401

PCM_RATE = 24000
EVENT = TypeAdapter(RealtimeServerEvent)
TRANSCRIPTION = "conversation.item.input_audio_transcription"


def pcm(*stretches):
    """Return PCM of vowels for positive seconds, and of silence for negative ones."""
    parts = []
    for i, seconds in enumerate(stretches):
        if seconds > 0:
            parts.append(vowels(seconds, seed=i, rate=PCM_RATE))
        else:
            parts.append(np.zeros(round(-seconds * PCM_RATE)))
    return (np.concatenate(parts) * 32767).astype("<i2").tobytes()


def wav(content):
    """Return PCM as the samples that a file of 16 kHz has."""
    wave = np.frombuffer(content, "<i2").astype(np.float32) / 32768
    return soxr.resample(wave, PCM_RATE, 16000)


@pytest.fixture
def no_errors(caplog):
    """Fail if the server logs an error."""
    logger = logging.getLogger("uvicorn.error")
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)
    assert caplog.get_records("call") == []


class Live:
    """A bare connection, which checks every event with OpenAI's types."""

    def __init__(self, socket):
        self.socket = socket
        self.session = self.next("session.created")["session"]

    def send(self, kind, **fields):
        self.socket.send(json.dumps({"type": kind} | fields))

    def append(self, content, size=4800):
        for start in range(0, len(content), size):
            part = content[start : start + size]
            self.send("input_audio_buffer.append", audio=base64.b64encode(part).decode())

    def commit(self):
        self.send("input_audio_buffer.commit")

    def update(self, **audio_input):
        session = {"type": "transcription", "audio": {"input": audio_input}}
        self.send("session.update", session=session)

    def receive(self):
        event = json.loads(self.socket.recv(timeout=20))
        EVENT.validate_python(event)
        return event

    def until(self, kind):
        """Return the events up to the next one of a type."""
        events = [self.receive()]
        while events[-1]["type"] != kind:
            events.append(self.receive())
        return events

    def next(self, kind):
        """Return the next event, which must have a type."""
        event = self.receive()
        assert event["type"] == kind, event
        return event

    def error(self):
        return self.next("error")["error"]


@contextlib.contextmanager
def live(url, query="?intent=transcription", **options):
    address = url.replace("http", "ws") + "/v1/realtime" + query
    with connect(address, open_timeout=20, **options) as socket:
        yield Live(socket)


class Energy(Loudness):
    """A detector that finds speech where there is sound."""

    def _probabilities(self, frames):
        return (np.abs(frames).max(1) > 0.01).astype(np.float32)


SEGMENTATION = Segmentation(detector=Energy, longest=80_000)


class CountingEngine(BlockedEngine):
    """An engine that says one word for each half second of audio, the last of which is a guess."""

    def __init__(self):
        super().__init__()
        self.may_answer.set()

    def answer(self, waves, prompts):
        super().answer(waves, prompts)
        return [Answer(text=self.text(wave)) for wave in waves]

    def text(self, wave):
        words = [f"w{i}" for i in range(len(wave) // 8000)]
        return " ".join([*words, f"g{len(wave)}"])


@contextlib.contextmanager
def serving(engine, config, segmentation=SEGMENTATION, **options):  # noqa: F811
    with running(engine, config, segmentation, **options) as (url, transcriber):
        yield url, transcriber


@pytest.fixture(scope="module")
def url(engine):  # noqa: F811
    with serving(engine, engine.model.config) as (address, _):
        yield address


@pytest.fixture(scope="module")
def counting(engine):  # noqa: F811
    made = CountingEngine()
    with serving(made, engine.model.config) as (address, transcriber):
        yield address, transcriber, made


def of(events, kind):
    return [event for event in events if event["type"] == kind]


def completed(events):
    return [event["transcript"] for event in of(events, f"{TRANSCRIPTION}.completed")]


def deltas(events):
    return "".join(event["delta"] for event in of(events, f"{TRANSCRIPTION}.delta"))


@pytest.mark.slow
def test_official_client_gets_the_text_of_each_stretch_of_speech(url, engine):  # noqa: F811
    content = pcm(-0.3, 1.0, -0.8, 1.2, -0.8)
    client = OpenAI(base_url=f"{url}/v1", api_key="-")
    query = {"intent": "transcription"}
    chosen = {"format": {"type": "audio/pcm", "rate": PCM_RATE}}
    chosen["transcription"] = {"model": "tiny", "language": "en"}
    session = {"type": "transcription", "audio": {"input": chosen}}
    events = []
    with client.realtime.connect(extra_query=query) as connection:
        connection.session.update(session=session)
        audio = base64.b64encode(content).decode()
        connection.input_audio_buffer.append(audio=audio)
        for event in connection:
            events.append(event.model_dump())
            if len(completed(events)) == 2:
                break
    assert [event["type"] for event in events[:2]] == ["session.created", "session.updated"]
    starts = of(events, "input_audio_buffer.speech_started")
    ends = of(events, "input_audio_buffer.speech_stopped")
    items = [event["item_id"] for event in of(events, "input_audio_buffer.committed")]
    assert items == [event["item_id"] for event in of(events, f"{TRANSCRIPTION}.completed")]
    wave = wav(content)
    for start, end, text in zip(starts, ends, completed(events), strict=True):
        segment = wave[start["audio_start_ms"] * 16 : end["audio_end_ms"] * 16]
        assert 1.0 < len(segment) / 16000 < 2.0
        assert engine.answer([segment], ["Write."])[0].text == text != ""


@pytest.mark.slow
def test_committed_audio_has_the_text_of_the_same_file(url, engine):  # noqa: F811
    content = pcm(1.0, -2.5, 1.2, -0.3)
    with live(url) as session:
        session.update(turn_detection=None)
        session.next("session.updated")
        session.append(content)
        session.commit()
        events = session.until(f"{TRANSCRIPTION}.completed")
        session.commit()  # nothing is left
        assert session.error()["code"] == "input_audio_buffer_commit_empty"
    file = io.BytesIO()
    soundfile.write(file, np.frombuffer(content, "<i2"), PCM_RATE, format="WAV")
    (text,) = completed(events)
    answer = send(url, file.getvalue())
    assert text == answer.json()["text"]
    assert events[-1]["usage"]["seconds"] > 2
    assert not of(events, "input_audio_buffer.speech_started")


def test_partial_texts_appear_during_speech(counting, monkeypatch):
    url, transcriber, _ = counting
    answers = []
    submit = transcriber.batcher.submit

    def submit_and_note(wave, prompt):
        answers.append(submit(wave, prompt))
        return answers[-1]

    monkeypatch.setattr(transcriber.batcher, "submit", submit_and_note)
    with live(url) as session:
        session.append(pcm(1.3))
        started = session.next("input_audio_buffer.speech_started")
        wait_for(lambda: answers and answers[0].done(), 20)  # the first partial text
        session.append(pcm(1.4))
        first = session.next(f"{TRANSCRIPTION}.delta")  # of two agreeing texts, before any pause
        assert first["delta"] == "w0 w1"
        assert first["item_id"] == started["item_id"]
        session.append(pcm(-1.0))
        events = session.until(f"{TRANSCRIPTION}.completed")
    (text,) = completed(events)
    assert text.startswith("w0 w1 w2 w3 w4 g")
    assert first["delta"] + deltas(events) == text
    assert {event["item_id"] for event in events} == {started["item_id"]}


@pytest.mark.parametrize(
    ("before", "now", "agreed"),
    [
        ("one two", "one two three", "one two"),
        ("one two", "one two", "one"),
        ("one tw", "one two three", "one"),
        ("", "one two", ""),
        ("one two three", "one", ""),
        ("今天天", "今天天气好", "今天天"),
        ("ok 今天", "ok 今天x", "ok 今天"),
    ],
)
def test_words_are_stable_if_two_partial_texts_agree(before, now, agreed):
    assert agreed_text(before, now) == agreed


def test_text_that_contradicts_its_beginning_has_no_delta():
    item = SpeechItem(texts=["one"])
    assert item.delta("two") == "one two"
    item.texts.append("too")
    assert item.delta() == ""
    assert item.text == "one too"


def test_settings_change_the_prompt_and_are_reported(counting):
    url, _, made = counting
    with live(url) as session:
        assert session.session["audio"]["input"]["transcription"]["model"] == "tiny"
        session.update(transcription={"prompt": "Do it."}, turn_detection={"threshold": 0.7})
        shown = session.next("session.updated")["session"]["audio"]["input"]
        assert shown["turn_detection"]["threshold"] == 0.7
        assert shown["turn_detection"]["silence_duration_ms"] == 500
        session.update(transcription={"keywords": ["one", "two"]})
        shown = session.next("session.updated")["session"]["audio"]["input"]
        assert shown["transcription"]["prompt"] == "Do it."
        session.append(pcm(0.5))
        session.commit()
        session.until(f"{TRANSCRIPTION}.completed")
    assert "Do it." in made.prompts[-1]
    assert "one" in made.prompts[-1]


def test_pause_that_ends_an_item_is_as_long_as_chosen(counting):
    url, _, _ = counting
    with live(url) as session:
        session.update(turn_detection={"silence_duration_ms": 1500})
        session.next("session.updated")
        session.append(pcm(0.5, -1.0, 0.5, -2.0))
        session.commit()
        events = session.until("input_audio_buffer.committed")
        assert len(of(events, "input_audio_buffer.speech_stopped")) == 1
        start, end = events[0]["audio_start_ms"], events[1]["audio_end_ms"]
        assert end - start > 2000


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"format": {"type": "audio/pcmu"}}, "format"),
        ({"format": {"rate": 16000}}, "format"),
        ({"noise_reduction": {"type": "near_field"}}, "noise_reduction"),
        ({"transcription": {"model": "whisper-1"}}, "model"),
        ({"transcription": {"language": "../en"}}, "language"),
        ({"transcription": {"prompt": "<|AUDIO|>"}}, "prompt"),
        ({"transcription": {"prompt": "x" * 2000}}, "prompt"),
        ({"transcription": {"prompt": "\ud800"}}, "prompt"),
        ({"transcription": {"keywords": ["x" * 2000]}}, "keywords"),
        ({"transcription": {"keywords": ["\ud800"]}}, "transcription.keywords"),
        ({"transcription": {"keywords": ["@/etc/passwd"]}}, "transcription.keywords"),
        ({"transcription": {"language": "de"}}, "transcription.language"),
        ({"transcription": {"delay": "low"}}, "delay"),
        ({"transcription": None}, "transcription"),
        ({"turn_detection": {"type": "semantic_vad"}}, "turn_detection"),
        ({"turn_detection": {"threshold": "0.5"}}, "threshold"),
        ({"turn_detection": {"silence_duration_ms": 10**9}}, "silence_duration_ms"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_setting_that_cannot_be_honoured_is_rejected(counting, settings, param):
    with live(counting[0]) as session:
        session.update(**settings)
        assert param in session.error()["param"]
        session.update()
        assert session.next("session.updated")["session"] == session.session


def test_garbage_is_answered_with_an_error_event_and_the_session_continues(counting):
    audio = base64.b64encode(pcm(0.6)).decode()
    frames = [
        b"\0\1",
        "",
        "{",
        "[]",
        "[" * 100_000,
        "null",
        "{}",
        '{"type": 1}',
        '{"type": "response.create"}',
        '{"type": "input_audio_buffer.append"}',
        '{"type": "input_audio_buffer.append", "audio": 5}',
        '{"type": "input_audio_buffer.append", "audio": "*"}',
        '{"type": "input_audio_buffer.append", "audio": "\u00fc"}',
        '{"type": "input_audio_buffer.append", "audio": "\\ud800"}',
        '{"type": "input_audio_buffer.append", "audio": "AAAA"}',  # three bytes
        '{"type": "input_audio_buffer.append", "audio": "", "x": 1}',
        '{"type": "input_audio_buffer.commit", "event_id": 5}',
        '{"type": "input_audio_buffer.commit"}',
        '{"type": "session.update"}',
        '{"type": "session.update", "session": 5}',
        '{"type": "session.update", "session": {"type": "realtime"}}',
        '{"type": "session.update", "session": {"audio": {}}}',
        '{"type": "session.update", "session": {"type": "transcription", "audio": []}}',
        json.dumps({"type": "x" * 100_000}),
    ]
    with live(counting[0]) as session:
        for frame in frames:
            session.socket.send(frame)
            error = session.error()
            assert error["type"] == "invalid_request_error"
            assert 0 < len(error["message"]) < 1000
        session.send("unknown", event_id="mine")
        assert session.error()["event_id"] == "mine"
        session.send("input_audio_buffer.append", audio=audio)
        session.commit()
        assert completed(session.until(f"{TRANSCRIPTION}.completed")) == ["w0 g9600"]


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"\x81\x82\0\0\0\0\xff\xfe", 1007),  # a text that is not UTF-8
        (b"\x81\x01a", 1002),  # without a mask
        (b"\x83\x80\0\0\0\0", 1002),  # an unknown kind of frame
        (b"\x81\xff" + b"\x7f" + b"\xff" * 7 + bytes(4), 1009),  # 2**63 - 1 bytes
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 1002),
        (b"\xff" * 1000, 1002),
    ],
)
def test_bytes_that_are_not_a_frame_end_only_their_session(counting, no_errors, sent, code):
    with live(counting[0]) as other:
        with live(counting[0]) as session:
            session.socket.socket.sendall(sent)
            with pytest.raises(ConnectionClosed) as closed:
                session.receive()
            assert closed.value.rcvd.code == code
        other.update()
        other.next("session.updated")


def test_message_that_is_too_large_ends_only_its_session(counting):
    with live(counting[0]) as session:
        session.socket.send("x" * (17 << 20))
        with pytest.raises(ConnectionClosed) as closed:
            session.receive()
        assert closed.value.rcvd.code == 1009
    assert status_of(counting[0]) == 101


def test_cleared_audio_is_not_transcribed(counting):
    url, _, made = counting
    with live(url) as session:
        session.append(pcm(0.9))
        session.send("input_audio_buffer.clear")
        session.until("input_audio_buffer.cleared")
        before = len(made.waves)
        session.commit()
        assert session.error()["code"] == "input_audio_buffer_commit_empty"
        session.append(pcm(0.6))
        session.commit()
        assert completed(session.until(f"{TRANSCRIPTION}.completed")) == ["w0 g9600"]
    assert len(made.waves) == before + 1


def test_turn_detection_does_not_change_while_audio_is_buffered(counting):
    with live(counting[0]) as session:
        session.append(pcm(0.5))
        session.next("input_audio_buffer.speech_started")
        session.update(turn_detection=None)
        assert "turn_detection" in session.error()["param"]
        session.send("input_audio_buffer.clear")
        session.next("input_audio_buffer.cleared")
        session.update(turn_detection=None)
        session.next("session.updated")


def test_silence_is_committed_as_an_empty_item(counting):
    with live(counting[0]) as session:
        session.append(pcm(-0.5))
        session.commit()
        first = session.until(f"{TRANSCRIPTION}.completed")
        assert completed(first) == [""]
        session.append(pcm(-0.5))
        session.commit()
        second = session.next("input_audio_buffer.committed")
        assert second["previous_item_id"] == first[0]["item_id"]


def test_client_that_vanishes_frees_its_place_at_once(engine):  # noqa: F811
    blocked = BlockedEngine()
    with serving(blocked, engine.model.config, batch_size=1) as (url, transcriber):
        with live(url) as session:
            session.update(turn_detection=None)
            session.append(pcm(*[0.3, -2.1] * 4), size=1 << 20)
            wait_for(lambda: blocked.waves, 20)
            assert len(transcriber.queue.places) == 1
            session.socket.socket.shutdown(2)  # no closing handshake
            wait_for(lambda: not transcriber.queue.places, 20)
            assert transcriber.queue.samples == 0
        blocked.may_answer.set()
    assert len(blocked.waves) < 4  # what was queued is not decoded


def test_full_queue_rejects_a_session(engine):  # noqa: F811
    blocked = BlockedEngine()
    with (
        serving(blocked, engine.model.config, max_queued_seconds=6.0) as (url, transcriber),
        live(url),
    ):
        with pytest.raises(InvalidStatus) as rejected, live(url):
            pass
        assert rejected.value.response.status_code == 429
        assert json.loads(rejected.value.response.body)["error"]["code"] == "queue_full"
        assert len(transcriber.queue.places) == 1


@pytest.mark.slow
def test_audio_far_ahead_of_its_texts_is_rejected(engine, monkeypatch):  # noqa: F811
    monkeypatch.setattr("asrllm.serving.realtime.session.MAX_AHEAD", 5 * 16000)
    blocked = BlockedEngine()
    with serving(blocked, engine.model.config) as (url, _), live(url) as session:
        session.update(turn_detection=None)
        session.next("session.updated")
        session.append(pcm(1.2, -2.5))
        session.commit()
        session.next("input_audio_buffer.committed")
        session.append(pcm(4.5), size=1 << 20)
        assert session.error()["code"] == "buffer_full"
        blocked.may_answer.set()
        session.until(f"{TRANSCRIPTION}.completed")
        session.append(pcm(1.0))
        session.commit()
        session.until(f"{TRANSCRIPTION}.completed")


def test_buffer_without_turn_detection_is_limited(engine):  # noqa: F811
    with (
        serving(CountingEngine(), engine.model.config, max_seconds=1.0) as (url, _),
        live(url) as session,
    ):
        session.update(turn_detection=None)
        session.next("session.updated")
        session.append(pcm(1.0))
        session.append(pcm(0.1))
        assert session.error()["code"] == "audio_too_long"


def test_idle_session_is_closed(counting, monkeypatch):
    monkeypatch.setattr("asrllm.serving.realtime.session.IDLE_SECONDS", 0.2)
    with live(counting[0]) as session:
        assert session.error()["code"] == "session_idle"
        with pytest.raises(ConnectionClosed):
            session.receive()
    wait_for(lambda: not counting[1].queue.places, 20)


def test_engine_that_fails_fails_the_item_and_the_session_continues(engine):  # noqa: F811
    class Failing(CountingEngine):
        def answer(self, waves, prompts):
            if len(self.waves) == 0:
                self.waves += waves
                raise ZeroDivisionError
            return super().answer(waves, prompts)

    with serving(Failing(), engine.model.config) as (url, _), live(url) as session:
        for kind in ("failed", "completed"):
            session.append(pcm(0.6))
            session.commit()
            events = session.until(f"{TRANSCRIPTION}.{kind}")
            assert events[-1].get("error", {}).get("type", "server_error") == "server_error"


def status_of(url, query="?intent=transcription", **options):
    """Return the status of the answer to a handshake."""
    try:
        with live(url, query, **options):
            return 101
    except InvalidStatus as rejected:
        return rejected.response.status_code


def test_key_is_required_in_a_header_or_a_subprotocol(engine):  # noqa: F811
    lines = []
    options = {"api_key": "secret", "access_log": lines.append}
    with serving(CountingEngine(), engine.model.config, **options) as (url, _):
        assert status_of(url) == 401
        assert status_of(url, subprotocols=["realtime", "openai-insecure-api-key.x"]) == 401
        assert status_of(url, additional_headers={"Authorization": "Bearer secret"}) == 101
        protocols = ["realtime", "openai-insecure-api-key.secret"]
        with live(url, subprotocols=protocols) as session:
            assert session.socket.subprotocol == "realtime"
        wait_for(lambda: len(lines) == 4, 20)
        metrics = httpx.get(f"{url}/metrics").text
    assert [json.loads(line)["status"] for line in lines[:4]] == [401, 401, 101, 101]
    assert "secret" not in "".join(lines)
    assert 'asrllm_requests_total{path="/v1/realtime",status="101"} 2.0' in metrics


def test_texts_of_a_session_are_logged_if_the_option_is_set(engine):  # noqa: F811
    lines = []
    options = {"access_log": lines.append, "logs_texts": True}
    with serving(CountingEngine(), engine.model.config, **options) as (url, _):
        with live(url) as session:
            session.update(turn_detection=None)
            session.next("session.updated")
            session.append(pcm(1.0))
            session.commit()
            texts = completed(session.until(f"{TRANSCRIPTION}.completed"))
        wait_for(lambda: lines, 20)
    assert json.loads(lines[0])["answer"].splitlines() == texts


def test_web_page_of_another_origin_is_rejected(engine):  # noqa: F811
    options = {"origins": ["https://a.org"]}
    with serving(CountingEngine(), engine.model.config, **options) as (url, _):
        assert status_of(url, origin="https://b.org") == 403
        assert status_of(url, origin="https://a.org") == 101
        assert status_of(url, origin=url) == 101


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("", 101),
        ("?model=tiny", 101),
        ("?model=other", 404),
        ("?intent=conversation", 400),
        ("?x=1", 400),
    ],
)
def test_query_is_checked(counting, no_errors, query, status):
    assert status_of(counting[0], query) == status


@pytest.mark.slow
def test_speech_is_found_by_the_network(engine):  # noqa: F811
    network = Segmentation(detector=functools.partial(Silero, load_silero()), longest=160_000)
    with serving(CountingEngine(), engine.model.config, network) as (url, _), live(url) as session:
        session.append(pcm(-1.0, 1.5, -1.5, 1.0, -1.5))
        events = session.until(f"{TRANSCRIPTION}.completed")
        events += session.until(f"{TRANSCRIPTION}.completed")
        start, end = (
            of(events, f"input_audio_buffer.speech_{edge}")[0] for edge in ("started", "stopped")
        )
        assert 500 < start["audio_start_ms"] < 1300
        assert 2200 < end["audio_end_ms"] < 3000


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_sigterm_finishes_the_audio_that_was_received(model, tmp_path):  # noqa: F811
    script = REPOSITORY / "launch" / "serve.py"
    with started(tmp_path / "logs", [script, model, "--port", 0]) as (server,):
        log = tmp_path / "logs" / "0"
        wait_for(lambda: address(log) or server.poll() is not None)
        with live(address(log)) as session:
            session.append(pcm(1.5))
            session.next("input_audio_buffer.speech_started")
            server.send_signal(signal.SIGTERM)
            assert completed(session.until(f"{TRANSCRIPTION}.completed")) != [""]
            with pytest.raises(ConnectionClosed) as closed:
                session.receive()
            assert closed.value.rcvd.code == 1001
        assert server.wait(timeout=60) == 0
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_model_is_chosen_by_the_address_or_the_session(engine):  # noqa: F811
    class Loud(CountingEngine):
        def text(self, wave):
            return super().text(wave).upper()

    others = {"loud": Loud()}
    with serving(CountingEngine(), engine.model.config, others=others) as (url, _):
        for query in ("?model=loud", ""):
            with live(url, query) as session:
                session.update(turn_detection=None)
                session.append(pcm(1.0))
                session.commit()
                (first,) = completed(session.until(f"{TRANSCRIPTION}.completed"))
                session.update(transcription={"model": "loud"})
                session.append(pcm(1.0))
                session.commit()
                (second,) = completed(session.until(f"{TRANSCRIPTION}.completed"))
            assert second == first.upper()
            assert (first == second) == bool(query)
