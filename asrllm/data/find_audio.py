"""Find the audio files of a directory."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from asrllm.data.audio_file import FORMATS
from asrllm.defaults import AUDIO_EXTENSIONS
from asrllm.errors import UserError

SHOWN_SKIPPED = 5  # names of skipped files in a warning
NO_AUDIO = "have no audio extension or are FIFOs"
logger = logging.getLogger(__name__)


def find_audio(paths: Sequence[str]) -> list[str]:
    """Replace directories by the audio files below them, sorted, and warn of skipped files.

    Raises:
        UserError: a directory has no audio file.
    """
    files: list[str] = []
    for path in paths:
        if not os.path.isdir(path):
            files.append(path)
            continue
        found, skipped = list_audio(path)
        if not found:
            raise UserError(
                f"the directory {path!r} has no audio file ({', '.join(FORMATS)}, m4a, mp4, ...). "
                "Choose another one."
            )
        warn_of_skipped(path, skipped)
        files += sorted(map(str, found))
    return files


def list_audio(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """List the files below a directory.

    Returns:
        The audio files, and the files that are neither audio nor belong to an audio file of the
        same name. Hidden files, for example the ._ files of macOS, are in neither list.
    """
    audio: list[Path] = []
    others: list[Path] = []
    visited = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        visited.add(os.path.realpath(parent))
        new = [name for name in folders if os.path.realpath(Path(parent, name)) not in visited]
        folders[:] = sorted(new)
        paths = [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
        found = [path for path in paths if has_audio_extension(path.name) and not path.is_fifo()]
        stems = {path.stem for path in found}
        audio += found
        others += [path for path in paths if path.stem not in stems]
    return audio, others


def has_audio_extension(name: str) -> bool:
    """Return whether a file name has the extension of an audio format."""
    return name.rpartition(".")[2].lower() in AUDIO_EXTENSIONS


def warn_of_skipped(folder: str | Path, skipped: Sequence[Path], reason: str = NO_AUDIO) -> None:
    """Warn of the files of a directory that are skipped.

    Args:
        folder: the directory.
        skipped: paths of files in it.
        reason: the end of "Skipped N files in FOLDER that ...".
    """
    if not skipped:
        return
    names = ", ".join(str(path.relative_to(folder)) for path in skipped[:SHOWN_SKIPPED])
    more = ", ..." if len(skipped) > SHOWN_SKIPPED else ""
    logger.warning(
        "Skipped %d files in %s that %s: %s%s", len(skipped), folder, reason, names, more
    )
