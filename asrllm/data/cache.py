"""A bounded cache of remote files on a node's disk, shared by all processes of the node.

The cache needs no separate process:

- A file appears under its name only when it is complete.
- A lock file lets one process download a file while the others wait.
- A download has its full length from the start, so that it counts against the limit.
- The mtime of a file is the time of its last use.
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
    CorruptedDownloadError,
    Pause,
    RemoteFile,
    StoppedError,
    import_driver,
    open_remote,
    redact_url,
    retry,
)
from asrllm.errors import UserError
from asrllm.locks import FileLock

GROWTH = 64 * 2**20  # bytes by which a download of unknown size extends its reservation
PREFETCH_THREADS = 3
# The cache counts and removes only files with names that it has made itself.
CACHED = re.compile(r"[0-9a-f]{20}-.+")

logger = logging.getLogger(__name__)


class _Download:
    """The state of a download.

    Attributes:
        file: the remote file.
        out: the local file, which has its full length from the start.
        partial: path of the local file.
        version: version of the remote object whose bytes were received.
        offset: bytes that were received.
        reserved: bytes that count against the limit of the cache.
        digest: SHA-256 of the received bytes.
    """

    def __init__(self, file: RemoteFile, out: BinaryIO, partial: Path) -> None:
        self.file = file
        self.out = out
        self.partial = partial
        self.version: str | None = None
        self.restart()

    def restart(self) -> None:
        """Discard the received bytes."""
        self.out.seek(0)
        self.offset = 0
        self.reserved = 0
        self.digest = hashlib.sha256()

    def write(self, chunk: bytes) -> None:
        """Append received bytes."""
        self.out.write(chunk)
        self.offset += len(chunk)
        if self.file.sha256 is not None:
            self.digest.update(chunk)

    def check(self, size: int | None) -> None:
        """Check a completed download, and restart it if it is wrong.

        Args:
            size: bytes of the whole file, as expected or as stated by the server.

        Raises:
            CorruptedDownloadError: the size or the checksum does not match.
        """
        is_longer = size is not None and self.offset > size
        received = "more" if is_longer else f"{self.offset} bytes"
        expected = self.file.sha256
        found = self.digest.hexdigest()
        if size is not None and self.offset != size:
            self.restart()
            raise CorruptedDownloadError(f"expected {size} bytes, received {received}")
        if expected is not None and found != expected.lower():
            self.restart()
            raise CorruptedDownloadError(
                f"expected the sha256 {expected}, received {received} with {found}"
            )


class ShardCache:
    """Local copies of remote files, shared by all processes of a node that use the same folder.

    The least recently used files make room for new ones. An open file stays readable when it is
    removed. Open the path that `fetch` returns at once, and call `fetch` again if it has vanished.

    `max_bytes` must hold all files that the node's processes download at the same time; otherwise
    they wait for each other. Files whose size is known neither to the caller nor to the server may
    exceed the limit. Only files that the cache has named itself are counted and removed.

    A cache can be used after a fork, and can be pickled.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int,
        attempts: int = ATTEMPTS,
        delay: float = DELAY,
    ) -> None:
        """Describe a cache. Its folder is made when a file is fetched.

        Args:
            folder: directory on a local disk.
            max_bytes: size limit.
            attempts: largest number of attempts per download.
            delay: seconds before the second attempt. See storage.retry.
        """
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self.attempts = attempts
        self.delay = delay
        self.locks = self.folder / ".locks"  # an empty file for each file that was ever cached
        self.partials = self.folder / ".partial"
        self._prefetcher: _Prefetcher | None = None

    @classmethod
    def from_config(cls, config: CacheConfig) -> "ShardCache":
        """Return the cache that `data.cache` describes."""
        return cls(Path(config.dir).expanduser(), max_bytes=int(config.max_gb * 1e9))

    def fetch(self, file: RemoteFile) -> Path:
        """Return the local copy of a file, and download it if necessary.

        If another thread or process is downloading the file, wait for it.

        Raises:
            UserError: the file cannot be downloaded, does not match its size or checksum, is
                larger than the cache, or cannot be written.
        """
        path = self.folder / file.local_name
        if not self._mark_used(path, file.size):
            with self._locked(path.name):
                # another process may have downloaded it in the meantime
                if not self._mark_used(path, file.size):
                    self._download(file, path, time.sleep)
        return path

    def prefetch(self, files: Sequence[RemoteFile]) -> None:
        """Download files in the background, in this order. Failures are only logged.

        The list replaces the files that are still queued from the last call. Files that another
        process is downloading are skipped, so processes with the same list divide the work.

        Args:
            files: the files that are needed next, well below `max_bytes` in total. A longer list
                would evict its own first files.
        """
        from fsspec.asyn import get_loop

        # The imports and the event loop are made in this thread: a fork must not find a thread in
        # the middle of them that holds their locks.
        schemes = {file.url.partition("://")[0]: file.url for file in files}
        try:
            for url in schemes.values():
                import_driver(url)
        except UserError as error:
            logger.warning("Nothing is prefetched: %s", error)
            return
        get_loop()
        if self._prefetcher is None or self._prefetcher.pid != os.getpid():
            self._prefetcher = _Prefetcher(self._fetch_unless_locked)
        self._prefetcher.replace_queue(files)

    def close(self) -> None:
        """Stop prefetching, and abandon downloads in progress."""
        if self._prefetcher is not None and self._prefetcher.pid == os.getpid():
            self._prefetcher.close()
        self._prefetcher = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prefetcher": None}

    def _fetch_unless_locked(self, file: RemoteFile, pause: Pause) -> None:
        path = self.folder / file.local_name
        if self._mark_used(path, file.size):
            return
        try:
            with self._locked(path.name, blocking=False):
                if not self._mark_used(path, file.size):
                    self._download(file, path, pause)
        except Timeout:
            pass  # another process is downloading it

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn failures of the local disk into UserErrors.

        Failures of the remote side do not leave `retry` as OSError.
        """
        try:
            yield
        except Timeout:  # a lock's timeout is an OSError too
            raise
        except OSError as error:
            raise UserError(
                f"the shard cache {str(self.folder)!r} cannot be written "
                f"({error.strerror or error}). Free disk space, lower data.cache.max_gb, "
                "or set data.cache.dir to another directory."
            ) from error

    @contextmanager
    def _locked(self, name: str, *, blocking: bool = True) -> Iterator[None]:
        """Hold a lock of this node.

        Args:
            name: name of a file, or "room" for the accounting of disk space.
            blocking: False raises filelock.Timeout if another process holds the lock.
        """
        # the folder is made only when a file is fetched: most runs have no remote files
        with self._writing():
            self.locks.mkdir(parents=True, exist_ok=True)
            self.partials.mkdir(exist_ok=True)
        with self._writing(), FileLock(self.locks / f"{name}.lock", blocking=blocking):
            yield

    def _mark_used(self, path: Path, size: int | None) -> bool:
        """Return whether a file exists with the expected size, and update its mtime if so."""
        with self._writing():
            try:
                if size is not None and path.stat().st_size != size:
                    return False
                os.utime(path)
            except FileNotFoundError:
                return False
            return True

    def _download(self, file: RemoteFile, path: Path, pause: Pause) -> None:
        """Download a file. The caller holds its lock."""
        partial = self.partials / path.name
        try:
            with self._writing(), open(partial, "wb") as out:
                download = _Download(file, out, partial)
                retry(
                    lambda: self._attempt(download, pause),
                    file.url,
                    attempts=self.attempts,
                    delay=self.delay,
                    pause=pause,
                )
                out.truncate(download.offset)
                out.flush()
                # otherwise a power failure could leave the full length without the content
                os.fsync(out.fileno())
            with self._locked("room"):  # so that no process counts in between
                partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def _attempt(self, download: _Download, pause: Pause) -> None:
        """Resume a download if the object is still the same, or else restart it."""
        file = download.file
        if file.size is not None:
            # before the connection is open, because this may wait
            self._reserve(download, file.size, pause)
        opened = open_remote(file.url, download.offset, download.version)
        with closing(opened.source):
            if opened.offset != download.offset:
                with self._writing():
                    download.restart()
            download.version = opened.version
            size = opened.size if file.size is None else file.size
            if size is not None:
                self._reserve(download, size, pause)
            self._receive(download, opened.source, size, pause)
        with self._writing():
            download.check(size)

    def _receive(
        self, download: _Download, source: BinaryIO, size: int | None, pause: Pause
    ) -> None:
        """Append the content of an open connection, up to the first chunk beyond `size` bytes."""
        while chunk := source.read(CHUNK):
            pause(0)
            needed = download.offset + len(chunk)
            if needed > download.reserved and size is None:
                self._reserve(download, max(needed, min(needed + GROWTH, self.max_bytes)), None)
            with self._writing():
                download.write(chunk)
            if size is not None and download.offset > size:
                break

    def _reserve(
        self,
        download: _Download,
        size: int,
        pause: Pause | None,
    ) -> None:
        """Reserve disk space for the first `size` bytes of a file.

        Args:
            download: the download.
            size: bytes to reserve in total.
            pause: waits until there is room; None exceeds the limit instead of waiting.

        Raises:
            UserError: the file is larger than the cache.
        """
        if size > self.max_bytes:
            raise UserError(
                f"{redact_url(download.file.url)} has at least {size / 1e9:.3g} GB, but the shard "
                f"cache holds {self.max_bytes / 1e9:.3g} GB. Raise data.cache.max_gb."
            )
        if size <= download.reserved:
            return
        if pause is None:
            self._take_room(download.partial, size, force=True)
        elif not self._take_room(download.partial, size, force=False):
            logger.warning(
                "The shard cache is full of downloads in progress, so %s waits. "
                "Raise data.cache.max_gb.",
                redact_url(download.file.url),
            )
            while not self._take_room(download.partial, size, force=False):
                pause(0.1)
        download.reserved = size

    def _take_room(
        self,
        partial: Path,
        size: int,
        *,
        force: bool,
    ) -> bool:
        """Extend a partial file to `size` bytes, and evict the least recently used files for it.

        Args:
            partial: the local file of a download.
            size: its new length.
            force: extend it even if downloads in progress leave no room.

        Returns:
            Whether there was room. If not, nothing is evicted.
        """
        with self._locked("room"):
            in_progress = sum(
                self._live_size(path) for path in self.partials.iterdir() if path != partial
            )
            if in_progress + size > self.max_bytes and not force:
                return False
            files = self._cached_files()
            total = in_progress + size + sum(stat.st_size for stat, _ in files)
            for stat, path in sorted(files, key=lambda file: file[0].st_mtime_ns):
                if total <= self.max_bytes:
                    break
                path.unlink(missing_ok=True)
                total -= stat.st_size
            os.truncate(partial, size)
            return True

    def _cached_files(self) -> list[tuple[os.stat_result, Path]]:
        files = []
        for path in self.folder.iterdir():
            if CACHED.fullmatch(path.name):
                stat = _stat(path)
                if stat is not None:
                    files.append((stat, path))
        return files

    def _live_size(self, partial: Path) -> int:
        """Return the length of a partial file, or remove it if its process is dead."""
        try:
            with self._locked(partial.name, blocking=False):
                partial.unlink(missing_ok=True)
                return 0
        except Timeout:
            stat = _stat(partial)
            return 0 if stat is None else stat.st_size


def _stat(path: Path) -> os.stat_result | None:
    """Return the status of a file, or None if it has vanished."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


