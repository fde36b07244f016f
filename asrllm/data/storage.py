"""Files at any fsspec URL (s3://, gs://, https://, ...): sizes, reading, and retries."""

import hashlib
import logging
import random
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from urllib.parse import quote

from asrllm.errors import UserError, error_chain

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from fsspec.implementations.http import HTTPFileSystem

T = TypeVar("T")
# Waits for a number of seconds. Between the chunks of a download it is called with 0.
Pause = Callable[[float], object]

ATTEMPTS = 6
DELAY = 0.5  # seconds before the second attempt; doubles with every further attempt
MAX_DELAY = 30.0  # seconds
# bytes of a download that are held in memory; object stores receive one request per chunk
CHUNK = 8 * 2**20
MAX_IN_MEMORY = 1 << 30  # bytes of a file that is not downloaded to the cache
SIZE_THREADS = 32
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
SCHEMES = ("s3", "s3a", "gs", "gcs", "http", "https", "abfs", "abfss", "az", "hf", "file")
CREDENTIALS = {
    "s3": "Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "or FSSPEC_S3_ANON=true for a public bucket.",
    "gcs": "Run 'gcloud auth application-default login', or set GOOGLE_APPLICATION_CREDENTIALS.",
    "http": "Check the address, or send a token with "
    """FSSPEC_HTTP='{"headers": {"Authorization": "Bearer ..."}}'.""",
}
NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "DefaultCredentialsError",
    "ClientAuthenticationError",
)
# HTTP statuses below 500 after which another attempt may succeed
TRANSIENT_STATUSES = (408, 409, 412, 425, 429)

logger = logging.getLogger(__name__)
# Does not use the seeded generator, and differs between forked workers.
_jitter = random.SystemRandom()
# every filesystem of this process; see _filesystem
_filesystems: "dict[int, AbstractFileSystem]" = {}


class _NotFoundError(UserError):
    """There is no file at the URL."""


class CorruptedDownloadError(Exception):
    """The received bytes are not those that were expected. Another attempt may succeed."""


class StoppedError(Exception):
    """The cache was closed during a prefetch."""


def is_url(text: str) -> bool:
    """Return whether a text is `scheme://...`, which includes `file://...`, and not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def join_url(base: str, name: str) -> str:
    """Return the URL of a file below a folder. The query (a token) of an http base is appended.

    Args:
        base: the URL of the folder.
        name: a relative path without `..`.
    """
    scheme, _, rest = base.partition("://")
    query = ""
    if _extra(base) == "http":
        rest, mark, query = rest.partition("?")
        name = quote(name)
        query = mark + query
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return f"{scheme}://{'/'.join([rest.rstrip('/'), *parts])}{query}"


def read_bytes(url: str) -> bytes:
    """Return the content of a file of at most MAX_IN_MEMORY bytes.

    Raises:
        UserError: the file does not exist or is too large, access is denied, or all attempts fail.
    """
    return retry(lambda: _read_bytes(url), url, attempts=ATTEMPTS, delay=DELAY)


def _read_bytes(url: str) -> bytes:
    """Make one attempt to read a file."""
    content = bytearray()
    opened = open_remote(url, 0, None)
    with closing(opened.source) as source:
        while chunk := source.read(CHUNK):
            content += chunk
            if len(content) > MAX_IN_MEMORY:
                raise UserError(
                    f"{redact_url(url)} has more than {MAX_IN_MEMORY >> 20} MiB. "
                    "Download it, and use the local file."
                )
    if opened.size not in (None, len(content)):
        raise CorruptedDownloadError(f"expected {opened.size} bytes, received {len(content)}")
    return bytes(content)


def remote_sizes(urls: Sequence[str]) -> list[int | None]:
    """Return the sizes of files in bytes, requested in parallel; None if a file does not exist.

    Raises:
        UserError: a request fails for another reason.
    """
    with ThreadPoolExecutor(max(1, min(SIZE_THREADS, len(urls)))) as pool:
        return list(pool.map(_remote_size, urls))


def _remote_size(url: str) -> int | None:
    def request() -> dict[str, Any]:
        fs, path = _filesystem(url)
        return fs.info(path)

    try:
        info = retry(request, url, attempts=ATTEMPTS, delay=DELAY)
    except _NotFoundError:
        return None
    if info.get("type") == "directory":  # object stores say this of a prefix of other objects
        return None
    if info["size"] is None:
        raise UserError(
            f"the server does not state the size of {redact_url(url)}. "
            "Use a server that sends Content-Length, or copy the file."
        )
    return info["size"]


def _filesystem(url: str) -> "tuple[AbstractFileSystem, str]":
    """Return the filesystem of a URL in this process, and the file's path in it."""
    from fsspec.core import url_to_fs  # takes 60 ms, which local files need not spend

    import_driver(url)
    # an earlier listing must not decide whether a file exists
    fs, path = url_to_fs(url, use_listings_cache=False)
    # After a fork fsspec drops the parent's instances. If they were freed in the child, they would
    # remove their connections from the epoll set that parent and child share. The parent's next
    # request would then receive nothing until its timeout.
    _filesystems[id(fs)] = fs
    return fs, path


