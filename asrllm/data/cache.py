"""A bounded cache of remote files on the node's disk, which all its processes share.

It needs no process of its own. A file appears under its name only when it is whole, a lock file lets one process download it while the
others wait, a file under way has its full length from the start so that it counts, and a file's mtime is when it was last used.
"""

import hashlib
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import Timeout

from asrllm.data.config import CacheConfig
from asrllm.data.storage import (
    ATTEMPTS,
    CHUNK,
    DELAY,
    DamagedError,
    Pause,
    RemoteFile,
    StoppedError,
    import_driver,
    open_remote,
    retried,
    shown,
)
from asrllm.errors import UserError
from asrllm.locks import FileLock

GROWTH = (
    64 * 2**20
)  # bytes: the steps in which a file whose size nobody told takes room in the cache
PREFETCH_THREADS = 3
CACHED = re.compile(
    r"[0-9a-f]{20}-.+"
)  # the cache counts and removes only what it has named itself

logger = logging.getLogger(__name__)


class _Download:
    """How far a file under way has come; `out` is its local beginning."""

    def __init__(self, file: RemoteFile, out: BinaryIO, partial: Path) -> None:
        self.file, self.out, self.partial = file, out, partial
        self.version: str | None = None
        self.restart()

    def restart(self) -> None:
        self.out.seek(0)
        self.offset, self.reserved, self.digest = 0, 0, hashlib.sha256()

    def write(self, chunk: bytes) -> None:
        self.out.write(chunk)
        self.offset += len(chunk)
        if self.file.sha256 is not None:
            self.digest.update(chunk)

    def check(self, size: int | None) -> None:
        """size: of the whole file, as expected or as the server says. Raises DamagedError; the next attempt then begins anew."""
        came = f"{self.offset} bytes" if size is None or self.offset <= size else "more"
        sha256 = self.file.sha256
        found = self.digest.hexdigest()
        if size is not None and self.offset != size:
            self.restart()
            raise DamagedError(f"expected {size} bytes, {came} came")
        if sha256 is not None and found != sha256.lower():
            self.restart()
            raise DamagedError(f"expected the sha256 {sha256}, {came} with {found} came")


