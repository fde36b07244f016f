"""Requests that no client should send: they get an error object, and leave nothing behind."""

import tempfile
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.processes import wait_for
from tests.serving.test_api import BlockedEngine, audio, engine, running  # noqa: F401
from tests.serving.test_connections import opened, received

PATH = "/v1/audio/transcriptions"


def part(disposition, content):
    return (
        b"--x\r\nContent-Disposition: form-data; " + disposition + b"\r\n\r\n" + content + b"\r\n"
    )


FILE = part(b'name="file"; filename="a.wav"', audio(0.5))
MODEL = part(b'name="model"', b"tiny")
END = b"--x--\r\n"


@pytest.fixture(scope="module")
def answering(engine):  # noqa: F811
    """Yield an engine that answers at once, and its server's address."""
    made = BlockedEngine()
    made.may_answer.set()
    with running(made, engine.model.config) as (url, _):
        yield made, url


@pytest.fixture
def leftovers(tmp_path, monkeypatch):
    """Fail if a test leaves a temporary file or an open one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = psutil.Process().num_fds()
    yield
    wait_for(lambda: psutil.Process().num_fds() <= before, 20)
    assert not list(tmp_path.iterdir())


def post(url, body, kind="multipart/form-data; boundary=x"):
    return httpx.post(url + PATH, content=body, headers={"Content-Type": kind}, timeout=60)


BODIES = {
    "model": FILE + part(b'name="model"', b"\xff") + END,
    "language": FILE + MODEL + part(b'name="language"', b"\xff\xfe") + END,
    "format": FILE + MODEL + part(b'name="response_format"', b"\xff") + END,
    "name of a field": FILE + MODEL + part(b'name="\xff"', b"1") + END,
    "name of a file": MODEL + part(b'name="file"; filename="\xff.wav"', b"no audio") + END,
    "many fields": FILE + MODEL + part(b'name="a"', b"") * 1001 + END,
    "many files": MODEL + part(b'name="file"; filename="a"', b"") * 1001 + END,
    "large field": FILE + part(b'name="model"', b"x" * 900_000) + END,
    "long name of a field": FILE + MODEL + part(b'name="' + b"a" * 4000 + b'"', b"1") + END,
    "large header": FILE + MODEL + part(b'name="' + b"a" * 100_000 + b'"', b"") + END,
    "without end": FILE + MODEL,
    "without name": FILE + MODEL + part(b"", b"1") + END,
    "other boundary": (FILE + MODEL + END).replace(b"--x", b"--y"),
    "file as a field": part(b'name="file"', audio(0.5)) + MODEL + END,
    "model as a file": FILE + part(b'name="model"; filename="tiny"', b"tiny") + END,
    "empty": b"",
    "noise": bytes(range(256)) * 100,
}


@pytest.mark.parametrize("name", BODIES)
def test_malformed_form_is_an_error_object(answering, leftovers, name):
    answer = post(answering[1], BODIES[name])
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["message"]
    assert len(answer.text) < 2000  # a long value is not repeated


def test_path_instead_of_a_file_is_rejected_with_the_fix(answering, leftovers):
    answer = post(answering[1], part(b'name="file"', b"a.wav") + MODEL + END)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "file"
    assert "a.wav" in error["message"]
    assert "-F file=@" in error["message"]


@pytest.mark.parametrize("kind", ["", "; charset=latin-1"])
@pytest.mark.parametrize("text", [b"na\xefve", "naïve".encode("utf-16"), b"\xed\xa0\x80"])
def test_text_that_is_not_utf8_is_rejected(answering, leftovers, text, kind):
    made, url = answering
    before = len(made.prompts)
    body = FILE + MODEL + part(b'name="prompt"', text) + END
    answer = post(url, body, f"multipart/form-data; boundary=x{kind}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"
    assert len(made.prompts) == before


@pytest.mark.parametrize("kind", ["", "; charset=latin-1", "; charset=none"])
def test_utf8_text_is_read(answering, leftovers, kind):
    made, url = answering
    body = FILE + MODEL + part(b'name="prompt"', "naïve 你好".encode()) + END
    assert post(url, body, f"multipart/form-data; boundary=x{kind}").status_code == 200
    assert made.prompts[-1] == "naïve 你好"


@pytest.mark.parametrize("kind", ["", "multipart/form-data", "application/json", "\xff", "text/x"])
def test_body_that_is_not_a_form_is_an_error_object(answering, leftovers, kind):
    answer = post(answering[1], FILE + MODEL + END, kind.encode("latin-1"))
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "name",
    [
        b"../../../etc/passwd",
        b"/etc/passwd",
        b"..\\\\..\\\\a.wav",
        b"file:///etc/passwd",
        b"http://127.0.0.1:1/a.wav",
        b"|true",
        b"-",
        b"a%00.wav",
        b"a\0.wav",
        b"a" * 1500,
        b"a.tar",
        b"\xff\xfe.wav",
    ],
)
def test_name_of_a_file_has_no_effect(answering, leftovers, name):
    made, url = answering
    before = len(made.waves)
    assert post(url, FILE + MODEL + END).status_code == 200
    body = part(b'name="file"; filename="' + name + b'"', audio(0.5)) + MODEL + END
    answer = post(url, body)
    assert answer.status_code == 200
    plain, other = made.waves[before:]
    assert (plain == other).all()


@pytest.mark.slow
def test_ten_thousand_small_requests_are_answered(answering, leftovers):
    count = 10_000
    request = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    last = request.replace("Host", "Connection: close\r\nHost")
    _, url = answering
    with opened(url) as connection, ThreadPoolExecutor(1) as threads:
        sent = threads.submit(connection.sendall, (request * (count - 1) + last).encode())
        answers = received(connection)
        sent.result()
    assert answers.count("HTTP/1.1 400 ") == answers.count("HTTP/1.1 ") == count
    assert httpx.get(f"{url}/health").status_code == 200