class _Prefetcher:
    """Threads of this process that fetch files from a queue."""

    def __init__(self, fetch: Callable[[RemoteFile, Pause], None]) -> None:
        self.fetch = fetch
        self.pid = os.getpid()
        self.queue: deque[RemoteFile] = deque()
        self.changed = threading.Condition()
        self.stop = threading.Event()
        self.threads = [
            threading.Thread(
                target=self._work,
                name=f"prefetch-{i}",
                daemon=True,
            )
            for i in range(PREFETCH_THREADS)
        ]
        for thread in self.threads:
            thread.start()

    def replace_queue(self, files: Sequence[RemoteFile]) -> None:
        """Fetch these files next, instead of those that are queued."""
        with self.changed:
            self.queue = deque(files)
            self.changed.notify_all()

    def close(self) -> None:
        """Stop the threads."""
        with self.changed:
            self.stop.set()
            self.changed.notify_all()
        for thread in self.threads:
            # a thread that waits longer for a silent server ends with the process
            thread.join(5)

    def _work(self) -> None:
        while (file := self._next()) is not None:
            try:
                self.fetch(file, self._pause)
            except UserError as error:
                logger.warning("Prefetching failed: %s", error)
            except StoppedError:
                return

    def _next(self) -> RemoteFile | None:
        with self.changed:
            self.changed.wait_for(lambda: self.queue or self.stop.is_set())
            return None if self.stop.is_set() else self.queue.popleft()

    def _pause(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise StoppedError
