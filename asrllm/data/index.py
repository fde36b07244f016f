"""The index of a directory of shards.

`index.bin` has one row of 24 bytes per utterance and is memory-mapped. `index.json` describes the
tars and the corpus.
"""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from asrllm.data.tars import (
    BLOCK,
    SHOWN_FIELD,
    BadSample,
    TarSample,
    nul_problem,
    scan_tar,
)
from asrllm.defaults import RATE
from asrllm.errors import UserError
from asrllm.integrity import file_sha256
from asrllm.text_files import (
    JsonObject,
    check_link,
    check_no_pointer,
    parse_json,
    read_json_object,
)

if TYPE_CHECKING:
    from asrllm.data.cache import ShardCache

Tallies = dict[str, dict[str, list[float]]]

FORMAT = 3
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
MAX_COUNT = 1 << 62  # of utterances, bytes or hours in index.json
MAX_TEXT_LENGTH = 65535  # bytes and characters; longer texts are counted as this
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
    about: JsonObject = field(default_factory=dict)

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


def _open_local(folder: Path) -> tuple[JsonObject, Path]:
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


def _open_remote(url: str, cache: "ShardCache | None") -> tuple[JsonObject, Path]:
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
            size=_check_about(url, about) * ROW.itemsize,
            sha256=about["rows_sha256"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the index.json in {url!r} is corrupted ({type(error).__name__}: {error}). "
            "Make the index again."
        ) from error
    return about, cache.fetch(file)


def _open_index(where: str, about: JsonObject, rows_file: Path) -> Index:
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


def _check_about(where: str, about: JsonObject) -> int:
    """Check the content of an index.json, and return its number of utterances.

    Raises:
        UserError: its format is another one, or it has no utterance.
        KeyError, TypeError, ValueError: an entry is missing or wrong.
    """
    if about["format"] != FORMAT:
        raise UserError(
            f"the index in {where!r} has format {about['format']!r}, but this version reads "
            f"format {FORMAT}. Make a new one with 'asrllm shards index'."
        )
    if about.get("sha256") != _about_sha256(about):
        raise ValueError("index.json does not match its own sha256")
    _check_entries(about)
    count: int = about["utterances"]
    if not count:
        raise UserError(
            f"the shards in {where!r} have no utterance. See rejected.jsonl there for the reasons."
        )
    return count


def _check_entries(about: JsonObject) -> None:
    """Raise an error if an entry of an index.json is missing or has an unexpected value."""
    _check_entry(about, "utterances", _is_count)
    _check_entry(about, "speakers", _is_count)
    for name in ("corpora", "languages"):
        _check_entry(about, name, _is_object)
        for tally in about[name].values():
            _check_entry(tally, "utterances", _is_count)
            _check_entry(tally, "hours", _is_hours)
    for shard in about["shards"]:
        _check_entry(shard, "name", _is_file_name)
        _check_entry(shard, "bytes", _is_count)
        _check_entry(shard, "sha256", _is_text)
        _check_entry(shard, "utterances", _is_count)


def _check_entry(entries: JsonObject, name: str, is_valid: Callable[[Any], bool]) -> None:
    if not is_valid(entries[name]):
        raise ValueError(f"{name!r} is {repr(entries[name])[:SHOWN_FIELD]}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_COUNT


def _is_hours(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 <= value < MAX_COUNT


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_file_name(value: Any) -> bool:
    try:
        return bool(value) and b"\0" not in os.fsencode(value)
    except (TypeError, UnicodeEncodeError):
        return False


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
            state, fix = "is truncated", "Copy the shard again"
            if size > expected:
                state, fix = "has changed", f"{fix}, or index it again if you changed it"
            raise UserError(
                f"the shard {name!r} {state}: it has {size} bytes, but its index says {expected}. "
                f"{fix}."
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
    about = _index_content(rows, records)
    # without index.json, the directory has no index until the new one is complete
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


def _index_content(rows: np.ndarray, records: Sequence[ShardRecord]) -> JsonObject:
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
    about: JsonObject = {
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


# --- indexing a tar ---


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
