"""The index of a directory of shards, and the reading of tars.

`index.bin` has one row of 24 bytes per utterance and is memory-mapped. `index.json` describes the
tars and the corpus.
"""

import hashlib
import itertools
import json
import math
import os
import tarfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from asrllm.data.audio_files import check_end, open_audio, read_blocks
from asrllm.data.storage import (
    RemoteFile,
    check_scheme,
    is_url,
    join_url,
    read_bytes,
    remote_sizes,
)
from asrllm.defaults import AUDIO_EXTENSIONS, RATE
from asrllm.errors import UserError
from asrllm.integrity import file_sha256
from asrllm.text_files import (
    check_link,
    check_no_pointer,
    open_regular,
    parse_json,
    read_json_object,
)

if TYPE_CHECKING:
    from asrllm.data.cache import ShardCache

Fields = dict[str, Any]  # a JSON object
Tallies = dict[str, dict[str, list[float]]]

FORMAT = 3
BLOCK = tarfile.BLOCKSIZE  # bytes; members of a tar begin at multiples of it
ROW = np.dtype(
    [
        ("offset", "<u4"),  # place of the sample's first tar header in the shard, in blocks
        ("size", "<u4"),  # from there to the end of its last member, in blocks
        ("samples", "<u4"),  # length of the waveform at RATE
        ("shard", "<u4"),  # position in Index.shards
        ("text_bytes", "<u2"),  # length of the transcript in UTF-8
        ("text_chars", "<u2"),
        ("crc32", "<u4"),  # checksum of the sample's bytes in the shard, with headers and padding
    ]
)
MAX_DURATION_ERROR = 0.1  # seconds between the stated duration and that of the audio
MAX_SAMPLES = np.iinfo(np.uint32).max  # samples of an utterance
MAX_TEXT_LENGTH = 65535  # bytes and characters; longer texts are counted as this
MAX_HEADER = 1 << 20  # bytes of an extended header of a tar, which holds a name
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
TEXT_FIELDS = ("lang", "task", "prompt")
SHOWN_FIELD = 200  # characters of a problem with a field
TALLIED = ("corpus", "lang", "speaker")


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What the index stores about one tar.

    Attributes:
        name: a file name relative to the index, an absolute path or a URL.
        size: bytes.
        sha256: checksum in hexadecimal.
        rows: (utterances,) of ROW, in the tar's order.
        tallies: {"corpus" | "lang" | "speaker": {value: [utterances, seconds]}}. The value of
            samples without the field is "".
    """

    name: str
    size: int
    sha256: str
    rows: np.ndarray
    tallies: Tallies


@dataclass(frozen=True, kw_only=True)
class Index:
    """An open index.

    Attributes:
        rows: (utterances,) of ROW, memory-mapped.
        shards: paths or URLs of the tars.
        starts: (shards + 1,) first row of each shard, and the number of rows.
        sizes: bytes of each tar.
        sha256: checksum of each tar in hexadecimal.
        about: the entries of index.json on the whole index: corpora, languages, speakers.
    """

    rows: np.ndarray
    shards: list[str]
    starts: np.ndarray
    sizes: list[int] = field(default_factory=list)
    sha256: list[str] = field(default_factory=list)
    about: Fields = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def hours(self) -> float:
        """Hours of audio."""
        return _hours(self.rows)

    def file(self, shard: int) -> RemoteFile:
        """Return the location, size and checksum of a tar."""
        return RemoteFile(
            url=self.shards[shard],
            size=self.sizes[shard],
            sha256=self.sha256[shard],
        )


def _hours(rows: np.ndarray) -> float:
    return float(rows["samples"].sum(dtype=np.int64)) / RATE / 3600


# --- opening ---


def open_index(folder: str | Path, cache: "ShardCache | None" = None) -> Index:
    """Open the index of a directory of shards.

    Args:
        folder: a local directory, or a URL.
        cache: stores the `index.bin` of a URL; required for URLs.

    Raises:
        UserError: the index or one of its shards is missing, or has the wrong size.
    """
    where = str(folder)
    about, rows_file = _open_remote(where, cache) if is_url(where) else _open_local(Path(folder))
    try:
        index = _open_index(where, about, rows_file)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(
            f"the index in {where!r} is corrupted ({type(error).__name__}: {error}). "
            "Copy it again, or make a new one with 'asrllm shards index'."
        ) from error
    _check_shards(index)
    return index


def _open_local(folder: Path) -> tuple[Fields, Path]:
    """Return the content of index.json, and the path of index.bin."""
    check_index_exists(folder)
    return read_json_object(folder / "index.json", "the index"), folder / "index.bin"


def check_index_exists(folder: Path) -> None:
    """Raise UserError if a path is not a directory with an index."""
    if folder.name in ("index.json", "index.bin") and folder.exists():
        raise UserError(
            f"{str(folder)!r} is a file of an index. Use the directory {str(folder.parent)!r}."
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(
            f"{str(folder)!r} is not a directory of shards. Use the directory that contains it. If "
            f"that has no index.json, make one with 'asrllm shards index {folder}'."
        )
    check_link(folder)
    if not folder.is_dir():
        raise UserError(
            f"the shard directory {str(folder)!r} does not exist. "
            f"Make it with 'asrllm shards make {folder} ...'."
        )
    if not (folder / "index.json").exists():
        raise UserError(
            f"{str(folder)!r} has no index.json. "
            f"Make one with 'asrllm shards index {folder}/*.tar'."
        )


def _open_remote(url: str, cache: "ShardCache | None") -> tuple[Fields, Path]:
    """Return the content of index.json, and the local copy of index.bin."""
    if cache is None:
        raise UserError(
            f"{url!r} is a URL, which is not supported here. "
            "Copy its index.json and index.bin to a local directory, and use that."
        )
    text = read_bytes(join_url(url, "index.json"))
    try:
        about = parse_json(text)
        file = RemoteFile(
            url=join_url(url, "index.bin"),
            size=about["utterances"] * ROW.itemsize,
            sha256=about["rows_sha256"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the index.json in {url!r} is corrupted ({type(error).__name__}: {error}). "
            "Make the index again."
        ) from error
    return about, cache.fetch(file)


def _open_index(where: str, about: Fields, rows_file: Path) -> Index:
    count = _check_about(where, about)
    shards = about["shards"]
    check_no_pointer(rows_file)
    size = rows_file.stat().st_size
    if size != count * ROW.itemsize:
        raise ValueError(f"index.bin has {size} bytes for {count} utterances")
    # the cache has verified the index.bin of a URL
    if not is_url(where) and file_sha256(rows_file) != about["rows_sha256"]:
        raise ValueError("index.bin does not match its sha256 in index.json")
    rows: np.ndarray = np.memmap(rows_file, ROW, "r", shape=(count,))
    starts = np.cumsum([0] + [shard["utterances"] for shard in shards])
    if starts[-1] != count:
        raise ValueError(f"its shards have {starts[-1]} utterances, not {count}")
    sizes = [shard["bytes"] for shard in shards]
    _check_rows(rows, starts, sizes)
    return Index(
        rows=rows,
        shards=[_shard_location(where, shard["name"]) for shard in shards],
        starts=starts,
        sizes=sizes,
        sha256=[shard["sha256"] for shard in shards],
        about={key: value for key, value in about.items() if key != "shards"},
    )


def _check_about(where: str, about: Fields) -> int:
    """Check the format and checksum of an index.json, and return its number of utterances."""
    if about["format"] != FORMAT:
        raise UserError(
            f"the index in {where!r} has format {about['format']!r}, but this version reads "
            f"format {FORMAT}. Make a new one with 'asrllm shards index'."
        )
    if about.get("sha256") != _about_sha256(about):
        raise ValueError("index.json does not match its own sha256")
    count = about["utterances"]
    if not count:
        raise UserError(
            f"the shards in {where!r} have no utterance. See rejected.jsonl there for the reasons."
        )
    return count


def _check_rows(
    rows: np.ndarray,
    starts: np.ndarray,
    sizes: Sequence[int],
) -> None:
    """Raise ValueError if a row refers to bytes outside its shard."""
    for number, size in enumerate(sizes):
        part = rows[starts[number] : starts[number + 1]]
        ends = part["offset"].astype(np.int64) + part["size"]
        is_beyond_end = ends.max(initial=0) * BLOCK > size + BLOCK
        if is_beyond_end or (part["shard"] != number).any():
            raise ValueError(f"rows of shard {number} are outside that shard")


def _about_sha256(about: Mapping[str, Any]) -> str:
    """Return the SHA-256 of an index.json, without the entry that holds it."""
    content = {key: value for key, value in about.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _shard_location(where: str, name: str) -> str:
    """Return the path or URL of a shard that the index at `where` names.

    An index may come from somebody else. It may therefore name only files below its own directory,
    and URLs that are not local files.
    """
    if is_url(name) and not name.lower().startswith("file:"):
        check_scheme(name)
        return name
    if is_url(name) or os.path.isabs(name) or ".." in Path(name).parts:
        raise UserError(
            f"the index in {where!r} names {name!r}, which is outside its directory. "
            "Index the tars again with 'asrllm shards index'."
        )
    if is_url(where):
        return join_url(where, name)
    return os.path.join(where, name)


def _check_shards(index: Index) -> None:
    """Check that every tar exists with its size, rather than fail in the middle of an epoch.

    Raises:
        UserError: a tar is missing, or has another size.
    """
    remote = _remote_sizes(index.shards)
    for name, expected in zip(index.shards, index.sizes, strict=True):
        size = remote.get(name, expected) if is_url(name) else _local_size(name)
        if size is None:
            raise UserError(
                f"the shard {name!r} does not exist. Restore it, or index the directory again."
            )
        if size != expected:
            if not is_url(name):
                check_no_pointer(name)
            state = "is truncated" if size < expected else "has changed"
            raise UserError(
                f"the shard {name!r} {state}: it has {size} bytes, but its index says {expected}. "
                "Copy the shard again, or index it again if it was changed on purpose."
            )


def _remote_sizes(names: Sequence[str]) -> dict[str, int | None]:
    """Return the sizes of the shards at URLs.

    Only rank 0 requests them: shards times ranks would be millions of requests.
    """
    if os.environ.get("RANK", "0") != "0":
        return {}
    remote = [name for name in names if is_url(name)]
    if not remote:
        return {}
    return dict(zip(remote, remote_sizes(remote), strict=True))


def _local_size(name: str) -> int | None:
    try:
        return os.stat(name).st_size
    except FileNotFoundError:
        return None


# --- writing ---


def write_index(folder: Path, records: Sequence[ShardRecord]) -> Index:
    """Write `index.bin` and `index.json`.

    The JSON is written last and makes the index valid.

    Args:
        folder: the directory of the index.
        records: the tars. Their rows receive their shard numbers.
    """
    for number, record in enumerate(records):
        record.rows["shard"] = number
    rows = np.concatenate([record.rows for record in records]) if records else np.empty(0, ROW)
    about = _describe(rows, records)
    # until the new index.json is complete there is no index
    (folder / "index.json").unlink(missing_ok=True)
    # readers of an older index.bin keep their file
    partial = folder / "index.bin.partial"
    rows.tofile(partial)
    partial.replace(folder / "index.bin")
    partial = folder / "index.json.partial"
    partial.write_text(json.dumps(about, ensure_ascii=False, indent=1), encoding="utf-8")
    partial.replace(folder / "index.json")
    if not len(rows):
        return Index(rows=rows, shards=[], starts=np.zeros(1, int))
    return _open_index(str(folder), about, folder / "index.bin")


def _describe(rows: np.ndarray, records: Sequence[ShardRecord]) -> Fields:
    """Return the content of index.json."""
    tallies = merge_tallies([record.tallies for record in records])
    shards = [
        {
            "name": record.name,
            "bytes": record.size,
            "sha256": record.sha256,
            "utterances": len(record.rows),
        }
        for record in records
    ]
    about: Fields = {
        "format": FORMAT,
        "utterances": len(rows),
        "hours": round(_hours(rows), 4),
        "rows_sha256": hashlib.sha256(rows.tobytes()).hexdigest(),
        "corpora": _in_hours(tallies["corpus"]),
        "languages": _in_hours(tallies["lang"]),
        "speakers": len(tallies["speaker"].keys() - {""}),
        "shards": shards,
    }
    about["sha256"] = _about_sha256(about)
    return about


def merge_tallies(parts: Sequence[Mapping[str, Mapping[str, Sequence[float]]]]) -> Tallies:
    """Add up the utterances and seconds of several tallies. See ShardRecord.tallies."""
    merged: Tallies = {name: {} for name in TALLIED}
    for part in parts:
        for name, counts in part.items():
            for value, (utterances, seconds) in counts.items():
                entry = merged[name].setdefault(value, [0, 0.0])
                entry[0] += utterances
                entry[1] += seconds
    return merged


def _in_hours(tally: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    return {
        value: {"utterances": int(utterances), "hours": round(seconds / 3600, 4)}
        for value, (utterances, seconds) in sorted(tally.items())
    }


# --- reading tars ---


@dataclass(frozen=True, kw_only=True)
class TarSample:
    """One utterance in a tar: the files whose names agree up to the first dot.

    Attributes:
        key: the common part of the names.
        offset: first header, in blocks.
        size: length including padding, in blocks.
        audio: content of the audio file.
        extension: extension of the audio file.
        fields: content of KEY.json. The content of KEY.txt is "text".
    """

    key: str
    offset: int
    size: int
    audio: bytes
    extension: str
    fields: Fields


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A sample that cannot be used.

    Attributes:
        key: its key.
        reason: a word to count by.
        detail: the problem in plain words.
    """

    key: str
    reason: str
    detail: str