class ShardCache:
    """Local copies of remote files in `folder`, at most max_bytes of them, shared by all processes of the node that name this folder.

    The least recently fetched files make room for new ones. A file that is open stays readable when it is removed, so open the path that
    `fetch` returned at once, and call `fetch` again if it has vanished before. max_bytes must hold all files that the node's processes
    download at the same time, else they wait for each other; files whose size neither the caller nor the server tells may exceed it.
    Only files that the cache has named itself are counted and removed. May be used after a fork, and pickled.
    """

    def __init__(
        self, folder: Path, *, max_bytes: int, attempts: int = ATTEMPTS, delay: float = DELAY
    ) -> None:
        self.folder, self.max_bytes, self.attempts, self.delay = (
            Path(folder),
            max_bytes,
            attempts,
            delay,
        )
        self.locks = self.folder / ".locks"  # empty files, one for each file ever cached
        self.partials = self.folder / ".partial"
        self._prefetcher: _Prefetcher | None = None

    @classmethod
    def of(cls, config: CacheConfig) -> "ShardCache":
        return cls(Path(config.dir).expanduser(), max_bytes=int(config.max_gb * 1e9))

    def fetch(self, file: RemoteFile) -> Path:
        """The local copy, downloaded if it is not there; waits while another thread or process downloads it.

        Raises UserError where the file cannot be had, is not what was expected, is larger than the cache, or cannot be written.
        """
        path = self.folder / file.local_name
        if not self._mark_used(path, file.size):
            with self._locked(path.name):
                if not self._mark_used(
                    path, file.size
                ):  # another process may have brought it meanwhile
                    self._download(file, path, time.sleep)
        return path

    def prefetch(self, files: Sequence[RemoteFile]) -> None:
        """Download these in the background, in this order, instead of what still waits from the last call; failures are only logged.

        What another process is downloading is passed over, so processes with the same list share the work. Name what is needed next,
        well below max_bytes: a longer list makes its own first files the least recently used.
        """
        from fsspec.asyn import get_loop

        try:
            for file in {file.url.partition("://")[0]: file for file in files}.values():
                import_driver(file.url)
        except UserError as error:
            logger.warning("nothing is prefetched: %s", error)
            return
        get_loop()  # as the imports: done here, since a fork must not find a thread in the middle of them, with their locks held
        if self._prefetcher is None or self._prefetcher.pid != os.getpid():
            self._prefetcher = _Prefetcher(self._bring)
        self._prefetcher.ask(files)

    def close(self) -> None:
        """End prefetching; what is under way is given up."""
        if self._prefetcher is not None and self._prefetcher.pid == os.getpid():
            self._prefetcher.close()
        self._prefetcher = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prefetcher": None}

    def _bring(self, file: RemoteFile, pause: Pause) -> None:
        path = self.folder / file.local_name
        if self._mark_used(path, file.size):
            return
        try:
            with self._locked(path.name, blocking=False):
                if not self._mark_used(path, file.size):
                    self._download(file, path, pause)
        except Timeout:
            pass  # another process is at it

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Failures of the local disk become UserErrors; those of the remote side never leave retried as OSError."""
        try:
            yield
        except Timeout:  # of a lock, and an OSError too
            raise
        except OSError as error:
            problem = f"the shard cache {str(self.folder)!r} cannot be written ({error.strerror or error})"
            raise UserError(
                f"{problem}: make room there, lower data.cache.max_gb, or set data.cache.dir to another folder"
            ) from error

    @contextmanager
    def _locked(self, name: str, *, blocking: bool = True) -> Iterator[None]:
        """Alone on this node with the file of this name, or with the room in the cache. Raises filelock.Timeout if not blocking."""
        with self._writing():  # not before a file is wanted: most runs have none that is remote
            self.locks.mkdir(parents=True, exist_ok=True)
            self.partials.mkdir(exist_ok=True)
        with self._writing(), FileLock(self.locks / f"{name}.lock", blocking=blocking):
            yield

    def _mark_used(self, path: Path, size: int | None) -> bool:
        """Whether the file is there, with the size that it should have."""
        with self._writing():
            try:
                if size is not None and path.stat().st_size != size:
                    return False
                os.utime(path)
            except FileNotFoundError:
                return False
            return True

    def _download(self, file: RemoteFile, path: Path, pause: Pause) -> None:
        """Under the file's lock."""
        partial = self.partials / path.name
        try:
            with self._writing(), open(partial, "wb") as out:
                download = _Download(file, out, partial)
                retried(
                    lambda: self._attempt(download, pause),
                    file.url,
                    attempts=self.attempts,
                    delay=self.delay,
                    pause=pause,
                )
                out.truncate(download.offset)
                out.flush()
                os.fsync(
                    out.fileno()
                )  # else a power cut could leave the full length without the content
            with self._locked("room"):  # so that nobody counts in between
                partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def _attempt(self, download: _Download, pause: Pause) -> None:
        """Go on where the last attempt broke off if the object is still the same, else from the beginning."""
        file = download.file
        if file.size is not None:
            self._reserve(
                download, file.size, pause
            )  # before the connection stands, since this may wait
        opened = open_remote(file.url, download.offset, download.version)
        with closing(opened.source):
            if opened.offset != download.offset:
                with self._writing():
                    download.restart()
            download.version = opened.version
            size = opened.size if file.size is None else file.size
            if size is not None:
                self._reserve(download, size, pause)
            while chunk := opened.source.read(CHUNK):
                pause(0)
                needed = download.offset + len(chunk)
                if needed > download.reserved and size is None:
                    self._reserve(download, max(needed, min(needed + GROWTH, self.max_bytes)), None)
                with self._writing():
                    download.write(chunk)
                if size is not None and download.offset > size:
                    break
        with self._writing():
            download.check(size)

    def _reserve(self, download: _Download, size: int, pause: Pause | None) -> None:
        """Make room for `size` bytes of the file, and count them from now on. pause None: take them even where others leave no room."""
        if size > self.max_bytes:
            gigabytes = (
                f"{size / 1e9:.3g} GB or more, the shard cache holds {self.max_bytes / 1e9:.3g} GB"
            )
            raise UserError(f"{shown(download.file.url)} has {gigabytes}: raise data.cache.max_gb")
        if size <= download.reserved:
            return
        if not self._take_room(download.partial, size, force=pause is None) and pause is not None:
            logger.warning(
                "the shard cache is full of downloads under way, %s waits: raise data.cache.max_gb",
                shown(download.file.url),
            )
            while not self._take_room(download.partial, size, force=False):
                pause(0.1)
        download.reserved = size

    def _take_room(self, partial: Path, size: int, *, force: bool) -> bool:
        """Whether `partial` now counts as `size` bytes; the least recently used files are removed only if that is enough."""
        with self._locked("room"):
            under_way = sum(
                self._live_size(path) for path in self.partials.iterdir() if path != partial
            )
            if under_way + size > self.max_bytes and not force:
                return False
            names = [path for path in self.folder.iterdir() if CACHED.fullmatch(path.name)]
            files = [(stat, path) for path in names if (stat := _stat(path)) is not None]
            total = under_way + size + sum(stat.st_size for stat, _ in files)
            for stat, path in sorted(files, key=lambda file: file[0].st_mtime_ns):
                if total <= self.max_bytes:
                    break
                path.unlink(missing_ok=True)
                total -= stat.st_size
            os.truncate(partial, size)
            return True

    def _live_size(self, partial: Path) -> int:
        """The length of a file under way; what a dead process has left is removed."""
        try:
            with self._locked(partial.name, blocking=False):
                partial.unlink(missing_ok=True)
                return 0
        except Timeout:
            stat = _stat(partial)
            return stat.st_size if stat is not None else 0


def _stat(path: Path) -> os.stat_result | None:
    """None where it has vanished."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


class _Prefetcher:
    """A few threads of this process that bring files in the order asked for."""

    def __init__(self, bring: Callable[[RemoteFile, Pause], None]) -> None:
        self.bring, self.pid = bring, os.getpid()
        self.queue: deque[RemoteFile] = deque()
        self.changed, self.stop = threading.Condition(), threading.Event()
        self.threads = [
            threading.Thread(target=self._work, name=f"prefetch-{i}", daemon=True)
            for i in range(PREFETCH_THREADS)
        ]
        for thread in self.threads:
            thread.start()

    def ask(self, files: Sequence[RemoteFile]) -> None:
        with self.changed:
            self.queue = deque(files)
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.stop.set()
            self.changed.notify_all()
        for thread in self.threads:
            thread.join(
                5
            )  # one that waits for a silent server longer than that ends with the process

    def _work(self) -> None:
        while (file := self._next()) is not None:
            try:
                self.bring(file, self._pause)
            except UserError as error:
                logger.warning("prefetching failed: %s", error)
            except StoppedError:
                return

    def _next(self) -> RemoteFile | None:
        with self.changed:
            self.changed.wait_for(lambda: self.queue or self.stop.is_set())
            return None if self.stop.is_set() else self.queue.popleft()

    def _pause(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise StoppedError
