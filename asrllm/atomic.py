"""Write files and directories that are either complete or absent."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from asrllm.errors import UserError
from asrllm.text_files import check_link

OTHER_PATH = "Use another path."
PERMISSIONS = "Change its permissions, or use another path."
# what to do about a path that the operating system rejects, by error number
PATH_FIXES = {
    errno.EACCES: PERMISSIONS,
    errno.EPERM: PERMISSIONS,
    errno.EROFS: f"Its file system is read-only. {OTHER_PATH}",
    errno.EEXIST: f"A part of its path is a file. {OTHER_PATH}",
    errno.ENOTDIR: f"A part of its path is a file. {OTHER_PATH}",
    errno.EISDIR: "It is a directory. Use the path of a file.",
    errno.ELOOP: f"Its symbolic links form a loop. {OTHER_PATH}",
    errno.ENAMETOOLONG: "Use a shorter name.",
}


class Terminated(SystemExit):
    """Raised on SIGTERM by `sigterm_raises`."""


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raise Terminated (status 143) on SIGTERM, so that partial output of the block is removed."""
    if threading.current_thread() is not threading.main_thread():
        # Python allows signal handlers only in the main thread
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file. On failure it remains as it was.

    A special file, for example /dev/null or a FIFO, is written and not replaced.

    Args:
        path: the file.
        content: bytes, or a text that is written in UTF-8.

    Raises:
        UserError: the path cannot be written, or is a FIFO that no process reads.
    """
    data = content if isinstance(content, bytes) else content.encode("utf-8")
    if _is_special(path):
        _write_special(path, data)
        return
    with new_file(path) as partial:
        partial.write_bytes(data)


def _write_special(path: Path, data: bytes) -> None:
    """Append to a special file. Opening a FIFO does not wait for a process that reads it."""
    check_text_output(path)
    sys.stdout.flush()  # the path may be /dev/stdout
    try:
        with writable_path(path):
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise UserError(
            f"{str(path)!r} is a FIFO that no process reads. Start its reader first, or use "
            "another path."
        ) from error
    os.set_blocking(descriptor, True)
    with open(descriptor, "wb") as file:
        file.write(data)


def _is_special(path: Path) -> bool:
    """Return whether a path is a device, a FIFO, a socket, or a name of an open file (/dev/stdout).

    As root, /dev/null could be replaced by a file.
    """
    parent = os.path.realpath(path.parent)
    if parent == "/dev" or parent.startswith("/proc/"):
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


def check_output_file(path: Path) -> None:
    """Check that a file can be written to a path, or that the file at the path can be replaced.

    Raises:
        UserError: the path is a directory, a special file or a symbolic link that leads nowhere, or
            its directory does not exist or is not writable.
    """
    with writable_path(path):
        if _is_special(path):
            raise UserError(f"{str(path)!r} is not a regular file. Use the path of a new file.")
        if path.is_dir():
            raise UserError(f"{str(path)!r} is a directory. Use the path of a file.")
        check_link(path)
    if not path.parent.is_dir():
        raise UserError(
            f"{str(path)!r} cannot be written: {str(path.parent)!r} is not a directory. "
            "Create it, or use another path."
        )
    _check_writable(path.parent, repr(str(path)))


def check_text_output(path: Path) -> None:
    """Check that `write_whole` can write to a path, which may be a FIFO or a character device.

    Raises:
        UserError: it cannot.
    """
    if not _is_special(path):
        check_output_file(path)
        return
    with writable_path(path):
        mode = path.stat().st_mode
    if stat.S_ISSOCK(mode) or stat.S_ISBLK(mode) or stat.S_ISDIR(mode):
        raise UserError(f"{str(path)!r} cannot be written like a file. {OTHER_PATH}")


def check_output_folder(path: Path, name: str = "") -> None:
    """Check that a path is a directory, or that one can be created there.

    Args:
        path: the path.
        name: what precedes the path in the message, for example "exp_dir=".

    Raises:
        UserError: the path is a file, a device or a symbolic link that leads nowhere, or is below
            one.
    """
    with writable_path(path):
        nearest = _nearest(path)
    check_link(nearest)
    if not nearest.is_dir():
        raise UserError(
            f"{name}{str(path)!r} cannot be a directory: {str(nearest)!r} is not one. "
            "Use another path."
        )


def check_writable_folder(path: Path, name: str = "") -> None:
    """Check that files can be written to a directory, which is created if it does not exist.

    Args:
        path: the directory.
        name: what precedes the path in the message, for example "--output-dir ".

    Raises:
        UserError: the path cannot be a directory, or is not writable.
    """
    check_output_folder(path, name)
    _check_writable(_nearest(path), f"{name}{str(path)!r}")


def _check_writable(folder: Path, what: str) -> None:
    """Raise UserError if files cannot be added to a directory.

    Args:
        folder: a directory that exists.
        what: what is to be written there, for the message.
    """
    if os.access(folder, os.W_OK | os.X_OK):
        return
    fix = f"Change the permissions of {str(folder)!r}, or use another path."
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        fix = PATH_FIXES[errno.EROFS]
    raise UserError(f"{what} is not writable. {fix}")


def _nearest(path: Path) -> Path:
    """Return the path itself or its nearest parent that exists, maybe as a link to nothing."""
    return next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Write a file elsewhere, and move it to `path` when the block ends without an error.

    An existing file is replaced. On failure it remains, and nothing else is left behind.

    Args:
        path: the file.

    Yields:
        The path to write to.

    Raises:
        UserError: `path` is a directory, a special file or a symbolic link that leads nowhere, or
            its directory cannot be written.
    """
    check_output_file(path)
    with _beside(path) as folder:
        partial = folder / path.name
        yield partial
        sync(partial)
        with writable_path(path):  # it may be a directory by now
            partial.replace(path)