def scan_shard(
    path: Path, *, name: str, skip: Collection[str] = ()
) -> tuple[ShardRecord, list[BadSample], list[str]]:
    """Read all samples of a local tar.

    Args:
        path: the tar.
        name: its name in the index.
        skip: keys that other tars contain.

    Returns:
        The record of the tar, its unusable samples, and the keys of its usable samples.

    Raises:
        UserError: the file is not a tar.
    """
    rows: list[tuple[int, ...]] = []
    bad: list[BadSample] = []
    labels: list[dict[str, str]] = []  # values to tally, per sample
    keys: dict[str, None] = {}
    for sample in scan_tar(path):
        if sample.key in keys or sample.key in skip:
            detail = f"{sample.key!r} occurs in the tars more than once"
            bad.append(
                BadSample(
                    key=sample.key,
                    reason="duplicate_key",
                    detail=detail,
                )
            )
        elif isinstance(sample, BadSample):
            bad.append(sample)
        elif isinstance(row := _row(sample), BadSample):
            bad.append(row)
        else:
            keys[sample.key] = None
            rows.append(row)
            labels.append({tally: str(sample.fields.get(tally) or "") for tally in TALLIED})
    table = np.array(rows, ROW)
    _add_checksums(path, table)
    record = ShardRecord(
        name=name,
        size=path.stat().st_size,
        sha256=file_sha256(path),
        rows=table,
        tallies=_tally(labels, (table["samples"] / RATE).tolist()),
    )
    return record, bad, list(keys)


