"""Index tars of any origin, and verify that shards still match their index."""

import logging
import os
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from asrllm.atomic import (
    check_output_file,
    check_writable_folder,
    write_error,
    write_whole,
)
from asrllm.data.audio_files import open_audio, read_segment
from asrllm.data.index import (
    MAX_DURATION_ERROR,
    MAX_TEXT_LENGTH,
    Index,
    ShardRecord,
    open_index,
    scan_shard,
    write_index,
)
from asrllm.data.keys import SeenKeys, hash_keys
from asrllm.data.parallel import Advance, run_parallel
from asrllm.data.rejects import Rejected, RejectedExamples, rejected_line
from asrllm.data.samples import NON_FINITE
from asrllm.data.shard_summary import ShardSummary
from asrllm.data.storage import RemoteFile, is_url
from asrllm.data.tars import BLOCK, BadSample, TarSample, iterate_rows, nul_problem
from asrllm.defaults import RATE
from asrllm.errors import UserError
from asrllm.escape import escape
from asrllm.integrity import file_sha256
from asrllm.text_files import check_file

logger = logging.getLogger(__name__)
UNBOUNDED = 1 << 62  # bytes; each process stores one tar at a time, and removes it


# --- indexing ---


def index_tars(
    tars: Sequence[str],
    output: str | Path | None = None,
    *,
    workers: int = 1,
    advance: Advance = lambda count: None,
) -> ShardSummary:
    """Write the index of tars.

    Unusable samples are left out of the index and listed in its `rejected.jsonl`.

    Args:
        tars: local paths or URLs.
        output: directory of the index; by default the directory of the tars.
        workers: number of processes.
        advance: receives the number of tars that were scanned.

    Raises:
        UserError: a tar is missing or corrupted, or no sample can be used.
    """
    tars = sorted({_absolute(tar) for tar in tars})
    folder = _index_folder(tars, output)
    check_writable_folder(folder)
    if folder.is_dir():
        for name in ("index.bin", "index.json", "rejected.jsonl"):
            check_output_file(folder / name)
    scans = _scan_all(tars, folder, workers, advance)
    rejects = _rejects(scans)
    if not any(len(scan.record.rows) for scan in scans):
        _raise_no_sample(tars, folder, rejects)
    _warn_of_changes(folder, scans)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for tar, scan in zip(tars, scans, strict=True):
            _link(tar, folder / scan.record.name)
        if rejects:
            _write_rejected(folder / "rejected.jsonl", rejects)
        index = write_index(folder, [scan.record for scan in scans])
    except OSError as error:
        raise write_error(folder, error) from error
    return ShardSummary(
        index=index,
        rejected=dict(Counter(row.reason for row in rejects)),
        examples=_examples(rejects),
    )


def _count_changes(before: Index, scans: Sequence["_Scan"]) -> int:
    """Return how many indexed samples have other bytes now."""
    numbers = {Path(path).name: number for number, path in enumerate(before.shards)}
    changed = 0
    for scan in scans:
        number = numbers.get(Path(scan.record.name).name)
        if number is None:
            continue
        begin = np.searchsorted(before.rows["shard"], number)
        end = np.searchsorted(before.rows["shard"], number + 1)
        own = before.rows[begin:end]
        now = scan.record.rows
        found = dict(zip(now["offset"], now["crc32"], strict=True))
        changed += sum(found.get(row["offset"]) != row["crc32"] for row in own)
    return changed


def _warn_of_changes(folder: Path, scans: Sequence["_Scan"]) -> None:
    """Warn of samples whose bytes differ from those in the directory's existing index."""
    if not (folder / "index.json").is_file():
        return
    try:
        before = open_index(folder)
    except UserError:  # a corrupted index, which the new one replaces
        return
    changed = _count_changes(before, scans)
    if changed:
        logger.warning(
            "%d samples in %s have other bytes than when they were indexed before. If you did not "
            "change the tars, they are corrupted: copy them again, and index them again.",
            changed,
            folder,
        )


