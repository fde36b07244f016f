"""Files that are whole or not there."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from asrllm.errors import UserError

MENDED = {  # what the system says of a place, and what a user does about it
    errno.EACCES: "give a place that you may read and write, or change its permissions",
    errno.EPERM: "give a place that you may read and write, or change its permissions",
    errno.EROFS: "it is on a file system that is read only: give another place",
    errno.EEXIST: "a part of its path is a file: give another place",
    errno.ENOTDIR: "a part of its path is a file: give another place",
    errno.EISDIR: "it is a directory: give the path of a file",
    errno.ELOOP: "its links lead in a circle: give another place",
    errno.ENAMETOOLONG: "give a shorter name",
}


class Terminated(SystemExit):
    """SIGTERM, where it is an exception."""


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Inside the block SIGTERM raises Terminated (status 143), so that what the block has begun to write is removed."""
    if threading.current_thread() is not threading.main_thread():  # Python allows it nowhere else
        yield
        return

    def stop(number: int, frame: FrameType | None) -> Any:
        raise Terminated(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """The file appears with all of its text or stays as it was."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """The file that is written at the path given becomes `path` at the end, in the place of what is there; nothing is left where it
    fails."""
    with _beside(path) as folder:
        partial = folder / path.name
        yield partial
        sync(partial)
        partial.replace(path)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """What is written below the directory given becomes `path` at the end; nothing is left where it fails.

    Raises UserError where there is something in `path`.
    """
    with place_for(path):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"--output {str(path)!r} is not empty: choose another directory")
        path = path.resolve()  # a link may be given for a directory
        if path.is_mount():
            raise UserError(
                f"--output {str(path)!r} is a mount point, which cannot be replaced: give a directory below it"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
    with _beside(path) as partial:
        yield partial
        partial.chmod(0o755)
        partial.replace(path)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A directory beside `path` for what is to become it, removed at the end.

    Each writer has its own, and holds a lock on it while it lives: those of writers that were killed are removed by the next one.
    """
    with place_for(path):
        _remove_stale(path)
        folder, lock = _locked_folder(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked_folder(path: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another writer took it for a stale one
            continue
        with contextlib.suppress(
            OSError
        ):  # a file system without locks: nobody takes it for a stale one there
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():  # else the same, before it was locked
            return folder, lock
        os.close(lock)


def _remove_stale(path: Path) -> None:
    ours = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.partial")
    for folder in [entry for entry in path.parent.iterdir() if ours.fullmatch(entry.name)]:
        with contextlib.suppress(OSError):  # locked by its writer, or gone
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


@contextlib.contextmanager
def place_for(path: Path) -> Iterator[None]:
    """Raises UserError where the block finds that nothing can be written at `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in MENDED:
            raise
        raise UserError(
            f"{str(path)!r} cannot be written ({error.strerror}): {MENDED[error.errno]}"
        ) from error
