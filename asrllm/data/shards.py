"""Write shards: WebDataset tars of KEY.flac + KEY.json, their index, and a list of rejects.

Shard k holds the source's utterances k*n to (k+1)*n without the rejected ones. Each shard is
therefore independent: any of several processes can write it, and after an interruption only the
unfinished ones are written again. Until all are complete, the work is in `.OUT.partial` beside OUT:

    shards/     the tars; becomes OUT by one rename
    records/    one file per finished shard: its index record, its rejects, and the digest of what
                it was made from. A shard with a record is finished.
    lock        held by the process that writes, which alone gives a shard its final name
"""

import base64
import dataclasses
import hashlib
import io
import itertools
import json
import logging
import os
import random
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import soundfile
from filelock import Timeout

from asrllm.atomic import replaceable_folder, write_error
from asrllm.data.audio_file import OutsideError, decoder_error
from asrllm.data.index import (
    MAX_DURATION_ERROR,
    ROW,
    Index,
    ShardRecord,
    open_index,
    scan_shard,
    write_index,
)
from asrllm.data.parallel import Advance, run_parallel
from asrllm.data.sources import RejectedError, Utterance
from asrllm.data.sources.utterance import check_installed
from asrllm.data.tars import field_problem, nul_problem
from asrllm.defaults import STORED_EXTENSIONS
from asrllm.errors import UserError
from asrllm.escape import escape
from asrllm.locks import FileLock
from asrllm.text_files import parse_json

logger = logging.getLogger(__name__)
# Increment this when the same utterances and options give other bytes.
WRITER_VERSION = 2
MAX_TEXT_BYTES = 10_000
SHOWN_EXAMPLES = 3  # rejected utterances in a message
FIELD_ORDER = (
    "text",
    "duration",
    "sampling_rate",
    "lang",
    "corpus",
    "speaker",
    "recording",
    "prompt",
    "task",
    "hotwords",
)
Codec = Literal["flac", "keep"]
Rejected = tuple[str, str, str]  # key, reason, detail


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """The result of writing or indexing shards.

    Attributes:
        index: the index of the shards.
        rejected: number of rejected utterances by reason.
        reused: number of shards that an interrupted run had already finished.
        examples: lines that describe rejected utterances.
    """

    index: Index
    rejected: dict[str, int]
    reused: int = 0
    examples: tuple[str, ...] = ()


def write_shards(
    out: str | Path,
    utterances: Iterable[Utterance],
    *,
    utterances_per_shard: int = 1000,
    workers: int = 1,
    fields: dict[str, Any] | None = None,
    codec: Codec = "flac",
    seed: int | None = None,
    advance: Advance = lambda count: None,
    keep: Advance | None = None,
) -> ShardSummary:
    """Write `out/shard-NNNNNN.tar`, `index.bin`, `index.json` and `rejected.jsonl`.

    `out` appears when everything is complete. The same utterances and options give the same bytes.
    If all utterances of a shard are rejected, its number is skipped.

    Args:
        out: the new directory.
        utterances: the source.
        utterances_per_shard: utterances per shard, before rejection.
        workers: number of processes. With 1 everything happens in this process, and utterances
            need not be picklable.
        fields: fields of every KEY.json (lang, corpus), unless the utterance has its own.
        codec: "flac" encodes 16-bit FLAC; "keep" copies the bytes of whole audio files.
        seed: shuffles the utterances, which are then held in memory.
        advance: receives the number of utterances that were written.
        keep: receives the number of utterances that an interrupted run had already written;
            `advance` by default.

    Raises:
        UserError: `out` is not empty, another process writes it, or nothing could be written.
    """
    work = _WorkDir(_free_folder(Path(out)))
    if seed is not None:
        utterances = list(utterances)
        random.Random(seed).shuffle(utterances)
    counts: Counter[str] = Counter()

    def unfinished_jobs() -> Iterator[_Job]:
        for number, chunk in enumerate(_chunks(utterances, utterances_per_shard)):
            job = _Job(number, chunk, work.shards, fields or {}, codec)
            counts["all"] += 1
            if work.is_finished(job):
                counts["reused"] += 1
                (keep or advance)(len(chunk))
            else:
                yield job

    with work.locked():
        with closing(run_parallel(_write_shard, unfinished_jobs(), workers, advance)) as finished:
            for _, shard in finished:
                work.commit(shard)
        return dataclasses.replace(work.finish(counts["all"]), reused=counts["reused"])