def _absolute(tar: str) -> str:
    """Return a URL, or the absolute path of a local tar."""
    tar = tar.removeprefix("file://")
    return tar if is_url(tar) else os.path.abspath(tar)


def _rejects(scans: Sequence["_Scan"]) -> list[Rejected]:
    """Return the samples that cannot be used, with the tars that contain them."""
    return [
        Rejected(sample.key, sample.reason, f"{scan.record.name}: {sample.detail}")
        for scan in scans
        for sample in scan.bad
    ]


def _examples(rejects: Sequence[Rejected]) -> tuple[str, ...]:
    examples = RejectedExamples()
    for row in rejects:
        examples.add(row)
    return tuple(examples.lines())


def _raise_no_sample(tars: Sequence[str], folder: Path, rejects: Sequence[Rejected]) -> NoReturn:
    """Raise UserError with the reasons, and list the rejects where the index would be."""
    problem = f"the tars have no usable utterance (the first tar is {tars[0]!r})"
    if not rejects:
        raise UserError(f"{problem}: they are empty. Give tars with samples.")
    path = folder / "rejected.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_rejected(path, rejects)
    except OSError as error:
        raise write_error(folder, error) from error
    reasons = Counter(row.reason for row in rejects)
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    lines = [f"{problem}: {counts}", *_examples(rejects)]
    if {"no_audio", "no_transcript"} <= reasons.keys():
        lines.append("The files of a sample must follow each other in the tar: sort them by name.")
    raise UserError("\n".join([*lines, f"All are listed in {str(path)!r}."]))


def _write_rejected(path: Path, rejects: Sequence[Rejected]) -> None:
    content = "".join(map(rejected_line, rejects))
    write_whole(path, content.encode("utf-8", "backslashreplace"))


def _index_folder(tars: Sequence[str], output: str | Path | None) -> Path:
    """Return the directory of the index.

    Raises:
        UserError: a tar does not exist, or the tars do not determine a directory.
    """
    local = [Path(tar) for tar in tars if not is_url(tar)]
    for tar in local:
        if tar.is_dir():
            raise UserError(
                f"{str(tar)!r} is a directory. Name its tars: 'asrllm shards index {tar}/*.tar'. "
                "If it has an index, check it with 'asrllm shards verify'."
            )
        check_file(tar, "the tar")
    if output is not None:
        return Path(os.path.abspath(output))
    fix = "Set the directory of their index with --output DIR."
    if len(local) < len(tars):
        raise UserError(f"the tars are at URLs. {fix}")
    folders = {tar.parent for tar in local}
    if len(folders) != 1:
        raise UserError(f"the tars are in {len(folders)} directories. {fix}")
    return folders.pop()


def _tar_names(tars: Sequence[str], folder: Path) -> list[str]:
    """Return the names of tars in an index: paths relative to its folder, or URLs.

    Tars outside the folder get the name of a link, which `_link` makes.
    """
    outside = [tar for tar in tars if not is_url(tar) and not Path(tar).is_relative_to(folder)]
    common = os.path.commonpath([os.path.dirname(tar) for tar in outside]) if outside else ""
    names = []
    for tar in tars:
        if is_url(tar):
            names.append(tar)
        else:
            names.append(os.path.relpath(tar, common if tar in outside else folder))
    return names


