import hashlib
import itertools
import logging
import os
import pickle
import subprocess
import sys
import threading
from contextlib import contextmanager

import fsspec
import pytest

from asrllm.data import cache as cache_module
from asrllm.data import storage
from asrllm.data.cache import ShardCache
from asrllm.data.storage import RemoteFile, is_url, join_url, read_bytes, remote_sizes
from asrllm.errors import UserError
from tests.conftest import REPOSITORY, clean_environment, free_port
from tests.data.object_store import Fault, S3Server, WebServer, s3_server, web_server
from tests.processes import wait_for

LIMIT = 20  # seconds for anything that could hang
numbers = itertools.count()


@pytest.fixture(scope="module")
def web():
    with web_server() as server:
        yield server


@pytest.fixture(scope="module")
def s3():
    with s3_server() as server:
        yield server


@pytest.fixture(params=["http", "s3"])
def server(request, web, s3) -> WebServer | S3Server:
    return web if request.param == "http" else s3


@pytest.fixture
def cache(tmp_path):
    made = make_cache(tmp_path)
    yield made
    made.close()


def make_cache(tmp_path, max_bytes=10**7, attempts=4, delay=0.001):
    return ShardCache(tmp_path / "cache", max_bytes=max_bytes, attempts=attempts, delay=delay)


def put(server, size=30_000, name="shard"):
    """Store a new file, and return (path, content, RemoteFile with size and checksum)."""
    path, data = f"/train/{name}-{next(numbers)}.tar", os.urandom(size)
    url = server.put(path, data)
    return path, data, RemoteFile(url=url, size=size, sha256=hashlib.sha256(data).hexdigest())


def cached(tmp_path):
    return sorted(path.name.partition("-")[2] for path in (tmp_path / "cache").glob("*-*"))


def leftovers(tmp_path):
    return list((tmp_path / "cache" / ".partial").iterdir())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://b/x", True),
        ("https://h/x", True),
        ("file:///x", True),
        ("/x/y", False),
        ("x.tar", False),
        ("d/s3://x", False),
    ],
)
def test_urls_are_distinguished_from_paths(text, expected):
    assert is_url(text) is expected


@pytest.mark.parametrize(
    ("base", "name", "expected"),
    [
        ("s3://b/dir", "x.tar", "s3://b/dir/x.tar"),
        ("s3://b/dir/", "./sub/x.tar", "s3://b/dir/sub/x.tar"),
        ("s3://b", "x.tar", "s3://b/x.tar"),
        ("s3://b/dir", "a b#1.tar", "s3://b/dir/a b#1.tar"),
        ("https://h/dir", "a b#1.tar", "https://h/dir/a%20b%231.tar"),
        ("https://h/dir?token=1/2", "x.tar", "https://h/dir/x.tar?token=1/2"),
        ("file:///data", "x.tar", "file:///data/x.tar"),
    ],
)
def test_join_url_quotes_http_names_and_preserves_queries(base, name, expected):
    assert join_url(base, name) == expected


@pytest.mark.slow
def test_a_file_is_downloaded_once_and_marked_as_used(server, cache):
    path, data, file = put(server)
    local = cache.fetch(file)
    assert local.read_bytes() == data
    assert local.name.endswith(path.rpartition("/")[2])
    os.utime(local, ns=(0, 0))
    assert cache.fetch(file) == local
    assert local.stat().st_mtime_ns > 0
    assert server.gets(path) == 1


@pytest.mark.slow
def test_size_and_checksum_of_a_file_are_optional(server, cache):
    _, data, file = put(server)
    assert cache.fetch(RemoteFile(url=file.url)).read_bytes() == data


def test_an_empty_local_file_is_fetched(cache, tmp_path):
    (tmp_path / "b.tar").touch()
    assert cache.fetch(RemoteFile(url=f"file://{tmp_path}/b.tar", size=0)).read_bytes() == b""