def _free_folder(out: Path) -> Path:
    """Return the resolved path of the output directory.

    Raises:
        UserError: it cannot be created, is not empty, or is a mount point.
    """
    fix = "Choose another directory, or remove it to make the shards again."
    return replaceable_folder(out, "", fix)


def _chunks(utterances: Iterable[Utterance], size: int) -> Iterator[list[Utterance]]:
    """Yield the utterances of each shard, and give those with a repeated key a problem."""
    iterator = iter(utterances)
    seen = SeenKeys()
    while chunk := list(itertools.islice(iterator, size)):
        usable = [i for i, utterance in enumerate(chunk) if utterance.problem is None]
        keys = [tar_key(chunk[i].key) for i in usable]
        is_repeated = seen.add(hash_keys(keys))
        for i, key, repeated in zip(usable, keys, is_repeated, strict=True):
            if repeated:
                problem = ("duplicate_key", f"another utterance has the tar's key {key!r}")
                chunk[i] = dataclasses.replace(chunk[i], problem=problem)
        yield chunk


class SeenKeys:
    """A set of 64-bit hashes that takes 8 bytes per hash.

    Attributes:
        runs: sorted arrays of hashes, each more than twice as long as the next.
    """

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Add hashes (n,), and return which of them (n,) were repeated.

        A hash is repeated if the set contains it, or if it occurs earlier in `hashes`.
        """
        _, first = np.unique(hashes, return_index=True)
        repeated: np.ndarray = np.ones(len(hashes), bool)
        repeated[first] = False
        for run in self.runs:
            places = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            repeated |= run[places] == hashes
        new = np.sort(hashes[~repeated])
        if len(new):
            self.runs.append(new)
        self._merge_runs()
        return repeated

    def _merge_runs(self) -> None:
        while len(self.runs) > 1:
            last = self.runs[-1]
            if len(self.runs[-2]) > 2 * len(last):
                return
            self.runs.pop()
            self.runs[-1] = np.union1d(self.runs[-1], last)


def hash_keys(keys: Sequence[str]) -> np.ndarray:
    """Return 64-bit hashes (n,) of keys."""
    digests = (
        hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        for key in keys
    )
    return np.frombuffer(b"".join(digests), np.uint64)


def tar_key(key: str) -> str:
    """Return a key as tars spell it.

    WebDataset ends a key at the first dot, and names in a tar are not absolute.
    """
    return key.replace(".", "_").lstrip("/")


# --- one shard ---


@dataclass(frozen=True)
class _Job:
    """A shard to write.

    Attributes:
        number: its number.
        utterances: its utterances.
        folder: directory of the tars.
        fields: default fields of its samples.
        codec: see write_shards.
    """

    number: int
    utterances: list[Utterance]
    folder: Path
    fields: dict[str, Any]
    codec: Codec

    @property
    def digest(self) -> str:
        """SHA-256 of the options and of the repr of the utterances, which includes their `load`."""
        digest = hashlib.sha256(repr((WRITER_VERSION, self.fields, self.codec)).encode())
        for utterance in self.utterances:
            digest.update(repr(utterance).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


@dataclass(frozen=True)
class _FinishedShard:
    """A shard that was written under a temporary name.

    Attributes:
        number: its number.
        digest: digest of its job.
        partial: path of the tar.
        record: its index record, or None if all utterances were rejected.
        rejected: its rejected utterances.
    """

    number: int
    digest: str
    partial: Path
    record: ShardRecord | None
    rejected: list[Rejected]


def _write_shard(job: _Job, advance: Advance) -> _FinishedShard:
    name = f"shard-{job.number:06d}.tar"
    # The process number keeps a worker that outlives its killed parent away from the next run.
    partial = job.folder / f"{name}.{os.getpid()}"
    try:
        rejected = _write_tar(job, partial, advance)
        record, bad, _ = scan_shard(partial, name=name)
    except ConnectionError:  # raised by `advance`: the parent is gone
        raise
    except OSError as error:
        raise write_error(partial, error) from error
    rejected += [(sample.key, sample.reason, sample.detail) for sample in bad]
    return _FinishedShard(
        number=job.number,
        digest=job.digest,
        partial=partial,
        record=record if len(record.rows) else None,
        rejected=rejected,
    )


def _write_tar(
    job: _Job,
    path: Path,
    advance: Advance,
) -> list[Rejected]:
    """Write the tar of a shard, and return the rejected utterances."""
    rejected: list[Rejected] = []
    with open(path, "wb") as file, tarfile.open(fileobj=file, mode="w|") as tar:
        for utterance in job.utterances:
            try:
                sample = make_sample(utterance, job.fields, job.codec)
            except RejectedError as error:
                rejected.append((utterance.key, *error.args))
            else:
                write_sample(tar, sample)
            advance(1)
        tar.close()
        # before its record says that it is complete, even if the power fails
        os.fsync(file.fileno())
    return rejected


def write_sample(tar: tarfile.TarFile, sample: dict[str, Any]) -> None:
    """Append one sample to a tar, with the same bytes as `webdataset.TarWriter`.

    webdataset itself would import torch, which takes 2 s in every worker process.

    Args:
        tar: a tar that is open for writing.
        sample: `__key__`, and the content of each member by its extension.
    """
    for extension in sorted(sample):
        if extension == "__key__":
            continue
        member = tarfile.TarInfo(f"{sample['__key__']}.{extension}")
        member.size = len(sample[extension])
        member.mode = 0o444
        tar.addfile(member, io.BytesIO(sample[extension]))


def make_sample(
    utterance: Utterance, fields: dict[str, Any], codec: Codec = "flac"
) -> dict[str, Any]:
    """Return the tar members of an utterance, as `write_sample` takes them.

    Args:
        utterance: the utterance.
        fields: default fields of its JSON.
        codec: see write_shards.

    Raises:
        RejectedError: the utterance cannot be used.
    """
    key = tar_key(utterance.key)
    text = utterance.text.strip()
    _check_without_audio(utterance, key, text)
    wave, rate = _load(utterance)
    duration = len(wave) / rate
    stated = utterance.duration
    if stated is not None and abs(duration - stated) > MAX_DURATION_ERROR:
        raise RejectedError(
            "duration_mismatch",
            f"the source says {stated:.3f} s, the audio has {duration:.3f} s",
        )
    measured = {"text": text, "duration": duration, "sampling_rate": rate}
    described = fields | utterance.fields | measured
    if problem := field_problem(described):
        raise RejectedError("bad_field", problem)
    content = _encode_json(described)
    extension, audio = _audio(utterance, wave, rate, codec)
    return {"__key__": key, extension: audio, "json": content}


def _encode_json(fields: Mapping[str, Any]) -> bytes:
    """Return the content of a KEY.json, with its fields in FIELD_ORDER."""
    ordered = {name: fields[name] for name in (*FIELD_ORDER, *fields) if name in fields}
    try:
        return json.dumps(ordered, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RejectedError(
            "broken_text", f"the transcript or a field is not UTF-8 text: {error}"
        ) from error


def _check_without_audio(utterance: Utterance, key: str, text: str) -> None:
    """Raise RejectedError for problems that can be found without reading the audio."""
    if utterance.problem is not None:
        raise RejectedError(*utterance.problem)
    if not key or key.endswith("/") or not key.isprintable():
        raise RejectedError("bad_key", f"the key {utterance.key!r} cannot be a file name")
    if not text:
        raise RejectedError("empty_text", "the transcript is empty")
    if problem := nul_problem(utterance.fields | {"text": text}):
        raise RejectedError("broken_text", problem)
    if len(text.encode("utf-8", "replace")) > MAX_TEXT_BYTES:
        raise RejectedError("long_text", f"the transcript has more than {MAX_TEXT_BYTES} bytes")


def _load(utterance: Utterance) -> tuple[np.ndarray, int]:
    """Return the waveform (samples,) and the sampling rate in Hz.

    Raises:
        RejectedError: the audio cannot be used.
        UserError: a package that reads it is missing.
    """
    try:
        wave, rate = utterance.load()
    except RejectedError:
        raise
    except UserError as error:
        reason = "outside_audio" if isinstance(error, OutsideError) else "unreadable_audio"
        raise RejectedError(reason, str(error)) from error
    except Exception as error:  # decoders raise many types; each affects one utterance
        check_installed(error, f"the utterance {utterance.key!r}")
        detail = f"{type(error).__name__}: {decoder_error(error)}"
        raise RejectedError("unreadable_audio", detail) from error
    if not len(wave):
        raise RejectedError("empty_audio", "the audio has no samples")
    if not np.isfinite(wave).all():
        raise RejectedError("non_finite_audio", "the audio contains NaN or infinite values")
    return wave, rate


def _audio(
    utterance: Utterance,
    wave: np.ndarray,
    rate: int,
    codec: Codec,
) -> tuple[str, bytes]:
    """Return the extension and the content of the audio member."""
    if codec == "keep" and utterance.file is not None:
        extension = utterance.file.suffix.lower().removeprefix(".")
        if extension in STORED_EXTENSIONS:
            return extension, utterance.file.read_bytes()
    flac = io.BytesIO()
    peak = np.abs(wave).max()
    if peak > 1:  # 16 bits would clip it
        wave = wave / peak
    try:
        soundfile.write(flac, wave, rate, format="FLAC", subtype="PCM_16")
    except (RuntimeError, ValueError) as error:
        raise RejectedError("not_encodable", f"{rate} Hz as FLAC: {error}") from error
    return "flac", flac.getvalue()


# --- the working directory beside OUT ---


class _WorkDir:
    """The directory `.OUT.partial`. See the module's docstring for its content."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(f".{out.name}.partial")
        self.shards = self.folder / "shards"
        self.records = self.folder / "records"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude other processes. After an error, only finished shards are left, if any."""
        lock = self._acquire()
        try:
            _free_folder(self.out)  # the other process may have finished while this one waited
            self._remove_unfinished()
            yield
        except BaseException:
            finished = len(list(self.records.glob("shard-*.json")))
            if finished:
                logger.warning(
                    "%d finished shards are in %s. Run the same command again to resume.",
                    finished,
                    self.folder,
                )
            else:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise
        finally:
            lock.release()

    def _acquire(self) -> FileLock:
        _free_folder(self.out)
        try:
            for folder in (self.shards, self.records):
                folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / "lock", blocking=False)
            lock.acquire()
        except Timeout as error:
            raise UserError(
                f"another process is writing {str(self.out)!r}. "
                "Wait until it ends, or choose another directory."
            ) from error
        except OSError as error:
            raise write_error(self.out, error) from error
        return lock

    def _remove_unfinished(self) -> None:
        """Remove all files that do not belong to a finished shard."""
        for path in (*self.shards.iterdir(), *self.records.iterdir()):
            is_finished = (self.records / f"{path.stem}.json").is_file()
            if not is_finished or path.suffix not in (".tar", ".json"):
                path.unlink()

    def _paths(self, number: int) -> tuple[Path, Path]:
        """Return the paths of a shard's record and tar."""
        name = f"shard-{number:06d}"
        return self.records / f"{name}.json", self.shards / f"{name}.tar"

    def is_finished(self, job: _Job) -> bool:
        """Return whether an interrupted run has written exactly this shard."""
        path, tar = self._paths(job.number)
        if not path.is_file():
            return False
        digest, record = self._read_digest(path)
        is_complete = record is None or _has_size(tar, record.size)
        if is_complete and digest == job.digest:
            return True
        path.unlink()
        return False

    def _read_digest(self, path: Path) -> tuple[str, ShardRecord | None]:
        try:
            digest, record, _ = _read_record(path)
        except (ValueError, LookupError, TypeError) as error:
            logger.warning("%s is corrupted (%s). Its shard is written again.", path, error)
            return "", None
        return digest, record

    def commit(self, shard: _FinishedShard) -> None:
        """Give a shard its final name, and write its record."""
        path, tar = self._paths(shard.number)
        if shard.record is None:
            shard.partial.unlink()
            tar.unlink(missing_ok=True)
        else:
            shard.partial.replace(tar)
        _write_record(path, shard)

    def finish(self, count: int) -> ShardSummary:
        """Write the index and the list of rejects of the first `count` shards, and create OUT."""
        records: list[ShardRecord] = []
        examples = RejectedExamples()
        reasons: Counter[str] = Counter()
        path = self.shards / "rejected.jsonl"
        with open(path, "w", encoding="utf-8", errors="backslashreplace") as log:
            for number in range(count):
                _, record, rejected = _read_record(self._paths(number)[0])
                if record is not None:
                    records.append(record)
                for row in rejected:
                    reasons[row[1]] += 1
                    examples.add(row)
                    log.write(rejected_line(*row))
        if not records:
            self._raise_no_utterance(reasons, examples)
        write_index(self.shards, records)
        self._remove_other_shards(records)
        self.shards.replace(self.out)
        shutil.rmtree(self.folder)
        return ShardSummary(
            index=open_index(self.out),
            rejected=dict(reasons),
            examples=tuple(examples.lines()),
        )

    def _remove_other_shards(self, records: Sequence[ShardRecord]) -> None:
        """Remove the shards of an interrupted run that had more of them."""
        wanted = {record.name for record in records} | {"rejected.jsonl", "index.bin", "index.json"}
        for path in self.shards.iterdir():
            if path.name not in wanted:
                path.unlink()

    def _raise_no_utterance(self, reasons: Counter[str], examples: "RejectedExamples") -> NoReturn:
        """Raise UserError with the reasons, and move the list of rejects beside OUT."""
        message = f"no utterance could be written to {str(self.out)!r}"
        if not reasons:
            shutil.rmtree(self.folder)
            raise UserError(f"{message}: the source has no utterance. Check the source.")
        rejects = self.out.with_name(f"{self.out.name}.rejected.jsonl")
        (self.shards / "rejected.jsonl").replace(rejects)
        shutil.rmtree(self.folder)
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        lines = [
            f"{message}: {counts}",
            *examples.lines(),
            f"All are listed in {str(rejects)!r}.",
        ]
        raise UserError("\n".join(lines))


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


