"""Fingerprints of pretrained models: another base under trained adapters gives wrong text and no error, so it is refused."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from asrllm.atomic import write_whole
from asrllm.defaults import BASE_MODEL_KEYS
from asrllm.errors import UserError
from asrllm.integrity import NO_SHA256, file_sha256, verify_weights

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "*.pt", "*.pth")
PREFIX = "sha256:"  # earlier versions read a sample of the bytes, and wrote no prefix
CACHED_ABOVE = 1 << 26  # bytes; a smaller file is read as fast as its entry in the cache


def fingerprint(path: str | Path) -> str:
    """Return a SHA-256 over the names and all bytes of a pretrained model's weight files.

    The checksum of a large file is cached by its path, size, modification time and inode, so that
    the file is read once and not at every start.

    Raises:
        CorruptedError: a file does not match the checksums that it holds itself.
    """
    digest = hashlib.sha256()
    for file in weight_files(path):
        digest.update(f"{file.name} {_content_sha256(file)}\n".encode())
    return PREFIX + digest.hexdigest()


def _content_sha256(file: Path) -> str:
    about = os.stat(file)
    if about.st_size < CACHED_ABOVE:
        verify_weights(file)
        return file_sha256(file)
    key = f"{os.path.realpath(file)} {about.st_size} {about.st_mtime_ns} {about.st_ino}"
    entry = cache_folder() / "sha256" / hashlib.sha256(key.encode()).hexdigest()
    with contextlib.suppress(OSError):
        cached = entry.read_text()
        if len(cached) == len(NO_SHA256):
            return cached
    with _lock(entry):  # of several ranks the first reads the file
        with contextlib.suppress(OSError):
            return entry.read_text()
        verify_weights(file)
        found = file_sha256(file)
        with contextlib.suppress(
            OSError, UserError
        ):  # without a place for the cache the file is read every time
            write_whole(entry, found)
    return found


@contextlib.contextmanager
def _lock(entry: Path) -> Iterator[None]:
    from asrllm.locks import FileLock  # 25 ms

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, UserError):
            entry.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(f"{entry}.lock"))
        yield


def cache_folder() -> Path:
    """Return $XDG_CACHE_HOME/asrllm, by default ~/.cache/asrllm."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asrllm"


def weight_files(path: str | Path) -> list[Path]:
    """The weight files of a pretrained model's directory, the first kind that is there; or the one file given."""
    folder = resolve_pretrained(path, file=True)
    if folder.is_file():
        return [folder]
    for pattern in WEIGHT_FILES:
        if files := sorted(folder.glob(pattern)):
            return files
    raise UserError(
        f"the pretrained model {str(path)!r} has no weights (none of {', '.join(WEIGHT_FILES)}): download it again"
    )


def resolve_pretrained(path: str | Path, *, file: bool = False) -> Path:
    """A directory, or with `file` a file, by its absolute path; a hub id as its local snapshot, downloaded where a hub is reached."""
    folder = Path(path).expanduser()
    if folder.is_dir() or (file and folder.is_file()):
        return (
            folder.absolute()
        )  # links are kept: what the hub's cache links to has other names, hence other fingerprints
    if not is_hub_id(path):
        raise UserError(
            f"the pretrained model {str(path)!r} does not exist: give a directory or a hub id such as Qwen/Qwen2.5-7B-Instruct"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(str(path), ignore_patterns=["*.gguf", "*.onnx", "*.msgpack", "*.h5"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"the pretrained model {str(path)!r} is no directory and could not be fetched from the hub: {said}"
        ) from error


def is_hub_id(path: str | Path) -> bool:
    return str(path).count("/") == 1 and not str(path).startswith(("/", ".", "~"))


def check_fingerprint(part: str, path: str | Path, expected: str) -> None:
    """Raise UserError unless the pretrained model at `path` is the one that training used."""
    if not expected.startswith(PREFIX):
        raise UserError(
            f"the fingerprint of the {part} at {str(path)!r} was written by an earlier version, which "
            "read a sample of its bytes. Use that version, or train again."
        )
    found = fingerprint(path)
    if found != expected:
        shown = [text.removeprefix(PREFIX)[:12] for text in (found, expected)]
        raise UserError(
            f"the {part} at {str(path)!r} is not the one that this model was trained on: its weights "
            f"have the SHA-256 {shown[0]}..., expected {shown[1]}.... Give the one used in training: "
            f"{BASE_MODEL_KEYS[part]}=PATH."
        )