def _tally(labels: Sequence[Mapping[str, str]], seconds: Sequence[float]) -> Tallies:
    """Count the utterances and seconds of each value of each label."""
    parts = []
    for values, duration in zip(labels, seconds, strict=True):
        parts.append({label: {value: [1, duration]} for label, value in values.items()})
    return merge_tallies(parts)


def _add_checksums(path: Path, rows: np.ndarray) -> None:
    with open(path, "rb") as file:
        for row in rows:
            file.seek(int(row["offset"]) * BLOCK)
            row["crc32"] = zlib.crc32(file.read(int(row["size"]) * BLOCK))


def scan_tar(path: str | Path) -> Iterator[TarSample | BadSample]:
    """Yield all samples of a local tar.

    Raises:
        UserError: the tar is corrupted.
    """
    try:
        with open_regular(path, "the tar") as file:
            yield from iterate_tar(file)
    except (tarfile.TarError, OSError) as error:
        raise UserError(explain_tar(Path(path), error)) from error


def explain_tar(path: Path, error: Exception) -> str:
    """Return the message for a file that is not a tar, with a fix if it is compressed."""
    try:
        with open(path, "rb") as file:
            start = file.read(6)
    except OSError:
        start = b""
    for magic, program in COMPRESSED.items():
        if start.startswith(magic):
            return (
                f"{str(path)!r} is compressed, which prevents random access to its samples. "
                f"Unpack it with '{program} -d', and use the tar."
            )
    problem = f"{str(path)!r} cannot be read as a tar: {str(error).rstrip('.')}."
    if isinstance(error, DataAfterEndError):
        return (
            f"{problem} If several tars were joined with 'cat', use them one by one, or join them "
            "with 'tar --concatenate'. Otherwise copy the tar again."
        )
    return f"{problem} Copy it again, or make it again."