def _link(tar: str, place: Path) -> None:
    """Make `place` a symbolic link to a local tar, unless it is the tar itself.

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
            f"{str(place)!r} exists, but the index needs a link to {tar!r} there. "
            "Use another directory for --output."
        ) from error


@dataclass(frozen=True)
class _ScanJob:
    """A tar to scan.

    Attributes:
        location: its path or URL.
        name: its name in the index.
        cache: local directory for tars at URLs.
        repeated: numbers of its usable samples whose keys an earlier tar contains.
    """

    location: str
    name: str
    cache: Path
    repeated: tuple[int, ...] = ()


class _Scan(NamedTuple):
    """The result of scanning a tar.

    Attributes:
        record: what the index stores about it.
        bad: its unusable samples.
        hashes: (usable samples,) hashes of their keys.
    """

    record: ShardRecord
    bad: list[BadSample]
    hashes: np.ndarray


def _scan_all(
    tars: Sequence[str],
    folder: Path,
    workers: int,
    advance: Advance,
) -> list[_Scan]:
    """Scan tars. If several contain the same key, the sample in the first one is used."""
    with tempfile.TemporaryDirectory(prefix="asrllm-") as cache:
        jobs = [
            _ScanJob(tar, name, Path(cache))
            for tar, name in zip(tars, _tar_names(tars, folder), strict=True)
        ]
        scans = dict(run_parallel(_scan, jobs, workers, advance))
        # tars with keys of earlier tars are scanned again without these keys
        seen = SeenKeys()
        numbers = []
        again = []
        for number, job in enumerate(jobs):
            repeated = np.flatnonzero(seen.add(scans[number].hashes)).tolist()
            if repeated:
                numbers.append(number)
                again.append(replace(job, repeated=tuple(repeated)))
        for i, scan in run_parallel(_scan, again, workers, lambda count: None):
            scans[numbers[i]] = scan
    return [scans[number] for number in range(len(tars))]


def _scan(job: _ScanJob, advance: Advance) -> _Scan:
    with _local(RemoteFile(url=job.location), job.cache) as path:
        record, bad, keys = scan_shard(path, name=job.name)
        if job.repeated:
            skip = {keys[i] for i in job.repeated}
            record, bad, keys = scan_shard(path, name=job.name, skip=skip)
    advance(1)
    return _Scan(record, bad, hash_keys(keys))


@contextmanager
def _local(file: RemoteFile, cache: Path) -> Iterator[Path]:
    """Provide a local copy of a file, and remove it afterwards if it is remote."""
    if not is_url(file.url):
        yield Path(file.url)
        return
    from asrllm.data.cache import ShardCache  # takes 30 ms, and only remote tars need it

    path = ShardCache(cache, max_bytes=UNBOUNDED).fetch(file)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


# --- verifying ---


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A mismatch between a shard and its index.

    Attributes:
        shard: path or URL of the shard.
        key: key of the sample, or "" if the whole shard is affected.
        reason: a word to count by.
        detail: the problem in plain words.
    """

    shard: str
    key: str
    reason: str
    detail: str

    def __str__(self) -> str:
        parts = (self.shard, self.key, self.reason, self.detail)
        return escape(": ".join(part for part in parts if part))


@dataclass(frozen=True)
class _Shard:
    """A shard to verify.

    Attributes:
        file: its location, size and checksum.
        rows: its rows of the index.
        cache: local directory for shards at URLs.
    """

    file: RemoteFile
    rows: np.ndarray
    cache: Path


def verify_shards(
    index: Index, *, workers: int = 1, advance: Advance = lambda count: None
) -> list[Problem]:
    """Decode all samples, and return every mismatch between an index and its shards.

    Args:
        index: the index.
        workers: number of processes.
        advance: receives the number of samples that were verified.
    """
    numbers = range(len(index.shards))
    with tempfile.TemporaryDirectory(prefix="asrllm-") as cache:

        def shard(number: int) -> _Shard:
            rows = index.rows[index.starts[number] : index.starts[number + 1]]
            return _Shard(index.file(number), np.array(rows), Path(cache))

        checks = dict(run_parallel(_check_shard, map(shard, numbers), workers, advance))
        seen = SeenKeys()
        problems = []
        for number in numbers:
            check = checks[number]
            problems += check.problems
            repeated = check.rows[seen.add(check.hashes)]
            if len(repeated):
                # The keys of millions of samples are not stored, so they are read again.
                whole = shard(number)
                problems += _repeated_keys(replace(whole, rows=whole.rows[repeated]))
    return problems


class _Check(NamedTuple):
    """The result of verifying a shard.

    Attributes:
        problems: the mismatches.
        rows: (n,) numbers of the rows whose samples have a key.
        hashes: (n,) hashes of these keys.
    """

    problems: list[Problem]
    rows: np.ndarray
    hashes: np.ndarray