@contextlib.contextmanager
def new_folder(path: Path, name: str = "--output ") -> Iterator[Path]:
    """Fill a directory elsewhere, and move it to `path` when the block ends without an error.

    Args:
        path: the directory, which must be empty or absent.
        name: what precedes the path in messages.

    Yields:
        The directory to write to. On failure it is removed.

    Raises:
        UserError: `path` is not a directory, is not empty, is a mount point, or cannot be written.
    """
    with writable_path(path):
        path = replaceable_folder(path, name)
        path.parent.mkdir(parents=True, exist_ok=True)
    with _beside(path) as partial:
        yield partial
        # mkdtemp allows its owner only.
        partial.chmod(0o755)
        partial.replace(path)


def replaceable_folder(
    path: Path, name: str = "--output ", fix: str = "Use another directory."
) -> Path:
    """Return the resolved path of a directory that `new_folder` can replace.

    Args:
        path: the directory.
        name: what precedes the path in messages.
        fix: what to do if the directory is not empty.

    Raises:
        UserError: the path is not a directory, is not empty, or is a mount point.
    """
    check_output_folder(path)
    if path.exists() and any(path.iterdir()):
        raise UserError(f"{name}{str(path)!r} is not empty. {fix}")
    path = path.resolve()  # may be a symbolic link to a directory
    if path.is_mount():
        raise UserError(
            f"{name}{str(path)!r} is a mount point, which cannot be replaced. "
            "Use a directory below it."
        )
    return path


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yield a temporary directory in the same directory as `path`, and remove it at the end.

    Each writer has its own, and locks it as long as it lives. The next writer removes those of
    writers that were killed.
    """
    with writable_path(path):
        _remove_stale(path)
        folder, lock = _locked_folder(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked_folder(path: Path) -> tuple[Path, int]:
    """Return a new temporary directory, and the file descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another writer removed it as stale
            continue
        # without locks in the file system no other writer removes it as stale
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():  # otherwise another writer removed it before the lock
            return folder, lock
        os.close(lock)


def _remove_stale(path: Path) -> None:
    """Remove the temporary directories of killed writers of `path`."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.partial")
    for folder in [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)]:
        with contextlib.suppress(OSError):  # locked by its writer, or already removed
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


@contextlib.contextmanager
def writable_path(path: Path) -> Iterator[None]:
    """Turn an operating-system error of the block about `path` into a UserError.

    Raises:
        UserError: the block finds that `path` cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in PATH_FIXES:
            raise
        raise write_error(path, error) from error


def write_error(path: str | Path, error: OSError) -> UserError:
    """Return the error for a path that cannot be written, with its reason and the fix."""
    fix = PATH_FIXES.get(error.errno or 0, "Check that its directory exists and has free space.")
    return UserError(f"{str(path)!r} cannot be written ({error.strerror or error}). {fix}")
