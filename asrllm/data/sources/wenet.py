"""wenet's data.list, in both its forms."""

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from asrllm.data.index import explain_tar, tar_files
from asrllm.data.sources.files import (
    Row,
    ahead,
    count_lines,
    find_root,
    read_lines,
    sample_fields,
    take,
    take_number,
    take_words,
    utterances,
)
from asrllm.data.sources.utterance import RejectedError, Stretch, Utterance
from asrllm.defaults import AUDIO_EXTENSIONS
from asrllm.errors import UserError

WHAT = "the wenet list"


def read_wenet(path: str | Path) -> Iterator[Utterance]:
    """JSON lines of key, wav, txt, optionally start, end, lang, speaker; or the path of one tar of KEY.wav + KEY.txt a line.

    Relative paths start at the list, or at the current directory where the first files lie there.
    """
    path = Path(path)
    _, line = next(read_lines(path, WHAT, strict=False))
    yield from _raw(path) if line.lstrip().startswith("{") else _tars(path)


def count_wenet(path: str | Path) -> int | None:
    try:
        with open(path, "rb") as file:
            return count_lines(path) if file.read(1) == b"{" else None
    except OSError:
        return None


def _raw(path: Path) -> Iterator[Utterance]:
    yield from utterances(path, WHAT, names=_names, make=_utterance)


def _names(row: Row, where: str) -> list[str]:
    return [take(row, where, "wav")]


def _utterance(row: Row, where: str, root: Path) -> Utterance:
    file = root / take(row, where, "wav")
    start, end = take_number(row, where, "start"), take_number(row, where, "end")
    if end is not None and end <= (start or 0.0):
        raise RejectedError(
            "bad_field",
            f"{where} lasts from {start or 0.0} to {end} s: the end must lie after the start",
        )
    whole = start is None and end is None
    return Utterance(
        key=take_words(row, where, "key"),
        text=take_words(row, where, "txt"),
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
            raise UserError(
                f"{WHAT} {path}:{number} names {line.strip()!r}, which is no file on this machine: copy the tars to disk first"
            )
        try:
            yield from _samples(tar)
        except tarfile.TarError as error:
            raise UserError(f"{WHAT} {path}:{number}: {explain_tar(tar, error)}") from error


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
        return Utterance(
            key=key,
            text="",
            problem=("missing_audio", f"{path} has no audio for {key!r}, only: {', '.join(parts)}"),
        )
    if not isinstance(text, bytes):
        return Utterance(key=key, text="", problem=("no_transcript", f"{path} has no {key}.txt"))
    try:
        return Utterance(key=key, text=text.decode("utf-8-sig"), load=Stretch(audio))
    except UnicodeDecodeError as error:
        return Utterance(
            key=key,
            text="",
            problem=("no_transcript", f"{key}.txt in {path} is not UTF-8 text: {error}"),
        )


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
