"""Indexing tars that others wrote, and checking that shards still hold what their index says."""

import os
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from asrllm.audio.stream import open_audio, read_stretch
from asrllm.data.index import (
    BLOCK,
    MAX_DURATION_ERROR,
    RATE,
    BadSample,
    Index,
    ShardRecord,
    iterate_tar,
    scan_shard,
    write_index,
)
from asrllm.data.parallel import Advance, run_parallel
from asrllm.data.shards import SeenKeys, ShardSummary, hash_keys, rejected_line
from asrllm.data.storage import RemoteFile, is_url
from asrllm.errors import UserError
from asrllm.escape import escape
from asrllm.integrity import file_sha256

UNBOUNDED = 1 << 62  # bytes; each process holds one tar, and removes it


# --- indexing ---


def index_tars(
    tars: Sequence[str],
    output: str | Path | None = None,
    *,
    workers: int = 1,
    advance: Advance = lambda count: None,
) -> ShardSummary:
    """Write an index of tars (local paths or URLs) into `output`, by default the directory where they lie.

    What cannot be used is left out of the index and has a row in `rejected.jsonl` there. advance: told of tars. Raises UserError where a
    tar is missing or broken, or where nothing could be used.
    """
    tars = [tar.removeprefix("file://") for tar in tars]
    tars = sorted(dict.fromkeys(tar if is_url(tar) else os.path.abspath(tar) for tar in tars))
    folder = _index_folder(tars, output)
    records, rejected = _scan_all(tars, folder, workers, advance)
    reasons = Counter(sample.reason for samples in rejected for sample in samples)
    if not any(len(record.rows) for record in records):
        said = (
            ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
            or "they are empty"
        )
        example = next(
            (f"; the first: {s.key}: {s.detail}" for samples in rejected for s in samples), ""
        )
        raise UserError(f"the tars hold no utterance that could be used: {said}{example}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for tar, record in zip(tars, records, strict=True):
            _link(tar, folder / record.name)
        if reasons:
            lines = [
                rejected_line(s.key, s.reason, f"{r.name}: {s.detail}")
                for r, bad in zip(records, rejected, strict=True)
                for s in bad
            ]
            (folder / "rejected.jsonl").write_text(
                "".join(lines), encoding="utf-8", errors="backslashreplace"
            )
        index = write_index(folder, records)
    except OSError as error:
        raise UserError(f"the index cannot be written to {str(folder)!r}: {error}") from error
    return ShardSummary(index=index, rejected=dict(reasons))


def _index_folder(tars: Sequence[str], output: str | Path | None) -> Path:
    local = [Path(tar) for tar in tars if not is_url(tar)]
    if missing := [tar for tar in local if not tar.is_file()]:
        raise UserError(f"the tar {str(missing[0])!r} does not exist: check the path")
    folders = {tar.parent for tar in local}
    if output is None and (len(local) < len(tars) or len(folders) != 1):
        where = "at URLs" if len(local) < len(tars) else f"in {len(folders)} directories"
        raise UserError(f"the tars lie {where}: say with --output DIR where their index is written")
    return Path(os.path.abspath(output)) if output is not None else folders.pop()


def _names(tars: Sequence[str], folder: Path) -> list[str]:
    """Return the names of tars in an index: below its folder, or URLs.

    Tars that are elsewhere get the name of a link, which `_link` makes.
    """
    elsewhere = [tar for tar in tars if not is_url(tar) and not Path(tar).is_relative_to(folder)]
    common = os.path.commonpath([os.path.dirname(tar) for tar in elsewhere]) if elsewhere else ""
    names = []
    for tar in tars:
        if is_url(tar):
            names.append(tar)
        else:
            names.append(os.path.relpath(tar, common if tar in elsewhere else folder))
    return names


def _link(tar: str, place: Path) -> None:
    """Make `place` a symbolic link to a local tar, unless it is the tar.

    Raises:
        UserError: another file is there.
    """
    if is_url(tar) or os.path.abspath(place) == tar:
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_symlink() and os.path.realpath(place) == os.path.realpath(tar):
        return
    try:
        place.symlink_to(tar)
    except FileExistsError as error:
        raise UserError(
            f"{str(place)!r} exists, but the index needs a link to {tar!r} there. Give --output another directory."
        ) from error


@dataclass(frozen=True)
class _Tar:
    """One to scan. name: in the index; cache: for URLs; repeated: which of its usable samples stand in an earlier tar."""

    where: str
    name: str
    cache: Path
    repeated: tuple[int, ...] = ()


def _scan_all(
    tars: Sequence[str], folder: Path, workers: int, advance: Advance
) -> tuple[list[ShardRecord], list[list[BadSample]]]:
    """The record of each tar, and what is left out of it; of a key in several tars the first one stays."""
    with tempfile.TemporaryDirectory(prefix="asrllm-") as cache:
        jobs = [
            _Tar(tar, name, Path(cache))
            for tar, name in zip(tars, _names(tars, folder), strict=True)
        ]
        found = dict(run_parallel(_scan, jobs, workers, advance))
        seen = SeenKeys()
        repeated = [tuple(np.flatnonzero(seen.add(found[i][2])).tolist()) for i in range(len(tars))]
        again = [
            _Tar(job.where, job.name, job.cache, rows)
            for job, rows in zip(jobs, repeated, strict=True)
            if rows
        ]
        numbers = [i for i, rows in enumerate(repeated) if rows]
        found |= {
            numbers[n]: result
            for n, result in run_parallel(_scan, again, workers, lambda count: None)
        }
    return [found[i][0] for i in range(len(tars))], [found[i][1] for i in range(len(tars))]


def _scan(tar: _Tar, advance: Advance) -> tuple[ShardRecord, list[BadSample], np.ndarray]:
    """The record, what is left out, and the hashes of the keys that are in."""
    with _local(RemoteFile(url=tar.where), tar.cache) as path:
        record, bad, keys = scan_shard(path, name=tar.name)
        if tar.repeated:
            record, bad, keys = scan_shard(
                path, name=tar.name, skip={keys[i] for i in tar.repeated}
            )
    advance(1)
    return record, bad, hash_keys(keys)


@contextmanager
def _local(file: RemoteFile, cache: Path) -> Iterator[Path]:
    """A file on this machine for as long as it is used."""
    if not is_url(file.url):
        yield Path(file.url)
        return
    from asrllm.data.cache import ShardCache  # takes 30 ms; only remote tars need it

    path = ShardCache(cache, max_bytes=UNBOUNDED).fetch(file)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


# --- verifying ---


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong with a sample; key "" where it is wrong with the whole shard."""

    shard: str
    key: str
    reason: str
    detail: str

    def __str__(self) -> str:
        parts = (self.shard, self.key, self.reason, self.detail)
        return escape(": ".join(part for part in parts if part))


@dataclass(frozen=True)
class _Shard:
    """One to check. rows: of the index."""

    file: RemoteFile
    rows: np.ndarray
    cache: Path


def verify_shards(
    index: Index, *, workers: int = 1, advance: Advance = lambda count: None
) -> list[Problem]:
    """Every disagreement between the index and its shards: all samples are decoded. advance: told of samples."""
    with tempfile.TemporaryDirectory(prefix="asrllm-") as cache:
        pieces = [slice(*index.starts[i : i + 2]) for i in range(len(index.shards))]
        shards = (
            _Shard(index.file(i), np.array(index.rows[piece]), Path(cache))
            for i, piece in enumerate(pieces)
        )
        found = dict(run_parallel(_check_shard, shards, workers, advance))
        seen = SeenKeys()
        repeated = {i: found[i].rows[seen.add(found[i].hashes)] for i in range(len(pieces))}
        # the keys themselves, of millions of samples, are not held
        again = {
            i: _repeated_keys(
                _Shard(index.file(i), np.array(index.rows[pieces[i]])[rows], Path(cache))
            )
            for i, rows in repeated.items()
            if len(rows)
        }
    return [
        problem for i in range(len(pieces)) for problem in (*found[i].problems, *again.get(i, ()))
    ]


@dataclass(frozen=True)
class _Checked:
    """rows: those whose samples have a key; hashes: of these keys."""

    problems: list[Problem]
    rows: np.ndarray
    hashes: np.ndarray


def _check_shard(shard: _Shard, advance: Advance) -> _Checked:
    name, problems, keys = shard.file.url, [], {}
    with _local(shard.file, shard.cache) as path:
        if (digest := file_sha256(path)) != shard.file.sha256:
            detail = f"its sha256 is {digest[:12]}..., when it was indexed it was {str(shard.file.sha256)[:12]}..."
            problems.append(Problem(shard=name, key="", reason="changed", detail=detail))
        for number, (row, data) in enumerate(_stretches(path, shard.rows)):
            key, reason, detail = _check_sample(data, row)
            if key:
                keys[number] = key
            if reason:
                problems.append(
                    Problem(shard=name, key=key or f"row {number}", reason=reason, detail=detail)
                )
            advance(1)
    return _Checked(problems, np.array(list(keys), np.int64), hash_keys(list(keys.values())))


def _repeated_keys(shard: _Shard) -> list[Problem]:
    """What is wrong with a shard's rows whose keys were seen before them."""
    with _local(shard.file, shard.cache) as path:
        keys = [_check_sample(data, row)[0] for row, data in _stretches(path, shard.rows)]
    detail = "the key stands in the shards more than once"
    return [
        Problem(shard=shard.file.url, key=key, reason="duplicate_key", detail=detail)
        for key in keys
    ]


def _stretches(path: Path, rows: np.ndarray) -> Iterator[tuple[np.void, bytes]]:
    """Each row with its part of the tar."""
    with open(path, "rb") as file:
        for row in rows:
            file.seek(int(row["offset"]) * BLOCK)
            yield row, file.read(int(row["size"]) * BLOCK)


def _check_sample(data: bytes, row: np.void) -> tuple[str, str, str]:
    """(key, reason, detail) of a sample's stretch of a tar; reason "": nothing is wrong."""
    try:
        samples = list(iterate_tar(BytesIO(data)))
    except (tarfile.TarError, ValueError, OSError) as error:
        return "", "unreadable_tar", f"no sample lies at block {row['offset']}: {error}"
    if len(samples) != 1:
        return (
            "",
            "unreadable_tar",
            f"{len(samples)} samples lie at block {row['offset']} instead of one",
        )
    (sample,) = samples
    if isinstance(sample, BadSample):
        return sample.key, sample.reason, sample.detail
    if zlib.crc32(data) != row["crc32"]:
        return sample.key, "changed", "its bytes do not match the checksum in the index"
    text = sample.fields["text"]
    if not text.strip():
        return sample.key, "empty_text", "the transcript is empty"
    if min(len(text.encode("utf-8", "surrogatepass")), 65535) != row["text_bytes"]:
        return (
            sample.key,
            "changed_text",
            f"the index says {row['text_bytes']} bytes of text, there are {len(text.encode())}",
        )
    try:
        wave, rate = read_stretch(open_audio(f"{sample.key}.{sample.extension}", sample.audio))
    except UserError as error:
        return sample.key, "unreadable_audio", str(error)
    seconds, expected = len(wave) / rate, int(row["samples"]) / RATE
    if abs(seconds - expected) > MAX_DURATION_ERROR:
        return (
            sample.key,
            "duration_mismatch",
            f"the index says {expected:.3f} s, the audio has {seconds:.3f} s",
        )
    if not np.isfinite(wave).all():
        return sample.key, "non_finite_audio", "the audio holds NaN or infinite values"
    return sample.key, "", ""