def check_scheme(url: str) -> None:
    """Raise UserError unless the URL's scheme is one of SCHEMES.

    A URL may come from an index or a manifest that somebody else wrote. Some of fsspec's schemes
    read other places than the one they name, connect through another host, or unpack archives.
    """
    scheme = url.partition("://")[0].lower()
    if scheme not in SCHEMES or "::" in url:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise UserError(
            f"{redact_url(url)}: the scheme {scheme!r} is not supported. Available: {known}."
        )


def import_driver(url: str) -> None:
    """Import the package that reads a URL.

    Raises:
        UserError: the scheme is not supported, or its package is not installed.
    """
    import fsspec

    check_scheme(url)
    scheme = url.partition("://")[0].lower()
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        extra = _extra(url)
        fix = f"Run: pip install 'asrllm[{extra}]'" if extra else str(error)
        raise UserError(
            f"{redact_url(url)} cannot be read because a package is missing "
            f"({error.__cause__ or error}). {fix}"
        ) from error


def _extra(url: str) -> str | None:
    """Return the extra of asrllm that a URL needs."""
    return EXTRAS.get(url.partition("://")[0].lower())


def redact_url(url: str) -> str:
    """Return a URL without its query and password, which may be secret."""
    return re.sub(r"(://[^/:@]*):[^/@]*@", r"\1:***@", url.partition("?")[0])


def _describe_error(error: BaseException, url: str) -> str:
    """Return the class and message of an error on one line, without secrets of the URL."""
    text = " ".join(str(error).split())
    text = text.replace(url, redact_url(url))[:300]
    name = "" if isinstance(error, CorruptedDownloadError) else type(error).__name__
    return ": ".join(part for part in (name, text) if part)  # timeouts have no text


# tenacity (37 ms to import) would replace 6 of the 25 lines of code below by as many that configure
# it. Which errors are permanent, and what the messages say, would remain here.
def retry(
    action: Callable[[], T],
    url: str,
    *,
    attempts: int,
    delay: float,
    pause: Pause = time.sleep,
) -> T:
    """Run an action, repeat it after transient errors, and return its result.

    Args:
        action: the function to run.
        url: the URL that it reads, for messages.
        attempts: largest number of runs.
        delay: seconds before the second run; doubles with every further run, with jitter.
        pause: waits between runs.

    Raises:
        UserError: the error is permanent, or all attempts failed.
    """
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except (UserError, StoppedError):
            raise
        except Exception as raised:  # every driver has its own exceptions
            error = _underlying_error(raised, url)
            permanent = _permanent_error(error, url)
            if permanent is not None:
                raise permanent from error
            if attempt == attempts:
                raise UserError(
                    f"{redact_url(url)} cannot be read: {attempts} attempts failed, the last one "
                    f"with {_describe_error(error, url)}. Check the file, the server and the "
                    "connection."
                ) from error
            logger.warning(
                "%s: attempt %d of %d failed (%s)",
                redact_url(url),
                attempt,
                attempts,
                _describe_error(error, url),
            )
            wait = min(delay * 2 ** (attempt - 1), MAX_DELAY)
            pause(wait * _jitter.uniform(0.5, 1.5))
    raise AssertionError("attempts must be at least 1")


def _underlying_error(error: Exception, url: str) -> Exception:
    """Return the cause of an error of fsspec's http, which reports every failure as "not found"."""
    if isinstance(error, FileNotFoundError) and _extra(url) == "http":
        cause = error.__cause__
        if isinstance(cause, Exception):
            return cause
    return error


def _is_missing(error: BaseException, status: int | None) -> bool:
    """Return whether an error says that the object does not exist."""
    if status is None:
        return isinstance(error, (FileNotFoundError, IsADirectoryError))
    return status in (404, 410)


