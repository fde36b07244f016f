"""Files at any fsspec URL (s3://, gs://, https://, ...): asked for, opened, and tried again where that may help."""

import hashlib
import logging
import random
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

from asrllm.errors import UserError

T = TypeVar("T")
Pause = Callable[
    [float], object
]  # waits so many seconds; between the chunks of a download it is called with 0

ATTEMPTS = 6
DELAY = 0.5  # seconds before the second attempt, twice as long before each one after it
MAX_DELAY = 30.0  # seconds
CHUNK = (
    8 * 2**20
)  # bytes of a file under way that are held in memory; on object stores this is one request
SIZE_THREADS = 32
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
SCHEMES = ("s3", "s3a", "gs", "gcs", "http", "https", "abfs", "abfss", "az", "hf", "file")
CREDENTIALS = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true for a public bucket",
    "gcs": "run 'gcloud auth application-default login' or set GOOGLE_APPLICATION_CREDENTIALS",
    "http": """check the address, or send a token with FSSPEC_HTTP='{"headers": {"Authorization": "Bearer ..."}}'""",
}
NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "DefaultCredentialsError",
    "ClientAuthenticationError",
)
PASSING = (
    408,
    409,
    412,
    425,
    429,
)  # states of HTTP below 500 that may be others at the next attempt

logger = logging.getLogger(__name__)
_jitter = (
    random.SystemRandom()
)  # leaves the seeded generator alone, and differs between forked workers
_kept: dict[int, Any] = {}  # every filesystem of this process: see _filesystem


class _MissingError(UserError):
    """There is nothing at the URL."""


class DamagedError(Exception):
    """What came is not what was expected; another attempt may bring it."""


class StoppedError(Exception):
    """The cache was closed under a download that was only prefetching."""


def is_url(text: str) -> bool:
    """Whether it is `scheme://...` and not a local path; `file://...` is a URL."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def join_url(base: str, name: str) -> str:
    """Return the URL of a file below a folder. A query of an http base (a token) stays at the end.

    Args:
        base: the URL of the folder.
        name: a relative path without `..`.
    """
    scheme, _, rest = base.partition("://")
    query = ""
    if _extra(base) == "http":
        rest, mark, query = rest.partition("?")
        name, query = quote(name), mark + query
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return f"{scheme}://{'/'.join([rest.rstrip('/'), *parts])}{query}"


def read_bytes(url: str) -> bytes:
    """The content of a small file. Raises UserError where it is missing, not allowed, or still failing after several attempts."""

    def read() -> bytes:
        fs, path = _filesystem(url)
        return fs.cat_file(path)

    return retried(read, url, attempts=ATTEMPTS, delay=DELAY)


def remote_sizes(urls: Sequence[str]) -> list[int | None]:
    """The sizes in bytes, None where there is no such file, asked for in parallel. Raises UserError for any other failure."""
    with ThreadPoolExecutor(max(1, min(SIZE_THREADS, len(urls)))) as pool:
        return list(pool.map(_remote_size, urls))


def _remote_size(url: str) -> int | None:
    def ask() -> dict[str, Any]:
        fs, path = _filesystem(url)
        return fs.info(path)

    try:
        info = retried(ask, url, attempts=ATTEMPTS, delay=DELAY)
    except _MissingError:
        return None
    if info.get("type") == "directory":  # object stores answer so for the prefix of other objects
        return None
    if info["size"] is None:
        raise UserError(
            f"the server does not tell the size of {shown(url)}: use one that sends Content-Length, or copy the file"
        )
    return info["size"]


def _filesystem(url: str) -> tuple[Any, str]:
    """The URL's filesystem in this process, and the file's path there."""
    from fsspec.core import url_to_fs  # 60 ms, which local files need not spend

    import_driver(url)
    fs, path = url_to_fs(
        url, use_listings_cache=False
    )  # a listing from before must not decide whether a file exists
    # After a fork fsspec drops the parent's instances. Freed in the child, they would take their connections out of the epoll set that
    # parent and child share, and the parent's next request would hear nothing until its timeout.
    _kept[id(fs)] = fs
    return fs, path


def check_scheme(url: str) -> None:
    """Raise UserError unless the URL's scheme is one of SCHEMES.

    A URL may come from an index or a manifest that somebody else wrote. fsspec knows schemes that
    read other places than the one they name, run through another host, or unpack archives.
    """
    scheme = url.partition("://")[0].lower()
    if scheme not in SCHEMES or "::" in url:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise UserError(
            f"{shown(url)}: the scheme {scheme!r} is not supported. Use one of {known}."
        )


def import_driver(url: str) -> None:
    """Raise UserError for a scheme that is not supported, or a missing package."""
    import fsspec

    check_scheme(url)
    scheme = url.partition("://")[0].lower()
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        extra = _extra(url)
        install = f"pip install 'asrllm[{extra}]'" if extra else str(error)
        raise UserError(
            f"{shown(url)} cannot be read without another package ({error.__cause__ or error}): {install}"
        ) from error


def _extra(url: str) -> str | None:
    """The extra of this package that reads such URLs."""
    return EXTRAS.get(url.partition("://")[0].lower())


def shown(url: str) -> str:
    """The URL without what may be secret in it: a query and a password."""
    return re.sub(r"(://[^/:@]*):[^/@]*@", r"\1:***@", url.partition("?")[0])


def _said(error: BaseException, url: str) -> str:
    text = " ".join(str(error).split()).replace(url, shown(url))
    name = "" if isinstance(error, DamagedError) else type(error).__name__
    return ": ".join(part for part in (name, text[:300]) if part)  # timeouts have no text


def retried(
    action: Callable[[], T], url: str, *, attempts: int, delay: float, pause: Pause = time.sleep
) -> T:
    """The action's result; on errors that may pass it is run again, up to so many attempts. Raises UserError for all others."""
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except (UserError, StoppedError):
            raise
        except Exception as raised:  # every driver raises its own
            error = _true_cause(raised, url)
            if (problem := _lasting_problem(error, url)) is not None:
                raise problem from error
            if attempt == attempts:
                message = f"{shown(url)} cannot be read: {attempts} attempts failed, the last one with {_said(error, url)}"
                raise UserError(
                    f"{message}: check the file, the server and the connection"
                ) from error
            wait = min(delay * 2 ** (attempt - 1), MAX_DELAY) * _jitter.uniform(0.5, 1.5)
            logger.warning(
                "%s: attempt %d of %d failed (%s)", shown(url), attempt, attempts, _said(error, url)
            )
            pause(wait)
    raise AssertionError("attempts must be at least 1")