class RejectedExamples:
    """A few rejected utterances, of as many reasons as possible."""

    def __init__(self) -> None:
        self.first: dict[str, Rejected] = {}  # the first example of each reason
        self.others: list[Rejected] = []

    def add(self, row: Rejected) -> None:
        """Keep a row if it is the first of its reason, or if there are few others."""
        if row[1] not in self.first:
            self.first[row[1]] = row
        elif len(self.others) < SHOWN_EXAMPLES:
            self.others.append(row)

    def lines(self) -> list[str]:
        """Return a line for each example."""
        shown = [*self.first.values(), *self.others][:SHOWN_EXAMPLES]
        return [escape(f"  {key}: {reason}: {detail}") for key, reason, detail in shown]


def rejected_line(key: str, reason: str, detail: str) -> str:
    """Return a line of rejected.jsonl."""
    return json.dumps({"key": key, "reason": reason, "detail": detail}, ensure_ascii=False) + "\n"


def _write_record(path: Path, shard: _FinishedShard) -> None:
    record = None
    if shard.record is not None:
        rows = base64.b64encode(shard.record.rows.tobytes()).decode()
        record = dataclasses.asdict(shard.record) | {"rows": rows}
    partial = path.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump({"digest": shard.digest, "record": record, "rejected": shard.rejected}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _read_record(path: Path) -> tuple[str, ShardRecord | None, list[Rejected]]:
    """Return (digest, index record, rejects) of a finished shard."""
    content = parse_json(path.read_text(encoding="utf-8"))
    fields = content["record"]
    record = None
    if fields is not None:
        # the copy is writable, because write_index numbers the shards
        rows = np.frombuffer(base64.b64decode(fields["rows"]), ROW).copy()
        record = ShardRecord(**fields | {"rows": rows})
    return content["digest"], record, [tuple(row) for row in content["rejected"]]
