"""The index beside the shards: one row of 24 bytes an utterance, memory-mapped, and a record of every tar."""

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

from asrllm.audio.stream import check_end, open_audio, read_blocks
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
from asrllm.text_files import parse_json, read_json_object

if TYPE_CHECKING:
    from asrllm.data.cache import ShardCache

FORMAT = 3
BLOCK = tarfile.BLOCKSIZE  # bytes; members of a tar begin at multiples of it
ROW = np.dtype(
    [
        ("offset", "<u4"),  # of the sample's first tar header in the shard, in blocks
        ("size", "<u4"),  # from there to the end of its last member, in blocks
        ("samples", "<u4"),  # of the waveform at RATE
        ("shard", "<u4"),  # position in Index.shards
        ("text_bytes", "<u2"),  # of the transcript in UTF-8
        ("text_chars", "<u2"),
        ("crc32", "<u4"),  # of the sample's bytes in the shard, headers and padding included
    ]
)
MAX_DURATION_ERROR = 0.1  # seconds between what is written about the audio and what it holds
LONGEST = np.iinfo(np.uint32).max  # samples of an utterance
MAX_HEADER = 1 << 20  # bytes of an extended header of a tar, which holds a name
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
TALLIED = ("corpus", "lang", "speaker")


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What the index keeps of one tar.

    name: a file name relative to the index, an absolute path or a URL. size: bytes. rows: (utterances,) of ROW in the tar's order.
    tallies: {"corpus" | "lang" | "speaker": {its value, "" where a sample has none: [utterances, seconds]}}.
    """

    name: str
    size: int
    sha256: str
    rows: np.ndarray
    tallies: dict[str, dict[str, list[float]]]


@dataclass(frozen=True, kw_only=True)
class Index:
    """rows: (utterances,) of ROW, memory-mapped; shards: the tars' paths or URLs; starts: (shards + 1,), the first row of each.

    sizes, sha256: of the tars, in bytes and hexadecimal. about: what index.json says of the whole: corpora, languages, speakers.
    """

    rows: np.ndarray
    shards: list[str]
    starts: np.ndarray
    sizes: list[int] = field(default_factory=list)
    sha256: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def hours(self) -> float:
        return float(self.rows["samples"].sum(dtype=np.int64)) / RATE / 3600

    def file(self, shard: int) -> RemoteFile:
        return RemoteFile(url=self.shards[shard], size=self.sizes[shard], sha256=self.sha256[shard])


# --- opening ---


def open_index(folder: str | Path, cache: "ShardCache | None" = None) -> Index:
    """The index of a directory of shards, local or at a URL; of the latter `index.bin` is kept in `cache`.

    Raises UserError where the index, or a shard that it names, is missing or has another size.
    """
    where = str(folder)
    about, rows_file = _open_remote(where, cache) if is_url(where) else _open_local(Path(folder))
    try:
        index = _open_index(where, about, rows_file)
    except (KeyError, TypeError, ValueError, OSError) as error:
        problem = f"the index in {where!r} is corrupted ({type(error).__name__}: {error})"
        raise UserError(
            f"{problem}. Copy it again, or make a new one with 'asrllm shards index'."
        ) from error
    _check_shards(index)
    return index


def _open_local(folder: Path) -> tuple[dict[str, Any], Path]:
    if not folder.is_dir():
        raise UserError(
            f"the shard directory {str(folder)!r} does not exist: make it with 'asrllm shards make {folder} ...'"
        )
    if not (folder / "index.json").is_file():
        raise UserError(
            f"{str(folder)!r} has no index.json: make one with 'asrllm shards index {folder}/*.tar'"
        )
    return read_json_object(folder / "index.json", "the index"), folder / "index.bin"


def _open_remote(url: str, cache: "ShardCache | None") -> tuple[dict[str, Any], Path]:
    if cache is None:
        raise UserError(
            f"{url!r} is a URL, which needs a cache on local disk here: copy its index.json and index.bin to a directory"
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
            f"{url!r} holds no readable index.json ({type(error).__name__}: {error}): make the index again"
        ) from error
    return about, cache.fetch(file)


def _open_index(where: str, about: dict[str, Any], rows_file: Path) -> Index:
    if about["format"] != FORMAT:
        problem = f"the index in {where!r} has the format {about['format']!r}, but this version reads {FORMAT}"
        raise UserError(f"{problem}. Make a new one with 'asrllm shards index'.")
    if about.get("sha256") != _about_sha256(about):
        raise ValueError("index.json does not match its own sha256")
    count, shards = about["utterances"], about["shards"]
    if not count:
        raise UserError(
            f"the shards in {where!r} hold no utterance: see rejected.jsonl there for the reasons"
        )
    if rows_file.stat().st_size != count * ROW.itemsize:
        raise ValueError(f"index.bin has {rows_file.stat().st_size} bytes for {count} utterances")
    if (
        not is_url(where) and file_sha256(rows_file) != about["rows_sha256"]
    ):  # the cache has checked those of URLs
        raise ValueError("index.bin does not match its sha256 in index.json")
    rows: np.ndarray = np.memmap(rows_file, ROW, "r", shape=(count,))
    starts = np.cumsum([0] + [shard["utterances"] for shard in shards])
    if starts[-1] != count:
        raise ValueError(f"its shards have {starts[-1]} utterances, it has {count}")
    _check_rows(rows, starts, [shard["bytes"] for shard in shards])
    return Index(
        rows=rows,
        shards=[_shard_location(where, shard["name"]) for shard in shards],
        starts=starts,
        sizes=[shard["bytes"] for shard in shards],
        sha256=[shard["sha256"] for shard in shards],
        about={key: value for key, value in about.items() if key != "shards"},
    )


def _check_rows(rows: np.ndarray, starts: np.ndarray, sizes: Sequence[int]) -> None:
    """Raise ValueError if a row names bytes that are not in its shard."""
    for number, size in enumerate(sizes):
        part = rows[starts[number] : starts[number + 1]]
        ends = part["offset"].astype(np.int64) + part["size"]
        if (part["shard"] != number).any() or ends.max(initial=0) * BLOCK > size + BLOCK:
            raise ValueError(f"rows of the shard {number} are not in it")


def _about_sha256(about: Mapping[str, Any]) -> str:
    """Return the SHA-256 of an index.json, without the entry that holds it."""
    content = {key: value for key, value in about.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _shard_location(where: str, name: str) -> str:
    """Return the path or URL of a shard that the index at `where` names.

    An index may come from somebody else, so it names only files below its own directory, and URLs
    that are not local files.
    """
    if is_url(name) and not name.lower().startswith("file:"):
        check_scheme(name)
        return name
    if is_url(name) or os.path.isabs(name) or ".." in Path(name).parts:
        raise UserError(
            f"the index in {where!r} names {name!r}, which is outside of its directory. Index the tars again with 'asrllm shards index'."
        )
    return join_url(where, name) if is_url(where) else os.path.join(where, name)


def _check_shards(index: Index) -> None:
    """Every tar is there with the size that the index knows: found now, not in the middle of an epoch."""
    # of many processes one asks for all: shards times ranks would be millions of requests
    remote = (
        [name for name in index.shards if is_url(name)]
        if os.environ.get("RANK", "0") == "0"
        else []
    )
    found = dict(zip(remote, remote_sizes(remote), strict=True)) if remote else {}
    for name, size in zip(index.shards, index.sizes, strict=True):
        has = found.get(name, size) if is_url(name) else _local_size(name)
        if has is None:
            raise UserError(
                f"the shard {name!r} is missing: restore it, or index the directory again"
            )
        if has != size:
            state = "is cut short" if has < size else "has changed"
            problem = f"the shard {name!r} {state}: it has {has} bytes, but its index says {size}"
            raise UserError(
                f"{problem}. Copy the shard again, or index it again if it was changed on purpose."
            )


def _local_size(name: str) -> int | None:
    try:
        return os.stat(name).st_size
    except FileNotFoundError:
        return None


# --- writing ---


def write_index(folder: Path, records: Sequence[ShardRecord]) -> Index:
    """Write `index.bin` and `index.json` into `folder`; the JSON comes last and makes the index valid."""
    for number, record in enumerate(records):
        record.rows["shard"] = number
    rows = np.concatenate([record.rows for record in records]) if records else np.empty(0, ROW)
    tallies = merge_tallies([record.tallies for record in records])
    about = {
        "format": FORMAT,
        "utterances": len(rows),
        "hours": round(float(rows["samples"].sum(dtype=np.int64)) / RATE / 3600, 4),
        "rows_sha256": hashlib.sha256(rows.tobytes()).hexdigest(),
        "corpora": _in_hours(tallies["corpus"]),
        "languages": _in_hours(tallies["lang"]),
        "speakers": len(tallies["speaker"].keys() - {""}),
        "shards": [
            {"name": r.name, "bytes": r.size, "sha256": r.sha256, "utterances": len(r.rows)}
            for r in records
        ],
    }
    about["sha256"] = _about_sha256(about)
    (folder / "index.json").unlink(
        missing_ok=True
    )  # from here on there is no index, until there is a whole one
    partial = folder / "index.bin.partial"  # readers of an older index keep their file
    rows.tofile(partial)
    partial.replace(folder / "index.bin")
    partial = folder / "index.json.partial"
    partial.write_text(json.dumps(about, ensure_ascii=False, indent=1), encoding="utf-8")
    partial.replace(folder / "index.json")
    return (
        _open_index(str(folder), about, folder / "index.bin")
        if len(rows)
        else Index(rows=rows, shards=[], starts=np.zeros(1, int))
    )


def merge_tallies(
    parts: Sequence[Mapping[str, Mapping[str, Sequence[float]]]],
) -> dict[str, dict[str, list[float]]]:
    merged: dict[str, dict[str, list[float]]] = {name: {} for name in TALLIED}
    for part in parts:
        for name, counts in part.items():
            for value, (utterances, seconds) in counts.items():
                entry = merged[name].setdefault(value, [0, 0.0])
                entry[0] += utterances
                entry[1] += seconds
    return merged


def _in_hours(tally: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    return {
        value: {"utterances": int(n), "hours": round(seconds / 3600, 4)}
        for value, (n, seconds) in sorted(tally.items())
    }


# --- reading tars ---


@dataclass(frozen=True, kw_only=True)
class TarSample:
    """One utterance as it lies in a tar: files that share a name up to the first dot. offset, size: in blocks."""

    key: str
    offset: int
    size: int
    audio: bytes
    extension: str
    fields: dict[str, Any]  # of KEY.json; KEY.txt stands as "text"


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """One that cannot be used, and why; reason is a word to count by."""

    key: str
    reason: str
    detail: str


def scan_shard(
    path: Path, *, name: str, skip: Collection[str] = ()
) -> tuple[ShardRecord, list[BadSample], list[str]]:
    """(the record of a local tar, what is left out of it, the keys of what is in it). skip: keys that other tars hold already.

    Raises UserError where the file is no tar.
    """
    rows, bad, fields = [], [], []
    keys: dict[str, None] = {}
    for sample in scan_tar(path):
        row = sample if isinstance(sample, BadSample) else _row(sample)
        if sample.key in keys or sample.key in skip:
            row = BadSample(
                key=sample.key,
                reason="duplicate_key",
                detail=f"{sample.key!r} stands in the tars more than once",
            )
        if isinstance(row, BadSample) or isinstance(sample, BadSample):
            bad.append(row)
            continue
        keys[sample.key] = None
        rows.append(row)
        fields.append({tally: str(sample.fields.get(tally) or "") for tally in TALLIED})
    table = np.array(rows, ROW)
    _add_checksums(path, table)
    seconds = (table["samples"] / RATE).tolist()
    tallies = [
        {tally: {value: [1, s]} for tally, value in f.items()}
        for f, s in zip(fields, seconds, strict=True)
    ]
    record = ShardRecord(
        name=name,
        size=path.stat().st_size,
        sha256=file_sha256(path),
        rows=table,
        tallies=merge_tallies(tallies),
    )
    return record, bad, list(keys)  # type: ignore[return-value]


def _add_checksums(path: Path, rows: np.ndarray) -> None:
    with open(path, "rb") as file:
        for row in rows:
            file.seek(int(row["offset"]) * BLOCK)
            row["crc32"] = zlib.crc32(file.read(int(row["size"]) * BLOCK))


def scan_tar(path: str | Path) -> Iterator[TarSample | BadSample]:
    """All samples of a local tar, one at a time. Raises UserError for a broken tar."""
    try:
        with open(path, "rb") as file:
            yield from iterate_tar(file)
    except (tarfile.TarError, OSError) as error:
        raise UserError(explain_tar(Path(path), error)) from error


def explain_tar(path: Path, error: Exception) -> str:
    """Return what is wrong with a file that cannot be read as a tar, and how to fix it if it is compressed."""
    try:
        with open(path, "rb") as file:
            start = file.read(6)
    except OSError:
        start = b""
    for magic, program in COMPRESSED.items():
        if start.startswith(magic):
            problem = (
                f"{str(path)!r} is compressed, so that a sample cannot be read at its place in it"
            )
            return f"{problem}. Unpack it with '{program} -d', and give the tar."
    return f"{str(path)!r} cannot be read as a tar: {error}"


class Member(NamedTuple):
    """A file in a tar. start, end: bytes, from its first header to behind its content."""

    name: str
    start: int
    end: int
    data: bytes


def iterate_tar(file: BinaryIO) -> Iterator[TarSample | BadSample]:
    """Yield the samples of an open tar, whatever it holds in at most its own size of memory.

    Raises:
        tarfile.TarError: the tar is cut short or corrupted, or has a sparse file.
    """
    members = _members(file)
    for _, group in itertools.groupby(members, key=lambda member: sample_key(member.name)):
        yield _sample(list(group))


def _members(file: BinaryIO) -> Iterator[Member]:
    for info in tar_files(file):
        file.seek(info.offset_data)
        end = info.offset_data + info.size
        yield Member(info.name, info.offset, end, file.read(info.size))


def tar_files(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the files of an open tar; every size has been compared with the tar's.

    Raises:
        tarfile.TarError: the tar is cut short or corrupted, or has a sparse file.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    end = 0
    headers = _Headers(file)
    try:
        with tarfile.open(fileobj=headers, mode="r:") as tar:  # type: ignore[call-overload]
            for info in tar:
                if info.issparse():
                    raise tarfile.ReadError(f"{info.name!r} is a sparse file")
                if not info.isfile():
                    continue
                if info.offset < end or info.size < 0 or info.offset_data + info.size > size:
                    raise tarfile.ReadError(
                        f"{info.name!r} is cut short, or its header is corrupted"
                    )
                end = info.offset_data + info.size
                yield info
            file.seek(tar.offset)
            if any(file.read(BLOCK)):  # tarfile takes a corrupted header for the end of the tar
                raise tarfile.ReadError(f"the header at byte {tar.offset} is corrupted")
    except (ValueError, ArithmeticError, LookupError, RecursionError) as error:
        # what tarfile's parsers of extended headers happen to raise
        raise tarfile.ReadError(
            f"a header is corrupted ({type(error).__name__}: {error})"
        ) from error


class _Headers:
    """A tar as `tarfile` sees it: it reads headers, and no header of more than MAX_HEADER bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header has {size} bytes")
        return self.file.read(size)