class DataAfterEndError(tarfile.ReadError):
    """A tar has data after its end mark, which readers of tars ignore."""


class Member(NamedTuple):
    """A file in a tar.

    Attributes:
        name: its path in the tar.
        start: offset of its first header in bytes.
        end: end of its content in bytes.
        data: its content.
    """

    name: str
    start: int
    end: int
    data: bytes


def iterate_tar(file: BinaryIO) -> Iterator[TarSample | BadSample]:
    """Yield the samples of an open tar. Memory is bounded by the tar's own size.

    Raises:
        tarfile.TarError: the tar is truncated or corrupted, or contains a sparse file.
    """
    members = _members(file)
    for _, group in itertools.groupby(members, key=lambda member: sample_key(member.name)):
        yield _sample(list(group))


def iterate_rows(content: bytes) -> Iterator[TarSample | BadSample]:
    """Yield the samples in the bytes of a tar that index rows refer to.

    Raises:
        tarfile.TarError: the bytes are truncated or corrupted, or contain a sparse file.
    """
    end_mark = bytes(BLOCK)
    yield from iterate_tar(BytesIO(content + end_mark))


def _members(file: BinaryIO) -> Iterator[Member]:
    for info in tar_files(file):
        file.seek(info.offset_data)
        end = info.offset_data + info.size
        if is_sample_file(info.name):
            yield Member(info.name, info.offset, end, file.read(info.size))