def _permanent_error(error: BaseException, url: str) -> UserError | None:
    """Return the message for an error that will recur, or None if another attempt may succeed."""
    status = _status(error)
    if _is_missing(error, status):
        return _NotFoundError(
            f"{redact_url(url)} does not exist. Check the address, and that all shards are there."
        )
    if (
        status in (401, 403)
        or isinstance(error, PermissionError)
        or type(error).__name__ in NO_CREDENTIALS
    ):
        fix = CREDENTIALS.get(_extra(url) or "", "Provide credentials with read access.")
        problem = _describe_error(error, url)
        return UserError(f"access to {redact_url(url)} is denied ({problem}). {fix}")
    # S3 sends RequestTimeout with the status 400
    if isinstance(error, TimeoutError) or status in TRANSIENT_STATUSES:
        return None
    if (status is not None and 400 <= status < 500) or isinstance(
        error, (ValueError, TypeError, NotImplementedError)
    ):
        return UserError(
            f"{redact_url(url)} cannot be read ({_describe_error(error, url)}). Check the address."
        )
    return None


def _status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error of aiohttp, botocore, gcsfs, Azure or requests."""
    for link in error_chain(error):
        for status in _status_candidates(link):
            if isinstance(status, int):
                return status
    return None


def _status_candidates(error: BaseException) -> list[object]:
    """Return the attributes in which the drivers store the status."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
    # aiohttp, azure, requests
    found = [
        getattr(error, "status", None),
        getattr(error, "status_code", None),
        getattr(response, "status_code", None),
    ]
    # only for gcsfs, because aiohttp warns when its own `code` is read
    if type(error).__module__.startswith("gcsfs"):
        found.append(getattr(error, "code", None))
    return found


@dataclass(frozen=True, kw_only=True)
class RemoteStream:
    """A remote file that is open for reading.

    Attributes:
        source: the open file.
        offset: position of its next byte.
        version: changes when the object is replaced; None if that cannot be known.
        size: bytes of the whole file; None if unknown.
    """

    source: BinaryIO
    offset: int
    version: str | None
    size: int | None


def open_remote(url: str, offset: int, version: str | None) -> RemoteStream:
    """Open a file at `offset` if it still has this version, or else at its beginning."""
    fs, path = _filesystem(url)
    if _extra(url) == "http":
        return _open_http(fs, path, offset, version)
    source = fs.open(path, "rb", block_size=CHUNK, cache_type="none")
    details = getattr(source, "details", None)
    size = getattr(source, "size", None)
    current = repr(details) if isinstance(details, dict) else None  # has the etag or generation
    if offset and current is not None and current == version:
        source.seek(offset)
    else:
        offset = 0
    return RemoteStream(
        source=source,
        offset=offset,
        version=current,
        size=size if isinstance(size, int) else None,
    )


def _open_http(
    fs: "HTTPFileSystem",
    url: str,
    offset: int,
    version: str | None,
) -> RemoteStream:
    """Open a file with one streaming GET.

    Unlike fsspec's usual http file it needs no range requests, and it reports the true reason of a
    failure.
    """
    import aiohttp  # fsspec's http has already imported it

    # aiohttp's own limit is 5 minutes for the whole file; this one ends only stalled connections
    timeout = aiohttp.ClientTimeout(
        total=None,
        sock_connect=30,
        sock_read=60,
    )
    # the tar as it is stored, so that lengths agree
    headers = {**fs.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    if offset and version is not None:
        # the server sends the whole file if it was replaced
        headers |= {"Range": f"bytes={offset}-", "If-Range": version}
    # block_size=0 selects the stream; any size avoids a HEAD request
    source = fs.open(
        url,
        "rb",
        block_size=0,
        size=1,
        headers=headers,
        timeout=timeout,
    )
    response = source.r
    if response.status != 206:
        offset = 0
    if "Content-Encoding" in response.headers:
        return RemoteStream(
            source=source,
            offset=offset,
            version=None,
            size=None,
        )
    length = response.headers.get("Content-Length")
    return RemoteStream(
        source=source,
        offset=offset,
        version=_strong_etag(response.headers.get("ETag")),
        size=None if length is None else offset + int(length),
    )


def _strong_etag(tag: str | None) -> str | None:
    """Return an ETag unless it is weak, which does not guarantee equal bytes."""
    if tag is None or tag.startswith("W/"):
        return None
    return tag


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file to be cached. Its size and checksum are verified if they are known.

    Attributes:
        url: its location.
        size: bytes.
        sha256: checksum in hexadecimal.
    """

    url: str
    size: int | None = None
    sha256: str | None = None

    @property
    def local_name(self) -> str:
        """A readable file name that is unique to the URL and the checksum."""
        digest = hashlib.sha256(f"{self.url}\n{self.sha256 or ''}".encode()).hexdigest()[:20]
        last_part = redact_url(self.url).rstrip("/").rpartition("/")[2]
        base = re.sub(r"[^A-Za-z0-9._-]", "_", last_part)
        return f"{digest}-{base[-100:]}"
