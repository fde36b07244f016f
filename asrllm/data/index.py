"""The index beside the shards: one row of 20 bytes an utterance, memory-mapped."""

import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile

from asrllm.config import read_json_object
from asrllm.errors import UserError

RATE = 16000  # Hz; every waveform reaches the model at this rate
ROW = np.dtype(
    [
        ("offset", "<u8"),  # of the sample's first tar header in the shard, in bytes
        ("size", "<u4"),  # from there to the end of its last member, in bytes
        ("samples", "<u4"),  # of the waveform at RATE
        ("shard", "<u2"),  # position in Index.shards
        ("text_bytes", "<u2"),  # of the transcript in UTF-8
    ]
)
AUDIO_EXTENSIONS = ("flac", "wav", "opus", "ogg", "mp3")


@dataclass(frozen=True, kw_only=True)
class Index:
    """rows: (utterances,) of ROW, memory-mapped; shards: the tars' paths."""

    rows: np.ndarray
    shards: list[Path]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def hours(self) -> float:
        return float(self.rows["samples"].sum(dtype=np.int64)) / RATE / 3600


def open_index(folder: str | Path) -> Index:
    """The index of a directory of shards. Raises UserError where it, or a shard that it names, is missing or has another size."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"the shard directory {str(folder)!r} does not exist: make it with 'asrllm shards make {folder} ...'")
    if not (folder / "index.json").is_file():
        raise UserError(f"{str(folder)!r} has no index.json: make one with 'asrllm shards index {folder}/*.tar'")
    about = read_json_object(folder / "index.json", "the index")
    try:
        return _open_index(folder, about)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"the index in {str(folder)!r} is damaged ({type(error).__name__}: {error}): make it again") from error


def _open_index(folder: Path, about: dict[str, Any]) -> Index:
    for name, size in zip(about["shards"], about["shard_bytes"], strict=True):
        path = folder / name
        if not path.is_file():
            raise UserError(f"the shard {str(path)!r} is missing: restore it, or index the directory again")
        if path.stat().st_size != size:
            raise UserError(f"the shard {str(path)!r} has {path.stat().st_size} bytes, its index says {size}: index it again")
    if not about["utterances"]:
        raise UserError(f"the shards in {str(folder)!r} hold no utterance: see rejected.jsonl there for the reasons")
    rows: np.ndarray = np.memmap(folder / "index.bin", ROW, "r", shape=(about["utterances"],))
    return Index(rows=rows, shards=[folder / name for name in about["shards"]])


def write_index(folder: Path, shards: Sequence[Path], *, advance: Callable[[], None] = lambda: None) -> Index:
    """Scan the tars and write `index.bin` and `index.json` into `folder`; the JSON comes last and makes the index valid.

    advance: called once a tar.
    """
    parts = []
    for number, path in enumerate(shards):
        rows = np.array([_row(sample, number) for sample in scan_tar(path)], ROW)
        parts.append(rows)
        advance()
    rows = np.concatenate(parts) if parts else np.empty(0, ROW)
    (folder / "index.json").unlink(missing_ok=True)  # from here on there is no index, until there is a whole one
    rows.tofile(folder / "index.bin")
    about = {
        "format": 1,
        "utterances": len(rows),
        "hours": round(float(rows["samples"].sum(dtype=np.int64)) / RATE / 3600, 4),
        "shards": [os.path.relpath(path, folder) for path in shards],
        "shard_bytes": [path.stat().st_size for path in shards],
    }
    partial = folder / "index.json.partial"
    partial.write_text(json.dumps(about, indent=1))
    partial.replace(folder / "index.json")
    return Index(rows=rows, shards=list(shards))


@dataclass(frozen=True, kw_only=True)
class TarSample:
    """One utterance as it lies in a tar: files that share a name up to the first dot."""

    key: str
    offset: int
    size: int
    audio: bytes
    fields: dict[str, Any]  # of KEY.json; KEY.txt stands as "text"


def scan_tar(path: Path) -> Iterator[TarSample]:
    """All samples of a tar, one at a time. Raises UserError for a broken tar or a sample without audio or text."""
    try:
        with open(path, "rb") as file:
            yield from iterate_tar(file, str(path))
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{str(path)!r} cannot be read as a tar: {error}") from error


def iterate_tar(file: BinaryIO, name: str) -> Iterator[TarSample]:
    """Samples of an open tar, or of the stretch of one that an index row names."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        members: list[tuple[tarfile.TarInfo, bytes]] = []
        for info in tar:
            if not info.isfile():
                continue
            if members and sample_key(members[0][0].name) != sample_key(info.name):
                yield _sample(members, name)
                members = []
            members.append((info, tar.extractfile(info).read()))  # type: ignore[union-attr]
        if members:
            yield _sample(members, name)


def sample_key(member: str) -> str:
    """WebDataset's rule: the member's path up to the first dot of its last part."""
    folder, _, base = member.rpartition("/")
    return (folder + "/" if folder else "") + base.partition(".")[0]


def _sample(members: list[tuple[tarfile.TarInfo, bytes]], name: str) -> TarSample:
    key = sample_key(members[0][0].name)
    files = {info.name.rpartition(".")[2].lower(): data for info, data in members}
    audio = next((files[e] for e in AUDIO_EXTENSIONS if e in files), None)
    if audio is None:
        raise UserError(f"sample {key!r} in {name!r} has no audio: expected one of {', '.join(AUDIO_EXTENSIONS)}")
    if "json" in files:
        try:
            fields = json.loads(files["json"])
        except ValueError as error:
            raise UserError(f"sample {key!r} in {name!r} has broken JSON: {error}") from error
    elif "txt" in files:
        fields = {"text": files["txt"].decode("utf-8", errors="replace").strip()}
    else:
        raise UserError(f"sample {key!r} in {name!r} has no transcript: expected {key}.json or {key}.txt")
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        raise UserError(f"sample {key!r} in {name!r} has no 'text' in its JSON: add the transcript there")
    last = members[-1][0]
    end = last.offset_data + -(-last.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return TarSample(key=key, offset=members[0][0].offset, size=end - members[0][0].offset, audio=audio, fields=fields)


def _row(sample: TarSample, shard: int) -> tuple[int, int, int, int, int]:
    duration = sample.fields.get("duration")
    if duration is None:
        try:
            info = soundfile.info(BytesIO(sample.audio))
        except RuntimeError as error:
            raise UserError(f"sample {sample.key!r} has unreadable audio: {error}: remove it from the tar") from error
        duration = info.frames / info.samplerate
    if not isinstance(duration, (int, float)) or not 0 < duration < 2**31 / RATE:
        raise UserError(f"sample {sample.key!r} has the duration {duration!r}: it must be seconds above 0")
    text_bytes = len(sample.fields["text"].encode("utf-8"))
    return sample.offset, sample.size, round(duration * RATE), shard, min(text_bytes, 65535)