def test_files_of_the_same_name_do_not_collide_and_changed_files_are_fetched_again(web, cache):
    one, other = (
        RemoteFile(url=web.put(f"/{folder}/x.tar", folder.encode())) for folder in ("one", "other")
    )
    assert [cache.fetch(file).read_bytes() for file in (one, other, one)] == [
        b"one",
        b"other",
        b"one",
    ]
    web.put("/one/x.tar", b"longer")
    assert cache.fetch(RemoteFile(url=one.url, size=6)).read_bytes() == b"longer"
    web.put("/one/x.tar", b"LONGER")
    assert (
        cache.fetch(
            RemoteFile(url=one.url, sha256=hashlib.sha256(b"LONGER").hexdigest())
        ).read_bytes()
        == b"LONGER"
    )


@pytest.mark.slow
def test_read_bytes_and_remote_sizes(server):
    _, data, file = put(server)
    _, _, other = put(server, size=7)
    assert read_bytes(file.url) == data
    assert remote_sizes([file.url, file.url + ".not", other.url]) == [len(data), None, 7]
    assert remote_sizes([]) == []
    with pytest.raises(UserError, match=f"{file.url}.not "):
        read_bytes(file.url + ".not")


def test_read_bytes_is_bounded_and_repeated(web, monkeypatch):
    monkeypatch.setattr(storage, "DELAY", 0.001)
    path, data, file = put(web)
    web.faults.order(path, [Fault(sent=0.5), Fault(status=503)], "GET")
    assert read_bytes(file.url) == data
    monkeypatch.setattr(storage, "MAX_IN_MEMORY", len(data))
    assert read_bytes(file.url) == data
    monkeypatch.setattr(storage, "MAX_IN_MEMORY", len(data) - 1)
    with pytest.raises(UserError, match=file.url):
        read_bytes(file.url)


@pytest.mark.slow
def test_remote_sizes_are_retried(web, monkeypatch):
    monkeypatch.setattr(storage, "DELAY", 0.001)
    path, data, file = put(web)
    for method in ("HEAD", "GET"):  # fsspec's http uses both
        web.faults.order(path, [Fault(status=503)] * 2, method)
    assert remote_sizes([file.url]) == [len(data)]
    for status, message in ((503, f"{file.url} .* 6 .*503"), (403, f"{file.url} .*403")):
        for method in ("HEAD", "GET"):
            web.faults.order(path, itertools.repeat(Fault(status=status)), method)
        with pytest.raises(UserError, match=message):
            remote_sizes([file.url] * 50)


FAULTS = {
    "dropped": Fault(sent=0.5),
    "truncated": Fault(sent=0.5, honest=True),
    "empty": Fault(sent=0, honest=True),
    "damaged": Fault(flip=True),
    "unavailable": Fault(status=503),
    "error": Fault(status=500),
    "too many": Fault(status=429),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_transient_faults_are_retried(server, cache, tmp_path, name):
    path, data, file = put(server)
    server.faults.order(path, [FAULTS[name]] * 3)
    assert cache.fetch(file).read_bytes() == data
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("truncated", "30000 bytes.*15000 bytes"),
        ("damaged", r"sha256 \w{64}.*30000 bytes.*\w{64}"),
        ("unavailable", "503"),
        ("dropped", "ClientPayloadError"),
    ],
)
def test_persistent_faults_are_reported(web, cache, tmp_path, name, message):
    path, _, file = put(web)
    web.faults.order(path, itertools.repeat(FAULTS[name]))
    with pytest.raises(UserError, match=f"(?s){file.url} .* 4 .*{message}"):
        cache.fetch(file)
    assert web.gets(path) == 4
    assert leftovers(tmp_path) == [] == cached(tmp_path)
    web.faults.order(path, [])
    cache.fetch(file)


@pytest.mark.slow
def test_persistent_s3_faults_are_reported(s3, cache, tmp_path):
    path, _, file = put(s3)
    s3.faults.order(path, itertools.repeat(Fault(status=503)))
    with pytest.raises(UserError, match=f"{file.url} .* 4 .*Service Unavailable"):
        cache.fetch(file)
    assert leftovers(tmp_path) == [] == cached(tmp_path)


def test_a_body_that_is_too_long_is_rejected(web, cache):
    path, _, file = put(web)
    with pytest.raises(UserError, match=f"{file.url} .*29000 bytes"):
        cache.fetch(RemoteFile(url=file.url, size=29_000))
    assert web.gets(path) == 4


