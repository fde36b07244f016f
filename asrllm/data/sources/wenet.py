"""wenet's data.list in both of its forms: JSON lines, and paths of tars."""

import io
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from asrllm.data.sources.files import (
    UNREADABLE,
    Row,
    audio_field,
    check_line_ends,
    count_lines,
    find_root,
    key_field,
    open_manifest,
    peek,
    read_lines,
    sample_fields,
    seconds_field,
    text_or_int_field,
)
from asrllm.data.sources.json_rows import read_json_manifest
from asrllm.data.sources.utterance import AudioSegment, RejectedError, Utterance
from asrllm.data.tars import explain_tar, tar_files
from asrllm.defaults import AUDIO_EXTENSIONS
from asrllm.errors import UserError
from asrllm.text_files import open_regular

ROLE = "the wenet list"


def read_wenet(path: str | Path) -> Iterator[Utterance]:
    """Yield the utterances of a wenet list.

    Each line is a JSON object with key, wav, txt, and optionally start, end, lang and speaker; or
    each line is the path of a tar of KEY.wav + KEY.txt. Relative paths start at the list's
    directory, or at the current directory if the first files are there.
    """
    path = Path(path)
    _, line = next(read_lines(path, ROLE, strict=False))
    if line.lstrip().startswith(("{", "[")):
        yield from read_json_manifest(path, ROLE, names=_names, make=_utterance)
    else:
        check_line_ends(line, path, ROLE)
        yield from _tar_utterances(path)


def count_wenet(path: str | Path) -> int | None:
    """Return the number of utterances of a list of JSON lines, or None for a list of tars."""
    try:
        with open_manifest(Path(path)) as file:
            is_json = file.read(1) == b"{"
    except UNREADABLE:
        return None
    return count_lines(path) if is_json else None


# --- JSON lines ---


def _names(row: Row, where: str) -> list[str]:
    return [audio_field(row, where, "wav")]


def _utterance(row: Row, where: str, root: Path) -> Utterance:
    file = root / audio_field(row, where, "wav")
    start = seconds_field(row, where, "start")
    end = seconds_field(row, where, "end")
    begin = start or 0.0
    if end is not None and end <= begin:
        raise RejectedError(
            "bad_field", f"{where}: 'end' is {end} s, which is not after 'start', {begin} s"
        )
    is_whole = start is None and end is None
    return Utterance(
        key=key_field(row, where, "key"),
        text=text_or_int_field(row, where, "txt"),
        load=AudioSegment(file, begin, end),
        duration=seconds_field(row, where, "duration") if end is None else end - begin,
        fields=sample_fields(row),
        file=file if is_whole else None,
    )


# --- tars ---


@dataclass(frozen=True)
class TarMember:
    """A function that opens a file inside a tar.

    Attributes:
        path: the tar.
        offset: start of the file's content in bytes.
        size: bytes.
    """

    path: Path
    offset: int
    size: int

    def __call__(self) -> BinaryIO:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))


def _tar_utterances(path: Path) -> Iterator[Utterance]:
    """Yield the utterances of all tars of a list."""
    first, rows = peek(read_lines(path, ROLE))
    names = [line.strip() for _, line in first]
    root = find_root(names, [path.parent, Path.cwd()])
    for number, line in rows:
        name = line.strip()
        tar = root / name
        if not os.path.isfile(tar):
            raise UserError(
                f"{ROLE} {path}:{number} names {name!r}, which is not a file on this machine. "
                "Copy the tars to a local disk."
            )
        try:
            yield from _samples(tar)
        except tarfile.TarError as error:
            raise UserError(f"{ROLE} {path}:{number}: {explain_tar(tar, error)}") from error


def _samples(path: Path) -> Iterator[Utterance]:
    """Yield the utterances of a tar.

    An audio file and its transcript follow each other, as wenet writes them. Audio is read only
    when it is loaded.
    """
    with open_regular(path, "the tar") as tar:
        key = ""
        parts: dict[str, bytes | TarMember] = {}  # files of one key by suffix
        for info in tar_files(tar):
            stem, _, suffix = info.name.rpartition(".")
            if stem != key and parts:
                yield _shard_utterance(path, key, parts)
                parts = {}
            key = stem
            member = TarMember(path, info.offset_data, info.size)
            if suffix.lower() == "txt":
                parts["txt"] = member().read()
            else:
                parts[suffix.lower()] = member
        if parts:
            yield _shard_utterance(path, key, parts)


def _shard_utterance(
    path: Path,
    key: str,
    parts: Mapping[str, bytes | TarMember],
) -> Utterance:
    audio = next((parts[e] for e in AUDIO_EXTENSIONS if e in parts), None)
    text = parts.get("txt")
    if not isinstance(audio, TarMember):
        detail = f"{path} has no audio for {key!r}, only: {', '.join(parts)}"
        return Utterance(
            key=key,
            text="",
            problem=("missing_audio", detail),
        )
    if not isinstance(text, bytes):
        detail = f"{path} has no {key}.txt"
        return Utterance(
            key=key,
            text="",
            problem=("no_transcript", detail),
        )
    try:
        return Utterance(
            key=key,
            text=text.decode("utf-8-sig"),
            load=AudioSegment(audio),
        )
    except UnicodeDecodeError as error:
        detail = f"{key}.txt in {path} is not UTF-8 text: {error}"
        return Utterance(
            key=key,
            text="",
            problem=("no_transcript", detail),
        )
