"""Fingerprints of pretrained models: another base under trained adapters gives wrong text and no error, so it is refused."""

import hashlib
from pathlib import Path

from asrllm.errors import UserError

BLOCKS, BLOCK_SIZE = 64, 1 << 16
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "*.pt", "*.pth")


def fingerprint(path: str | Path) -> str:
    """SHA-256 over the weight files' names, sizes and 64 blocks of 64 KiB spread over each: milliseconds for any size."""
    digest = hashlib.sha256()
    for file in weight_files(path):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as data:
            for i in range(BLOCKS):
                data.seek(max(0, size - BLOCK_SIZE) * i // (BLOCKS - 1))
                digest.update(data.read(BLOCK_SIZE))
    return digest.hexdigest()


def weight_files(path: str | Path) -> list[Path]:
    """The weight files of a pretrained model's directory, the first kind that is there; or the one file given."""
    folder = resolve_pretrained(path, file=True)
    if folder.is_file():
        return [folder]
    for pattern in WEIGHT_FILES:
        if files := sorted(folder.glob(pattern)):
            return files
    raise UserError(f"the pretrained model {str(path)!r} has no weights (none of {', '.join(WEIGHT_FILES)}): download it again")


def resolve_pretrained(path: str | Path, *, file: bool = False) -> Path:
    """A directory, or with `file` a file, by its absolute path; a hub id as its local snapshot, downloaded where a hub is reached."""
    folder = Path(path).expanduser()
    if folder.is_dir() or (file and folder.is_file()):
        return folder.absolute()  # links are kept: what the hub's cache links to has other names, hence other fingerprints
    if not is_hub_id(path):
        raise UserError(f"the pretrained model {str(path)!r} does not exist: give a directory or a hub id such as Qwen/Qwen2.5-7B-Instruct")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), ignore_patterns=["*.gguf", "*.onnx", "*.msgpack", "*.h5"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"the pretrained model {str(path)!r} is no directory and could not be fetched from the hub: {said}") from error


def is_hub_id(path: str | Path) -> bool:
    return str(path).count("/") == 1 and not str(path).startswith(("/", ".", "~"))


def check_fingerprint(part: str, path: str | Path, expected: str) -> None:
    """Raises UserError where the pretrained model at `path` is not the one that training used."""
    found = fingerprint(path)
    if found != expected:
        raise UserError(
            f"the {part} at {str(path)!r} is not the one that this model was trained on "
            f"(fingerprint {found[:12]}, expected {expected[:12]}): give the directory used in training"
        )
