"""wenet's data.list, in both its forms."""

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from asrllm.data.index import AUDIO_EXTENSIONS, tar_files
from asrllm.data.sources.files import ahead, audio_rows, count_lines, find_root, read_lines, sample_fields, take, take_number
from asrllm.data.sources.utterance import Stretch, Utterance
from asrllm.errors import UserError

WHAT = "the wenet list"


def read_wenet(path: str | Path) -> Iterator[Utterance]:
    """JSON lines of key, wav, txt, optionally start, end, lang, speaker; or the path of one tar of KEY.wav + KEY.txt a line.

    Relative paths start at the list, or at the current directory where the first files lie there.
    """
    path = Path(path)
    _, line = next(read_lines(path, WHAT))
    yield from _raw(path) if line.lstrip().startswith("{") else _tars(path)


def count_wenet(path: str | Path) -> int | None:
    try:
        with open(path, "rb") as file:
            return count_lines(path) if file.read(1) == b"{" else None
    except OSError:
        return None


def _raw(path: Path) -> Iterator[Utterance]:
    for where, row, file in audio_rows(path, WHAT, "wav"):
        start, end = take_number(row, where, "start"), take_number(row, where, "end")
        whole = start is None and end is None
        yield Utterance(
            key=take(row, where, "key"),
            text=take(row, where, "txt"),
            load=Stretch(file, start or 0.0, end),
            duration=take_number(row, where, "duration") if end is None else end - (start or 0.0),
            fields=sample_fields(row),
            file=file if whole else None,
        )


def _tars(path: Path) -> Iterator[Utterance]:
    first, rows = ahead(read_lines(path, WHAT))
    root = find_root([line.strip() for _, line in first], [path.parent, Path.cwd()])
    for number, line in rows:
        tar = root / line.strip()
        if not os.path.isfile(tar):
            raise UserError(f"{WHAT} {path}:{number} names {line.strip()!r}, which is no file on this machine: copy the tars to disk first")
        try:
            yield from _samples(tar)
        except tarfile.TarError as error:
            raise UserError(f"{WHAT} {path}:{number}: {str(tar)!r} cannot be read as a tar: {error}") from error


def _samples(path: Path) -> Iterator[Utterance]:
    """Audio and its transcript follow each other, as wenet writes them; the audio stays where it is until it is loaded."""
    with open(path, "rb") as tar:
        key = ""
        parts: dict[str, bytes | TarMember] = {}  # files of one key by suffix
        for info in tar_files(tar):
            stem, _, suffix = info.name.rpartition(".")
            if stem != key and parts:
                yield _sample(path, key, parts)
                parts = {}
            key = stem
            member = TarMember(path, info.offset_data, info.size)
            parts[suffix.lower()] = member().read() if suffix.lower() == "txt" else member
        if parts:
            yield _sample(path, key, parts)


def _sample(path: Path, key: str, parts: "dict[str, bytes | TarMember]") -> Utterance:
    text, audio = parts.get("txt"), next((parts[e] for e in AUDIO_EXTENSIONS if e in parts), None)
    if not isinstance(audio, TarMember):
        return Utterance(key=key, text="", problem=("missing_audio", f"{path} has no audio for {key!r}, only: {', '.join(parts)}"))
    if not isinstance(text, bytes):
        return Utterance(key=key, text="", problem=("no_transcript", f"{path} has no {key}.txt"))
    try:
        return Utterance(key=key, text=text.decode("utf-8"), load=Stretch(audio))
    except UnicodeDecodeError as error:
        return Utterance(key=key, text="", problem=("no_transcript", f"{key}.txt in {path} is not UTF-8 text: {error}"))


@dataclass(frozen=True)
class TarMember:
    """A file inside a tar: where its bytes lie."""

    path: Path
    offset: int
    size: int

    def __call__(self) -> BinaryIO:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))