def _true_cause(error: Exception, url: str) -> Exception:
    """What lies behind a "not found", which fsspec's http says of every failure."""
    hidden = (
        error.__cause__ if isinstance(error, FileNotFoundError) and _extra(url) == "http" else None
    )
    return hidden if isinstance(hidden, Exception) else error


def _lasting_problem(error: BaseException, url: str) -> UserError | None:
    """What no further attempt mends; None where one may help."""
    status = _status(error)
    if status in (404, 410) or (
        status is None and isinstance(error, (FileNotFoundError, IsADirectoryError))
    ):
        return _MissingError(
            f"{shown(url)} does not exist: check the address, and that all shards are there"
        )
    if (
        status in (401, 403)
        or isinstance(error, PermissionError)
        or type(error).__name__ in NO_CREDENTIALS
    ):
        hint = CREDENTIALS.get(_extra(url) or "", "give credentials that may read it")
        return UserError(f"{shown(url)} may not be read ({_said(error, url)}): {hint}")
    if (
        isinstance(error, TimeoutError) or status in PASSING
    ):  # S3 sends RequestTimeout with the status 400
        return None
    if (status is not None and 400 <= status < 500) or isinstance(
        error, (ValueError, TypeError, NotImplementedError)
    ):
        return UserError(f"{shown(url)} cannot be read ({_said(error, url)}): check the address")
    return None


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error of aiohttp, botocore, gcsfs, Azure or requests."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):  # botocore
            response = response.get("ResponseMetadata", {})
            found = [response.get("HTTPStatusCode")]
        else:  # aiohttp, azure, requests; then gcsfs, since aiohttp warns about its own `code`
            found = [
                getattr(error, "status", None),
                getattr(error, "status_code", None),
                getattr(response, "status_code", None),
            ]
            if type(error).__module__.startswith("gcsfs"):
                found.append(getattr(error, "code", None))
        if statuses := [status for status in found if isinstance(status, int)]:
            return statuses[0]
        error = error.__cause__
    return None


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A remote file open for reading. version: differs when the object was replaced, None where that cannot be known; size in bytes."""

    source: Any
    offset: int
    version: str | None
    size: int | None


def open_remote(url: str, offset: int, version: str | None) -> _Opened:
    """The file open at `offset` if it still has this version, else at its beginning."""
    fs, path = _filesystem(url)
    if _extra(url) == "http":
        return _open_http(fs, path, offset, version)
    source = fs.open(path, "rb", block_size=CHUNK, cache_type="none")
    details, size = getattr(source, "details", None), getattr(source, "size", None)
    now = repr(details) if isinstance(details, dict) else None  # has the etag or generation
    if offset and now is not None and now == version:
        source.seek(offset)
    else:
        offset = 0
    return _Opened(
        source=source, offset=offset, version=now, size=size if isinstance(size, int) else None
    )


def _open_http(fs: Any, url: str, offset: int, version: str | None) -> _Opened:
    """One streaming GET: unlike fsspec's usual file it needs no ranges, and tells the true reason of a failure."""
    import aiohttp  # fsspec's http has imported it

    # aiohttp's own limit is 5 minutes for the whole file; here only a connection that stands still is given up
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
    headers = {
        **fs.kwargs.get("headers", {}),
        "Accept-Encoding": "identity",
    }  # the tar as it lies there, so that lengths agree
    if offset and version is not None:
        headers |= {
            "Range": f"bytes={offset}-",
            "If-Range": version,
        }  # the whole file comes if it was replaced
    # block_size=0 asks for the stream, any size saves a HEAD request
    source = fs.open(url, "rb", block_size=0, size=1, headers=headers, timeout=timeout)
    answer = source.r
    offset = offset if answer.status == 206 else 0
    if "Content-Encoding" in answer.headers:
        return _Opened(source=source, offset=offset, version=None, size=None)
    tag, length = answer.headers.get("ETag"), answer.headers.get("Content-Length")
    strong = tag if tag is not None and not tag.startswith("W/") else None
    return _Opened(
        source=source,
        offset=offset,
        version=strong,
        size=offset + int(length) if length is not None else None,
    )


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file to be cached. size: in bytes; sha256: in hex; what is given is checked while downloading."""

    url: str
    size: int | None = None
    sha256: str | None = None

    @property
    def local_name(self) -> str:
        """Readable, and another one for another URL or checksum."""
        digest = hashlib.sha256(f"{self.url}\n{self.sha256 or ''}".encode()).hexdigest()[:20]
        base = re.sub(r"[^A-Za-z0-9._-]", "_", shown(self.url).rstrip("/").rpartition("/")[2])
        return f"{digest}-{base[-100:]}"
