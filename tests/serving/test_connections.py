"""Connections that send too little, and more of them than the server allows."""

import contextlib
import resource
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from asrllm.serving.connections import MAX_CONNECTIONS, connections_by_open_files
from tests.conftest import REPOSITORY
from tests.processes import started, wait_for
from tests.serving.test_api import BlockedEngine, audio, engine, running, send  # noqa: F401
from tests.serving.test_realtime import live
from tests.serving.test_server import address, model  # noqa: F401

COMPLETE = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
LIMIT = 0.6  # seconds
# an answer comes at once, and the server reads on for as long as the body has
UNWANTED = b"POST /v1/nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"


def opened(url):
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=20)


def received(connection):
    """Return everything up to the end of a connection."""
    content = b""
    while part := connection.recv(1 << 16):
        content += part
    return content.decode()


def trickled(connection):
    """Send a byte at a time until the server closes the connection, and return what it sent."""
    content = b""
    deadline = time.monotonic() + 15
    connection.settimeout(LIMIT / 10)
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                part = connection.recv(1 << 16)
                if not part:
                    break
                content += part
            connection.sendall(b"a")
    assert time.monotonic() < deadline
    return content.decode()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "answers"),
    [
        (b"G", [408]),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: ", [408]),
        (COMPLETE + b"G", [200, 408]),
        (COMPLETE + COMPLETE[:-2], [200, 408]),
        (UNWANTED, [404]),
    ],
    ids=["request line", "headers", "second request", "second headers", "unwanted body"],
)
def test_client_that_sends_slowly_is_answered_and_closed(engine, sent, answers):  # noqa: F811
    limits = {"header_seconds": LIMIT, "upload_seconds": LIMIT}
    with running(BlockedEngine(), engine.model.config, **limits) as (url, _):
        files = psutil.Process().num_fds()
        with opened(url) as connection, ThreadPoolExecutor(1) as threads:
            connection.sendall(sent)
            slow = threads.submit(trickled, connection)
            assert httpx.get(f"{url}/health").status_code == 200
            content = slow.result()
        statuses = [int(part[:3]) for part in content.split("HTTP/1.1 ")[1:]]
        assert statuses == answers
        if 408 in answers:
            assert '"code": "request_too_slow"' in content
            assert 'path="other",status="408"} 1.0' in httpx.get(f"{url}/metrics").text
        wait_for(lambda: psutil.Process().num_fds() == files, 20)


@pytest.mark.slow
def test_silent_connections_are_closed_and_nothing_else(engine):  # noqa: F811
    """Requests in progress and live sessions last longer than the headers may take."""
    blocked = BlockedEngine()
    with (
        running(blocked, engine.model.config, header_seconds=LIMIT) as (url, _),
        ThreadPoolExecutor(1) as threads,
        live(url) as session,
    ):
        request = threads.submit(send, url)
        wait_for(lambda: blocked.waves, 20)
        with opened(url) as silent:
            assert " 408 " in received(silent).splitlines()[0]
        session.update()
        session.next("session.updated")
        assert not request.done()
        blocked.may_answer.set()
        assert request.result(20).status_code == 200


@pytest.mark.slow
def test_connections_above_the_limit_are_rejected(engine):  # noqa: F811
    with running(BlockedEngine(), engine.model.config, max_connections=3) as (url, _):
        with live(url) as session, opened(url) as first, opened(url) as second:
            second.sendall(COMPLETE)
            assert b" 200 " in second.recv(4096)
            for _ in range(3):
                with opened(url) as rejected:
                    head, body = received(rejected).split("\r\n\r\n")
                assert " 503 " in head.splitlines()[0]
                assert "too_many_connections" in body
            for _ in range(20):  # the answer arrives although nobody reads the request
                with opened(url) as rejected:
                    rejected.sendall(COMPLETE)
                    assert " 503 " in received(rejected).splitlines()[0]
            session.update()
            session.next("session.updated")
            first.sendall(COMPLETE)
            assert b" 200 " in first.recv(4096)
        metrics = wait_for_answer(f"{url}/metrics").text
        assert 'path="other",status="503"}' in metrics


def wait_for_answer(url):
    """Return the first answer that is not an error."""
    answers = []

    def is_answered():
        with contextlib.suppress(httpx.TransportError):  # rejected before the request was read
            answers.append(httpx.get(url))
        return answers and answers[-1].status_code == 200

    wait_for(is_answered, 20)
    return answers[-1]


@pytest.mark.parametrize(
    ("files", "connections"),
    [
        (256, 64),
        (1024, 256),
        (1 << 20, MAX_CONNECTIONS),
        (resource.RLIM_INFINITY, MAX_CONNECTIONS),
    ],
)
def test_number_of_connections_follows_the_limit_on_open_files(monkeypatch, files, connections):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert connections_by_open_files() == connections


@pytest.mark.slow
def test_flood_of_connections_leaves_descriptors_for_requests(model, tmp_path):  # noqa: F811
    files = 200
    script = tmp_path / "limited.py"
    script.write_text(
        "import resource, runpy\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))\n"
        f"runpy.run_path({str(REPOSITORY / 'launch' / 'serve.py')!r}, run_name='__main__')\n"
    )
    command = [script, model, "--port", 0, "--max-new-tokens", 4]
    with started(tmp_path / "logs", command) as (server,), contextlib.ExitStack() as stack:
        log = tmp_path / "logs" / "0"
        wait_for(lambda: address(log) or server.poll() is not None)
        url = address(log)
        assert url, log.read_text()
        assert httpx.get(f"{url}/health").status_code == 200
        before = psutil.Process(server.pid).num_fds()
        connections = [stack.enter_context(opened(url)) for _ in range(files + 50)]
        # the last one was accepted after the others
        assert " 503 " in received(connections[-1])
        assert psutil.Process(server.pid).num_fds() <= before + files // 4 + files // 16
        connections[0].close()  # one place is free
        assert wait_for_answer(f"{url}/health").json() == {"status": "ok"}
        stack.close()
        wait_for(lambda: psutil.Process(server.pid).num_fds() <= before, 20)
        assert send(url, audio(1)).status_code == 200
        assert "out of system resource" not in log.read_text()