def read_sample(stretch: bytes) -> TarSample:
    """The sample of the stretch of a tar that an index row names. Raises ValueError where it is not one whole sample."""
    members = _plain_members(stretch)
    (sample,) = iterate_tar(BytesIO(stretch)) if members is None else [_sample(members)]
    if isinstance(sample, BadSample):
        raise ValueError(f"{sample.key}: {sample.reason}: {sample.detail}")
    return sample


def _plain_members(stretch: bytes) -> list[Member] | None:
    """The files of one sample, where the headers are plain ones: a tenth of tarfile's time. None where they are not, or are damaged."""
    members: list[Member] = []
    at = 0
    while at < len(stretch):
        header = stretch[at : at + BLOCK]
        if (
            len(header) < BLOCK
            or header[257:262] != b"ustar"
            or header[156] not in b"0\0"
            or header[345]
        ):  # 345: a longer name
            return None
        try:
            size = int(header[124:135], 8)
            name = header[:100].rstrip(b"\0").decode()
        except ValueError:
            return None
        begin = at + BLOCK
        if begin + size > len(stretch):
            return None
        members.append(Member(name, at, begin + size, stretch[begin : begin + size]))
        at = begin + -(-size // BLOCK) * BLOCK
    return members if len({sample_key(member.name) for member in members}) == 1 else None


def sample_key(member: str) -> str:
    """WebDataset's rule: the member's path up to the first dot of its last part."""
    folder, _, base = member.rpartition("/")
    return (folder + "/" if folder else "") + base.partition(".")[0]


def _sample(members: Sequence[Member]) -> TarSample | BadSample:
    key = sample_key(members[0].name)
    files = {member.name.rpartition(".")[2].lower(): member.data for member in members}
    if len(files) < len(members):
        names = ", ".join(member.name for member in members[:4])
        return BadSample(
            key=key,
            reason="repeated_file",
            detail=f"several files of one kind have this key, which ends at the first dot: {names}",
        )
    extension = next((e for e in AUDIO_EXTENSIONS if e in files), None)
    if extension is None:
        return BadSample(
            key=key,
            reason="no_audio",
            detail=f"expected one of {', '.join(AUDIO_EXTENSIONS)}, found {', '.join(files)}",
        )
    if not key.isprintable():
        return BadSample(
            key=key, reason="bad_key", detail=f"{key!r} has characters that cannot be printed"
        )
    try:
        fields = parse_json(files["json"]) if "json" in files else {}
        if b"\\ud" in files.get("json", b"").lower():  # perhaps half of a pair of surrogates
            json.dumps(fields, ensure_ascii=False).encode()
        if isinstance(fields, dict) and "text" not in fields and "txt" in files:
            fields["text"] = files["txt"].decode("utf-8-sig").strip()
    except ValueError as error:  # of JSON or of UTF-8
        return BadSample(key=key, reason="broken_transcript", detail=str(error))
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        return BadSample(
            key=key, reason="no_transcript", detail=f"expected {key}.txt, or {key}.json with 'text'"
        )
    offset, end = members[0].start // BLOCK, -(-members[-1].end // BLOCK)
    return TarSample(
        key=key,
        offset=offset,
        size=end - offset,
        audio=files[extension],
        extension=extension,
        fields=fields,
    )


def _duration(sample: TarSample) -> float:
    """Return the length of a sample's audio in seconds.

    Raises:
        UserError: the audio cannot be read, or is cut short.
    """
    file = open_audio(f"{sample.key}.{sample.extension}", sample.audio)
    if file.seconds is None:
        return sum(map(len, read_blocks(file))) / RATE
    check_end(file)
    return file.seconds


def _stated_duration(fields: Mapping[str, Any]) -> float | None:
    """Return the `duration` of a sample's JSON in seconds, None if that is not a number."""
    stated = fields.get("duration")
    if not isinstance(stated, (int, float)) or isinstance(stated, bool):
        return None
    try:
        return float(stated)
    except OverflowError:
        return math.inf


def _row(sample: TarSample) -> tuple[int, ...] | BadSample:
    try:
        duration = _duration(sample)
    except UserError as error:
        return BadSample(key=sample.key, reason="unreadable_audio", detail=str(error))
    if round(duration * RATE) > LONGEST:
        return BadSample(
            key=sample.key, reason="too_long", detail=f"the audio has {duration:.0f} s"
        )
    stated = _stated_duration(sample.fields)
    if stated is not None and abs(stated - duration) > MAX_DURATION_ERROR:
        detail = f"its JSON says {stated:g} s, the audio has {duration:.3f} s"
        return BadSample(key=sample.key, reason="duration_mismatch", detail=detail)
    text = sample.fields["text"]
    lengths = (min(n, 65535) for n in (len(text.encode("utf-8")), len(text)))
    return (sample.offset, sample.size, round(duration * RATE), 0, *lengths, 0)
