"""Fingerprints of pretrained models.

Adapters that were trained on another base model produce wrong text without an error. A model whose
fingerprint does not match is therefore rejected.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from asrllm.atomic import write_whole
from asrllm.defaults import BASE_MODEL_KEYS
from asrllm.errors import UserError
from asrllm.integrity import NO_SHA256, file_sha256, verify_weights
from asrllm.progress import waiting
from asrllm.text_files import check_file, first_words

WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin", "*.pt", "*.pth")
HASH_PREFIX = "sha256:"
CACHED_ABOVE = 1 << 26  # bytes; a smaller file is read as fast as its cache entry
NOT_DOWNLOADED = ["*.gguf", "*.onnx", "*.msgpack", "*.h5"]


def fingerprint(path: str | Path) -> str:
    """Return a SHA-256 over the names and all bytes of a pretrained model's weight files.

    The checksum of a large file is cached by its path, size, modification time and inode, so that
    the file is read once and not at every start.

    Raises:
        CorruptedError: a file does not match the checksums that it contains.
    """
    digest = hashlib.sha256()
    for file in pretrained_weight_files(path):
        digest.update(f"{file.name} {_content_sha256(file)}\n".encode())
    return HASH_PREFIX + digest.hexdigest()


def _content_sha256(file: Path) -> str:
    status = os.stat(file)
    if status.st_size < CACHED_ABOVE:
        verify_weights(file)
        return file_sha256(file)
    key = f"{os.path.realpath(file)} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
    entry = cache_folder() / "sha256" / hashlib.sha256(key.encode()).hexdigest()
    with contextlib.suppress(OSError):
        cached = entry.read_text()
        if len(cached) == len(NO_SHA256):
            return cached
    with _lock(entry):  # only the first of several ranks reads the file
        with contextlib.suppress(OSError):
            return entry.read_text()
        with waiting(f"computing the SHA-256 of {file}"):
            verify_weights(file)
            found = file_sha256(file)
        # if the cache cannot be written, the file is read every time
        with contextlib.suppress(OSError, UserError):
            write_whole(entry, found)
    return found


@contextlib.contextmanager
def _lock(entry: Path) -> Iterator[None]:
    from asrllm.locks import FileLock  # importing it takes 25 ms

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, UserError):
            entry.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(f"{entry}.lock"))
        yield


def cache_folder() -> Path:
    """Return $XDG_CACHE_HOME/asrllm, by default ~/.cache/asrllm."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asrllm"


def pretrained_weight_files(path: str | Path) -> list[Path]:
    """Return the weight files of a pretrained model that its fingerprint covers.

    Args:
        path: a directory, a hub id, or a single file. In a directory, the first pattern that
            matches chooses the files.

    Raises:
        UserError: there are no weights.
    """
    folder = resolve_pretrained(path, file=True)
    if folder.is_file():
        return [folder]
    for pattern in WEIGHT_PATTERNS:
        files = sorted(folder.glob(pattern))
        if files:
            return files
    raise UserError(
        f"the pretrained model {str(path)!r} has no weights (none of "
        f"{', '.join(WEIGHT_PATTERNS)}). Download it again."
    )


def resolve_pretrained(
    path: str | Path, *, file: bool = False, what: str = "the pretrained model"
) -> Path:
    """Return the local path of a pretrained model.

    Args:
        path: a directory, or a hub id, whose snapshot is downloaded if the hub can be reached.
        file: whether `path` may also be a file.
        what: what the path is, as the beginning of messages.

    Raises:
        UserError: the path does not exist, or the download fails.
    """
    folder = Path(path).expanduser()
    if folder.is_dir() or (file and folder.is_file()):
        # Links are not resolved: the files in the hub's cache that they point to have other names,
        # hence other fingerprints.
        return folder.absolute()
    if file and folder.exists():
        check_file(folder, what)
    if folder.exists():
        raise UserError(f"{what} {str(path)!r} is not a directory. Give one.")
    if not is_hub_id(path):
        raise UserError(
            f"{what} {str(path)!r} does not exist. Give a directory, or a hub id like "
            "Qwen/Qwen2.5-7B-Instruct."
        )
    return _download(str(path), what)


def _download(hub_id: str, what: str) -> Path:
    """Return the local snapshot of a hub id, downloading it if the hub can be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, ignore_patterns=NOT_DOWNLOADED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{what} {hub_id!r} is not a directory, and it cannot be downloaded from the hub: "
            f"{first_words(error)}. Give a directory, or check the id and the connection."
        ) from error


def is_hub_id(path: str | Path) -> bool:
    """Return whether a path has the form of a hub id, owner/name."""
    text = str(path)
    return text.count("/") == 1 and not text.startswith(("/", ".", "~"))


def check_fingerprint(part: str, path: str | Path, expected: str) -> None:
    """Raise UserError unless the pretrained model at `path` is the one used in training."""
    found = fingerprint(path)
    if found != expected:
        shown = [text.removeprefix(HASH_PREFIX)[:12] for text in (found, expected)]
        raise UserError(
            f"the {part} at {str(path)!r} is not the one that this model was trained on: its "
            f"weights have the SHA-256 {shown[0]}..., expected {shown[1]}.... Give the one used in "
            f"training: {BASE_MODEL_KEYS[part]}=PATH."
        )