def is_sample_file(member: str) -> bool:
    """Return whether WebDataset reads a member; it skips README, ._a.wav and __meta__.json."""
    key, dot, _ = member.rpartition("/")[2].partition(".")
    return bool(key and dot) and not (key.startswith("__") and key.endswith("__"))


def tar_files(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of an open tar. Their sizes are checked against that of the tar.

    Raises:
        tarfile.TarError: the tar is truncated or corrupted, or contains a sparse file.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    headers = _Headers(file)
    try:
        with tarfile.open(fileobj=headers, mode="r:") as tar:  # type: ignore[call-overload]
            yield from _checked_files(tar, size)
            _check_end(file, tar.offset)
    except (ValueError, ArithmeticError, LookupError, RecursionError) as error:
        # tarfile's parsers of extended headers raise these
        raise tarfile.ReadError(
            f"a header is corrupted ({type(error).__name__}: {error})"
        ) from error


def _check_end(file: BinaryIO, end: int) -> None:
    """Check that only zeros follow the last member of a tar, however many they are.

    Args:
        file: the tar.
        end: the byte after the last member, where tarfile stopped reading.

    Raises:
        tarfile.TarError: a header is corrupted, the end mark is missing, or there is data after it.
    """
    file.seek(end)
    block = file.read(BLOCK)
    if len(block) < BLOCK:  # tarfile accepts this, and so a tar that was cut between two members
        raise tarfile.ReadError("the end mark is missing, so it may be truncated")
    if any(block):  # tarfile treats a corrupted header as the end of the tar
        raise tarfile.ReadError(f"the header at byte {end} is corrupted")
    while chunk := file.read(MAX_HEADER):
        begin = len(chunk) - len(chunk.lstrip(b"\0"))
        if begin < len(chunk):
            place = file.tell() - len(chunk) + begin
            raise DataAfterEndError(f"there is data at byte {place}, after the tar's end mark")


def check_tar_end(path: Path) -> str:
    """Return what is wrong with the headers or the end of a local tar, or ""."""
    try:
        with open_regular(path, "the tar") as file:
            for _ in tar_files(file):
                pass
    except tarfile.TarError as error:
        return str(error)
    return ""


def _checked_files(tar: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of a tar of `size` bytes.

    Raises:
        tarfile.TarError: a file is sparse, overlaps the one before it, or exceeds the tar.
    """
    end = 0
    for info in tar:
        # tarfile would hold all headers, of which a shard can have millions
        tar.members.clear()  # type: ignore[attr-defined]
        if info.issparse():
            raise tarfile.ReadError(f"{info.name!r} is a sparse file")
        if not info.isfile():
            continue
        if info.offset < end or info.size < 0 or info.offset_data + info.size > size:
            raise tarfile.ReadError(f"{info.name!r} is truncated, or its header is corrupted")
        end = info.offset_data + info.size
        yield info


class _Headers:
    """A tar as `tarfile` may read it: headers of at most MAX_HEADER bytes, and no content."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.seek = file.seek
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header has {size} bytes")
        return self.file.read(size)


def read_sample(content: bytes) -> TarSample:
    """Return the sample in the bytes of a tar that an index row refers to.

    Raises:
        ValueError: the bytes are not exactly one usable sample.
    """
    members = _plain_members(content)
    (sample,) = iterate_rows(content) if members is None else [_sample(members)]
    if isinstance(sample, BadSample):
        raise ValueError(f"{sample.key}: {sample.reason}: {sample.detail}")
    return sample


def _plain_members(content: bytes) -> list[Member] | None:
    """Return the files of one sample, or None unless all headers are plain and intact.

    It takes a tenth of tarfile's time.
    """
    members: list[Member] = []
    at = 0
    while at < len(content):
        header = content[at : at + BLOCK]
        if not _is_plain(header):
            return None
        try:
            # octal digits, which a twelfth byte ends
            size = int(header[124:135], 8)
            name = header[:100].rstrip(b"\0").decode()
        except ValueError:
            return None
        begin = at + BLOCK
        if begin + size > len(content):
            return None
        members.append(Member(name, at, begin + size, content[begin : begin + size]))
        at = begin + -(-size // BLOCK) * BLOCK
    keys = {sample_key(member.name) for member in members}
    return members if len(keys) == 1 else None


def _is_plain(header: bytes) -> bool:
    """Return whether a header is that of a regular file whose name fits into 100 bytes."""
    if len(header) < BLOCK:
        return False
    has_prefix = header[345] != 0  # the first part of a longer name
    # The type of a regular file is "0", or NUL in old tars.
    return header[257:262] == b"ustar" and header[156] in b"0\0" and not has_prefix


def sample_key(member: str) -> str:
    """Return the key of a member: its path up to the first dot of its last part (WebDataset)."""
    folder, _, base = member.rpartition("/")
    return (folder + "/" if folder else "") + base.partition(".")[0]


def _sample(members: Sequence[Member]) -> TarSample | BadSample:
    key = sample_key(members[0].name)
    files = {member.name.rpartition(".")[2].lower(): member.data for member in members}
    if len(files) < len(members):
        names = ", ".join(member.name for member in members[:4])
        detail = f"several files of one type have this key, which ends at the first dot: {names}"
        return BadSample(key=key, reason="repeated_file", detail=detail)
    extension = next((e for e in AUDIO_EXTENSIONS if e in files), None)
    if extension is None:
        detail = f"expected one of {', '.join(AUDIO_EXTENSIONS)}, found {', '.join(files)}"
        return BadSample(key=key, reason="no_audio", detail=detail)
    if not key.isprintable():
        detail = f"{key!r} has characters that cannot be printed"
        return BadSample(key=key, reason="bad_key", detail=detail)
    try:
        fields = _sample_fields(files)
    except ValueError as error:  # not JSON or not UTF-8
        return BadSample(
            key=key,
            reason="broken_transcript",
            detail=str(error),
        )
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        detail = f"expected {key}.txt, or {key}.json with 'text'"
        return BadSample(key=key, reason="no_transcript", detail=detail)
    if problem := field_problem(fields):
        return BadSample(key=key, reason="bad_field", detail=problem)
    offset = members[0].start // BLOCK
    end = -(-members[-1].end // BLOCK)
    return TarSample(
        key=key,
        offset=offset,
        size=end - offset,
        audio=files[extension],
        extension=extension,
        fields=fields,
    )


def field_problem(fields: Mapping[str, object]) -> str:
    """Return which field of a sample's JSON has a type that training cannot use, or ""."""
    for name in TEXT_FIELDS:
        value = fields.get(name)
        if value is not None and not isinstance(value, str):
            return f"{name!r} is {value!r}, not a string"[:SHOWN_FIELD]
    words = fields.get("hotwords") or []
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return f"'hotwords' is {words!r}, not a list of strings"[:SHOWN_FIELD]
    return ""


def nul_problem(fields: Mapping[str, object]) -> str:
    """Return which text of a sample's JSON has a NUL character, or "".

    A NUL is the sign of a damaged file or of UTF-16. Tokenizers and scoring tools written in C end
    a text there. Other control characters are ignored in scoring.
    """
    for name in ("text", *TEXT_FIELDS, "hotwords"):
        value = fields.get(name)
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(text, str) and "\0" in text for text in texts):
            return f"{name!r} has a NUL character: {value!r}"[:SHOWN_FIELD]
    return ""


def _sample_fields(files: Mapping[str, bytes]) -> Any:
    """Return the JSON value of a sample, with the text of its .txt file if it has none.

    Args:
        files: contents of the sample's files by extension.

    Raises:
        ValueError: a file is not valid JSON or UTF-8.
    """
    content = files.get("json")
    fields = {} if content is None else parse_json(content)
    if content is not None and b"\\ud" in content.lower():
        # may be half of a surrogate pair, which cannot be encoded
        json.dumps(fields, ensure_ascii=False).encode()
    if isinstance(fields, dict) and "text" not in fields and "txt" in files:
        fields["text"] = files["txt"].decode("utf-8-sig").strip()
    return fields


def _duration(sample: TarSample) -> float:
    """Return the length of a sample's audio in seconds.

    Raises:
        UserError: the audio cannot be read, or is truncated.
    """
    file = open_audio(f"{sample.key}.{sample.extension}", sample.audio)
    if file.seconds is None:
        return sum(map(len, read_blocks(file))) / RATE
    check_end(file)
    return file.seconds


def _stated_duration(fields: Mapping[str, object]) -> float | None:
    """Return the `duration` of a sample's JSON in seconds, or None if it is not a number."""
    stated = fields.get("duration")
    if not isinstance(stated, (int, float)) or isinstance(stated, bool):
        return None
    try:
        return float(stated)
    except OverflowError:
        return math.inf


def _row(sample: TarSample) -> tuple[int, ...] | BadSample:
    """Return the values of ROW, without the shard's number and the checksum."""
    try:
        duration = _duration(sample)
    except UserError as error:
        return BadSample(
            key=sample.key,
            reason="unreadable_audio",
            detail=str(error),
        )
    if round(duration * RATE) > MAX_SAMPLES:
        detail = f"the audio has {duration:.0f} s"
        return BadSample(key=sample.key, reason="too_long", detail=detail)
    stated = _stated_duration(sample.fields)
    if stated is not None and abs(stated - duration) > MAX_DURATION_ERROR:
        detail = f"its JSON says {stated:g} s, the audio has {duration:.3f} s"
        return BadSample(key=sample.key, reason="duration_mismatch", detail=detail)
    text = sample.fields["text"]
    if not text.strip():
        return BadSample(key=sample.key, reason="empty_text", detail="the transcript is empty")
    if problem := nul_problem(sample.fields):
        return BadSample(key=sample.key, reason="broken_text", detail=problem)
    text_bytes = min(len(text.encode("utf-8")), MAX_TEXT_LENGTH)
    text_chars = min(len(text), MAX_TEXT_LENGTH)
    samples = round(duration * RATE)
    return sample.offset, sample.size, samples, 0, text_bytes, text_chars, 0