def _check_shard(shard: _Shard, advance: Advance) -> _Check:
    name = shard.file.url
    problems = []
    keys = {}
    with _local(shard.file, shard.cache) as path:
        digest = file_sha256(path)
        if digest != shard.file.sha256:
            detail = (
                f"its sha256 is {digest[:12]}..., "
                f"but the index says {str(shard.file.sha256)[:12]}..."
            )
            problems.append(
                Problem(
                    shard=name,
                    key="",
                    reason="changed",
                    detail=detail,
                )
            )
        for number, (row, content) in enumerate(_sample_bytes(path, shard.rows)):
            key, reason, detail = _check_sample(content, row)
            if key:
                keys[number] = key
            if reason:
                label = key or f"row {number}"
                problems.append(
                    Problem(
                        shard=name,
                        key=label,
                        reason=reason,
                        detail=detail,
                    )
                )
            advance(1)
    rows = np.array(list(keys), np.int64)
    return _Check(problems, rows, hash_keys(list(keys.values())))


def _repeated_keys(shard: _Shard) -> list[Problem]:
    """Return the problems of rows whose keys occurred before."""
    problems = []
    with _local(shard.file, shard.cache) as path:
        for row, content in _sample_bytes(path, shard.rows):
            key, _, _ = _check_sample(content, row)
            problem = Problem(
                shard=shard.file.url,
                key=key,
                reason="duplicate_key",
                detail="the key occurs in the shards more than once",
            )
            problems.append(problem)
    return problems


def _sample_bytes(path: Path, rows: np.ndarray) -> Iterator[tuple[np.void, bytes]]:
    """Yield each row with the part of the tar that it refers to."""
    with open(path, "rb") as file:
        for row in rows:
            file.seek(int(row["offset"]) * BLOCK)
            yield row, file.read(int(row["size"]) * BLOCK)


def _check_sample(content: bytes, row: np.void) -> tuple[str, str, str]:
    """Return (key, reason, detail) of a sample. The reason of a sound sample is ""."""
    try:
        samples = list(iterate_rows(content))
    except (tarfile.TarError, ValueError, OSError) as error:
        return "", "unreadable_tar", f"no sample was found at block {row['offset']}: {error}"
    if len(samples) != 1:
        detail = f"there are {len(samples)} samples at block {row['offset']} instead of one"
        return "", "unreadable_tar", detail
    (sample,) = samples
    if isinstance(sample, BadSample):
        return sample.key, sample.reason, sample.detail
    if zlib.crc32(content) != row["crc32"]:
        return sample.key, "changed", "its bytes do not match the checksum in the index"
    if problem := nul_problem(sample.fields):
        return sample.key, "broken_text", problem
    reason, detail = _check_text(sample.fields["text"], row)
    if not reason:
        reason, detail = _check_audio(sample, row)
    return sample.key, reason, detail


def _check_text(text: str, row: np.void) -> tuple[str, str]:
    """Return (reason, detail) of what is wrong with a transcript, or empty texts."""
    if not text.strip():
        return "empty_text", "the transcript is empty"
    size = len(text.encode("utf-8", "surrogatepass"))
    if min(size, MAX_TEXT_LENGTH) != row["text_bytes"]:
        detail = f"the index says {row['text_bytes']} bytes of text, the sample has {size}"
        return "changed_text", detail
    return "", ""


def _check_audio(sample: TarSample, row: np.void) -> tuple[str, str]:
    """Return (reason, detail) of what is wrong with the audio, or empty texts."""
    try:
        wave, rate = read_segment(open_audio(f"{sample.key}.{sample.extension}", sample.audio))
    except UserError as error:
        return "unreadable_audio", str(error)
    seconds = len(wave) / rate
    expected = int(row["samples"]) / RATE
    if abs(seconds - expected) > MAX_DURATION_ERROR:
        detail = f"the index says {expected:.3f} s, the audio has {seconds:.3f} s"
        return "duration_mismatch", detail
    if not np.isfinite(wave).all():
        return NON_FINITE
    return "", ""