def test_an_unreachable_server_is_reported(cache):
    url = f"http://127.0.0.1:{free_port()}/x.tar"
    with pytest.raises(UserError, match=f"{url} .* 4 .*ClientConnectorError"):
        cache.fetch(RemoteFile(url=url))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "exist"),
        (403, "FSSPEC_HTTP|AWS_PROFILE"),
        (401, "FSSPEC_HTTP|AWS_PROFILE"),
        (400, "400|Bad Request"),
    ],
)
def test_permanent_errors_are_not_retried(server, cache, status, message):
    path, _, file = put(server)
    for method in ("HEAD", "GET"):
        server.faults.order(path, itertools.repeat(Fault(status=status)), method)
    with pytest.raises(UserError, match=f"{file.url} .*({message})"):
        cache.fetch(file)
    assert server.gets(path) <= 1


@pytest.mark.slow
def test_a_missing_bucket_and_missing_credentials_are_reported(s3, cache, monkeypatch):
    with pytest.raises(UserError, match=r"s3://nowhere/x\.tar "):
        cache.fetch(RemoteFile(url="s3://nowhere/x.tar"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    type(fsspec.filesystem("s3")).clear_instance_cache()
    with pytest.raises(UserError, match=r"s3://corpus/x\.tar .*NoCredentialsError.*AWS_PROFILE"):
        cache.fetch(RemoteFile(url="s3://corpus/x.tar"))
    type(fsspec.filesystem("s3")).clear_instance_cache()


def test_messages_and_file_names_contain_no_secrets(web, cache):
    url = web.url.replace("http://", "http://user:pass@") + "/secret/x.tar?token=abc"
    with pytest.raises(UserError, match=r"/secret/x\.tar ") as error:
        cache.fetch(RemoteFile(url=url))
    assert "abc" not in str(error.value)
    assert "pass" not in str(error.value)
    web.put("/secret/x.tar", b"x")
    assert cache.fetch(RemoteFile(url=url)).name.endswith("-x.tar")


@pytest.mark.parametrize(
    "url",
    [
        "nope://x/y.tar",
        "memory://x/y.tar",
        "zip://y.tar::s3://b/x.zip",
        "simplecache::s3://b/x.tar",
    ],
)
def test_unsupported_schemes_are_rejected(cache, url):
    with pytest.raises(UserError, match=r"s3://"):
        cache.fetch(RemoteFile(url=url))


def test_a_missing_driver_is_reported():
    script = """
        packages = {"s3://b/x": "s3fs", "gs://b/x": "gcsfs", "https://h/x": "aiohttp"}
        for url, package in packages.items():
            sys.modules[package] = None  # simulates that it is not installed
            try:
                storage.read_bytes(url)
            except UserError as error:
                print(error)
    """
    lines = run(script).splitlines()
    for line, url, extra in zip(
        lines, ("s3://b/x", "gs://b/x", "https://h/x"), ("s3", "gcs", "http"), strict=True
    ):
        assert line.startswith(f"{url} ")
        assert line.endswith(f"pip install 'asrllm[{extra}]'")


def test_a_dropped_http_download_resumes(web, cache):
    path, data, file = put(web, size=2_000_000)
    web.faults.order(path, [Fault(sent=0.5)])
    assert cache.fetch(file).read_bytes() == data
    first, second = web.faults.gets[path]
    assert first is None
    assert second.startswith("bytes=")  # starts at the last byte that aiohttp passed on


def test_a_dropped_s3_download_resumes(s3, cache, monkeypatch):
    monkeypatch.setattr(storage, "CHUNK", 10_000)
    monkeypatch.setattr(cache_module, "CHUNK", 10_000)
    path, data, file = put(s3)
    s3.faults.order(path, [Fault(), Fault(status=503)])
    assert cache.fetch(file).read_bytes() == data
    assert s3.faults.gets[path] == [
        "bytes=0-9999",
        "bytes=10000-19999",
        "bytes=10000-19999",
        "bytes=20000-29999",
    ]


@pytest.mark.parametrize("size", [30_000, None])
def test_two_versions_of_a_file_are_never_mixed(server, cache, monkeypatch, size):
    monkeypatch.setattr(storage, "CHUNK", 10_000)
    monkeypatch.setattr(cache_module, "CHUNK", 10_000)
    path, data, file = put(server)
    new = bytes(reversed(data))

    def faults():
        yield Fault(sent=0.5) if isinstance(server, WebServer) else Fault()
        server.put(path, new)
        while True:
            yield Fault()

    server.faults.order(path, faults())
    assert cache.fetch(RemoteFile(url=file.url, size=size)).read_bytes() == new


@pytest.mark.slow
def test_concurrent_processes_download_a_file_once(server, tmp_path):
    path, _, file = put(server)
    gate = threading.Event()
    fault = Fault(gate=gate)
    server.faults.order(path, [fault])
    script = """
        cache = ShardCache(Path(sys.argv[1]), max_bytes=10**7)
        print("started", flush=True)
        print(hashlib.sha256(cache.fetch(RemoteFile(url=sys.argv[2])).read_bytes()).hexdigest())
    """
    with (
        started(script, tmp_path / "cache", file.url) as one,
        started(script, tmp_path / "cache", file.url) as other,
    ):
        assert fault.reached.wait(LIMIT)
        for process in (one, other):
            assert process.stdout.readline() == "started\n"
        gate.set()
        for process in (one, other):
            assert process.communicate(timeout=LIMIT)[0].split() == [file.sha256]
    assert server.gets(path) == 1


@pytest.mark.slow
def test_a_killed_download_is_not_mistaken_for_a_complete_file(web, tmp_path):
    path, data, file = put(web)
    other_path, other_data, other = put(web)
    gate = threading.Event()
    faults = [Fault(gate=gate), Fault(gate=gate)]
    web.faults.order(path, faults[:1])
    web.faults.order(other_path, faults[1:])
    script = "ShardCache(Path(sys.argv[1]), max_bytes=10**7).fetch(RemoteFile(url=sys.argv[2]))"
    folder = tmp_path / "cache"
    # Both run until both are killed: a living one would remove the files of the dead one.
    with started(script, folder, file.url) as one, started(script, folder, other.url) as two:
        for fault in faults:
            assert fault.reached.wait(LIMIT)
        wait_for(
            lambda: (
                sorted(path.stat().st_size for path in leftovers(tmp_path))
                == [len(data), len(other_data)]
            ),
            LIMIT,
        )
        for process in (one, two):
            process.kill()
            process.wait(LIMIT)
    gate.set()
    assert len(leftovers(tmp_path)) == 2
    cache = make_cache(tmp_path)
    assert cached(tmp_path) == []
    assert cache.fetch(RemoteFile(url=file.url)).read_bytes() == data
    assert leftovers(tmp_path) == []  # including that of the other file
    assert cache.fetch(other).read_bytes() == other_data


def test_the_least_recently_used_files_are_evicted(web, tmp_path):
    cache = make_cache(tmp_path, max_bytes=3500)
    files = [put(web, size=1000, name="abcde"[i])[2] for i in range(5)]
    foreign = tmp_path / "cache" / "my-notes.txt"
    foreign.parent.mkdir()
    foreign.write_text("x" * 5000)
    for i, file in enumerate(files[:3]):
        os.utime(cache.fetch(file), ns=(i, i))
    assert len(cached(tmp_path)) == 3 + 1
    os.utime(cache.fetch(files[0]), ns=(9, 9))
    with open(cache.folder / files[1].local_name, "rb") as being_read:
        cache.fetch(files[3])
        assert not (cache.folder / files[1].local_name).exists()
        assert len(being_read.read()) == 1000
    assert sorted(path.name for path in cache.folder.glob("*.tar")) == sorted(
        files[i].local_name for i in (0, 2, 3)
    )
    assert foreign.exists()


def test_a_file_larger_than_the_cache_is_reported(server, tmp_path):
    cache = make_cache(tmp_path, max_bytes=20_000)
    _, _, file = put(server)
    for known in (file, RemoteFile(url=file.url)):
        with pytest.raises(UserError, match=f"{file.url} has .*data.cache.max_gb"):
            cache.fetch(known)
    assert leftovers(tmp_path) == [] == cached(tmp_path)


def test_downloads_in_progress_count_against_the_limit(web, tmp_path, caplog):
    cache = make_cache(tmp_path, max_bytes=50_000)
    path, _, slow = put(web)
    _, _, small = put(web, size=20_000)
    _, data, other = put(web)
    gate, waits = threading.Event(), threading.Event()
    fault = Fault(gate=gate)
    web.faults.order(path, [fault])
    first = Background(lambda: cache.fetch(slow))
    assert fault.reached.wait(LIMIT)
    cache.fetch(small)  # 30 000 + 20 000 bytes fill the cache
    with log_event("is full of downloads", waits):
        second = Background(lambda: cache.fetch(other).read_bytes())
        assert waits.wait(LIMIT)
    assert len(cached(tmp_path)) == 1  # nothing is evicted if that does not make enough room
    gate.set()
    first.join(LIMIT)
    second.join(LIMIT)
    assert second.result == data
    assert sum(path.stat().st_size for path in cache.folder.glob("*.tar")) <= 50_000


def test_prefetched_files_need_no_second_request(server, cache):
    files = [put(server) for _ in range(5)]
    cache.prefetch([file for _, _, file in files])
    for _, data, file in reversed(files):
        assert cache.fetch(file).read_bytes() == data
    cache.close()
    assert [server.gets(path) for path, _, _ in files] == [1] * 5


def test_a_new_prefetch_replaces_the_queue_and_failures_are_logged(web, cache, monkeypatch):
    monkeypatch.setattr(cache_module, "PREFETCH_THREADS", 1)
    (slow_path, _, slow), (dropped_path, _, dropped), (path, _, file) = (put(web) for _ in range(3))
    gate, failed = threading.Event(), threading.Event()
    fault = Fault(gate=gate)
    web.faults.order(slow_path, [fault])
    cache.prefetch([slow, dropped])
    assert fault.reached.wait(LIMIT)
    missing = RemoteFile(url=f"{web.url}/missing.tar")
    with log_event("missing.tar", failed):
        cache.prefetch([file, missing])
        gate.set()
        assert failed.wait(LIMIT)
    cache.close()
    assert [web.gets(p) for p in (slow_path, dropped_path, path)] == [1, 0, 1]
    with pytest.raises(UserError, match=missing.url):
        cache.fetch(missing)
    cache.prefetch([RemoteFile(url="nope://x")])


def test_close_ends_retries(web, tmp_path):
    cache = make_cache(tmp_path, delay=1000)
    path, _, file = put(web)
    web.faults.order(path, itertools.repeat(Fault(status=503)))
    retries = threading.Event()
    with log_event("attempt 1 of 4 failed", retries):
        cache.prefetch([file])
        assert retries.wait(LIMIT)
    prefetcher = cache._prefetcher
    cache.close()
    assert not any(thread.is_alive() for thread in prefetcher.threads)
    assert leftovers(tmp_path) == []


def test_a_cache_can_be_pickled(web, cache):
    _, data, file = put(web)
    cache.prefetch([file])
    assert pickle.loads(pickle.dumps(cache)).fetch(file).read_bytes() == data


@pytest.mark.slow
def test_a_forked_process_fetches_while_its_parent_prefetches(web, s3, tmp_path):
    """The child has its own connections, and waits for the parent's download."""
    slow_path, _, slow = put(web)
    gate = threading.Event()
    fault = Fault(gate=gate)
    web.faults.order(slow_path, [fault])
    files = [put(server) for server in (web, s3) * 3]
    script = """
        import signal, traceback
        cache = ShardCache(Path(sys.argv[1]), max_bytes=10**7)
        slow, *urls = sys.argv[2:]
        before, child, parent = (urls[i:i + 2] for i in (0, 2, 4))
        def fetch(urls):
            for url in urls:
                cache.fetch(RemoteFile(url=url))
        fetch(before)
        cache.prefetch([RemoteFile(url=slow)])
        sys.stdin.readline()  # the download is waiting now
        pid = os.fork()
        if pid == 0:
            signal.alarm(15)
            try:
                fetch(child)
                print("child", flush=True)
                fetch([slow])
                cache.prefetch([RemoteFile(url=url) for url in urls])
                fetch(urls)
                cache.close()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        fetch(parent)
        print("parent", flush=True)
        assert os.waitpid(pid, 0)[1] == 0
        fetch([slow])
        print("done", flush=True)
    """
    with started(
        script, tmp_path / "cache", slow.url, *(file.url for _, _, file in files)
    ) as process:
        assert fault.reached.wait(LIMIT)
        process.stdin.write("\n")
        process.stdin.flush()
        assert {process.stdout.readline(), process.stdout.readline()} == {"child\n", "parent\n"}
        gate.set()
        assert process.communicate(timeout=LIMIT)[0] == "done\n"
        assert process.returncode == 0
    assert web.gets(slow_path) == 1
    assert [
        server.gets(path) for server, (path, _, _) in zip((web, s3) * 3, files, strict=True)
    ] == [1] * 6


@pytest.mark.slow
def test_a_fork_leaves_the_parents_connections_open(web, tmp_path):
    files = [put(web) for _ in range(3)]
    script = """
        cache = ShardCache(Path(sys.argv[1]), max_bytes=10**7, attempts=1)
        before, child, after = (RemoteFile(url=url) for url in sys.argv[2:])
        cache.fetch(before)  # leaves a reusable connection
        pid = os.fork()
        if pid == 0:
            cache.fetch(child)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        cache.fetch(after)
    """
    run(script, tmp_path / "cache", *(file.url for _, _, file in files))
    assert [web.gets(path) for path, _, _ in files] == [1] * 3


@pytest.mark.slow
def test_an_unwritable_cache_is_reported(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=f"'{tmp_path}/cache' .*data.cache.dir"):
        make_cache(tmp_path).fetch(RemoteFile(url="file:///storage/a.tar"))


@pytest.mark.slow
def test_a_full_disk_is_reported(web, tmp_path):
    _, _, file = put(web)
    script = """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        folder, url, size = sys.argv[1:]
        cache = ShardCache(Path(folder), max_bytes=10**7)
        try:
            cache.fetch(RemoteFile(url=url, size=eval(size)))
        except UserError as error:
            print(error)
    """
    for size in (30_000, None):  # fails when room is reserved, or while writing
        message = run(script, tmp_path / "cache", file.url, size)
        assert f"'{tmp_path}/cache'" in message
        assert "(File too large)" in message
    assert leftovers(tmp_path) == [] == cached(tmp_path)


# avoids the imports of asrllm/__init__.py, which take seconds
HEADER = """
import hashlib, os, sys, types
from pathlib import Path
sys.modules["asrllm"] = types.ModuleType("asrllm")
sys.modules["asrllm"].__path__ = ["asrllm"]
from asrllm.data import storage
from asrllm.data.cache import ShardCache
from asrllm.data.storage import RemoteFile
from asrllm.errors import UserError
"""


def command(script, *arguments):
    lines = script.strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    return [
        sys.executable,
        "-c",
        HEADER + "\n".join(line[indent:] for line in lines),
        *map(str, arguments),
    ]


def run(script, *arguments):
    done = subprocess.run(
        command(script, *arguments),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        cwd=REPOSITORY,
        env=clean_environment(),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def started(script, *arguments):
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command(script, *arguments),
        stdin=pipe,
        stdout=pipe,
        text=True,
        cwd=REPOSITORY,
        env=clean_environment(),
    )
    watchdog = threading.Timer(LIMIT * 2, process.kill)
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        process.kill()
        process.wait(LIMIT)


class Background(threading.Thread):
    """A call in a thread, with its result."""

    def __init__(self, call):
        super().__init__(daemon=True)
        self.call, self.result = call, None
        self.start()

    def run(self):
        self.result = self.call()


@contextmanager
def log_event(text, event):
    """Set the event when the cache logs a message with this text."""
    handler = logging.Handler()
    handler.emit = lambda record: event.set() if text in record.getMessage() else None
    loggers = (storage.logger, cache_module.logger)
    for logger in loggers:
        logger.addHandler(handler)
    yield
    for logger in loggers:
        logger.removeHandler(handler)
