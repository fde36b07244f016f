"""A web server and an S3 server (moto) for tests, with scripted faults and a log of requests."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from s3fs import S3FileSystem
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Response

BUCKET = "corpus"
WAIT = 30  # seconds after which a delayed response continues by itself


@dataclass
class Fault:
    """A fault of one response.

    Attributes:
        status: HTTP status that is sent instead of the file.
        sent: fraction of the body after which the connection ends.
        honest: whether Content-Length is that of the shortened body.
        flip: whether the first byte is damaged.
        gate: the response waits for it after half of the body.
        reached: set when the response waits.
    """

    status: int | None = None
    sent: float = 1.0
    honest: bool = False
    flip: bool = False
    gate: threading.Event | None = None
    reached: threading.Event = field(default_factory=threading.Event)

    def body(self, data: bytes) -> bytes:
        data = data[: int(len(data) * self.sent)]
        return bytes([data[0] ^ 1]) + data[1:] if self.flip else data

    def parts(self, data: bytes) -> Iterator[bytes]:
        half = len(data) // 2 if self.gate else 0
        yield data[:half]
        if self.gate:
            self.reached.set()
            self.gate.wait(WAIT)
        yield data[half:]


@dataclass
class Faults:
    """Faults of future requests, and a log of past ones.

    Attributes:
        ordered: one fault per request, by method and path.
        gets: the requested byte ranges, by path.
    """

    ordered: dict[tuple[str, str], Iterator[Fault]] = field(default_factory=dict)
    gets: dict[str, list[str | None]] = field(default_factory=lambda: defaultdict(list))

    def order(self, path: str, faults: Iterable[Fault], method: str = "GET") -> None:
        self.ordered[method, path] = iter(faults)

    def next(self, method: str, path: str, byte_range: str | None) -> Fault:
        if method == "GET":
            self.gets[path].append(byte_range)
        return next(self.ordered.get((method, path), iter(())), Fault())


class WebServer:
    """A server of `files` at http://127.0.0.1:PORT/PATH, with ranges and ETags."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults = Faults()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        _serve(self.server.serve_forever)

    def put(self, path: str, data: bytes) -> str:
        self.files[path] = data
        return self.url + path

    def gets(self, path: str) -> int:
        return len(self.faults.gets[path])


def _handler(web: WebServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            path, byte_range = self.path.partition("?")[0], self.headers.get("Range")
            fault = web.faults.next(self.command, path, byte_range)
            data = web.files.get(path)
            status = fault.status or (404 if data is None else 200)
            if status != 200 or data is None:
                self.start(status, 0, None)
                return
            tag, start = f'"{hash(data)}"', 0
            if byte_range and self.headers.get("If-Range") in (None, tag):
                start = int(byte_range.removeprefix("bytes=").partition("-")[0])
            rest = data[start:]
            body = fault.body(rest)
            self.start(206 if start else 200, len(body if fault.honest else rest), tag)
            if with_body:
                self.wfile.writelines(fault.parts(body))
            self.close_connection = self.close_connection or fault.sent < 1

        def start(self, status: int, length: int, tag: str | None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            if tag:
                self.send_header("ETag", tag)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    return Handler


class S3Server:
    """A server of s3://corpus/KEY. Clients reach it through AWS_ENDPOINT_URL."""

    def __init__(self) -> None:
        self.faults = Faults()
        self.server = make_server(
            "127.0.0.1", 0, self.answer, threaded=True, request_handler=_Quiet
        )
        self.moto = DomainDispatcherApplication(create_backend_app)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        _serve(self.server.serve_forever)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of clients. botocore makes one attempt for each one of s3fs."""
        keys = {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_MAX_ATTEMPTS": "1",
            "AWS_EC2_METADATA_DISABLED": "true",
        } | keys

    def put(self, path: str, data: bytes) -> str:
        """Store an object, and return its URL. The path begins with a slash."""
        client = boto3.client("s3", endpoint_url=self.endpoint)
        client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key=path.lstrip("/"), Body=data)
        return f"s3://{BUCKET}{path}"

    def gets(self, path: str) -> int:
        return len(self.faults.gets[path])

    def answer(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        path = environ["PATH_INFO"].removeprefix(f"/{BUCKET}")
        fault = self.faults.next(environ["REQUEST_METHOD"], path, environ.get("HTTP_RANGE"))
        if fault.status is not None:
            return Response(b"", fault.status)(environ, start_response)
        response = Response.from_app(self.moto, environ, buffered=True)
        if environ["REQUEST_METHOD"] == "GET" and response.status_code in (200, 206):
            body = fault.body(response.get_data())
            response.response = fault.parts(body)
            if fault.honest:
                response.headers["Content-Length"] = str(len(body))
        return response(environ, start_response)


class _Quiet(WSGIRequestHandler):
    def log(self, *arguments: Any) -> None:
        pass


def _serve(forever: Callable[[], None]) -> None:
    threading.Thread(target=forever, daemon=True).start()


@contextmanager
def web_server() -> Iterator[WebServer]:
    web = WebServer()
    yield web
    web.server.shutdown()
    web.server.server_close()


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run an S3 server for this process and its children, without cached clients of other ones."""
    s3 = S3Server()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in s3.environment.items():
            patch.setenv(key, value)
        S3FileSystem.clear_instance_cache()
        yield s3
        S3FileSystem.clear_instance_cache()
    s3.server.shutdown()
    s3.server.server_close()
