"""Writing shards: WebDataset tars of KEY.flac + KEY.json, the index, and a row for everything rejected.

Shard k holds the source's utterances k*n to (k+1)*n without the rejected ones, so each is made by itself: by any of several processes, and
again only where an interrupted run has not finished it. Until all are there, the work lies in `.OUT.partial` beside OUT:

    shards/         the tars; becomes OUT by one rename
    records/        what is known of each finished shard, and the digest of what it was made from; its presence makes the shard finished
    lock            held by the process that writes; the only one that gives a shard its name
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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import soundfile
from filelock import Timeout

from asrllm.audio.stream import OutsideError
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
from asrllm.defaults import KEPT_EXTENSIONS
from asrllm.errors import UserError
from asrllm.locks import FileLock
from asrllm.text_files import parse_json

logger = logging.getLogger(__name__)
MAKING = 2  # changes when the same utterances and options give other bytes
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
    """index: of what was written; rejected: utterances by reason; kept: shards that an interrupted run had finished."""

    index: Index
    rejected: dict[str, int]
    kept: int = 0
    examples: tuple[str, ...] = ()  # lines on rejected utterances


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
    """Write `out/shard-NNNNNN.tar`, `index.bin`, `index.json` and `rejected.jsonl`; `out` appears when all is complete.

    workers: processes; with 1 everything happens in this one, and utterances need not be picklable. fields: written into every KEY.json
    where the utterance has none of that name (lang, corpus). codec: FLAC of 16 bits, or to keep the bytes of whole audio files. seed: to
    shuffle the utterances, which are then held in memory. advance, keep: told of utterances that were written now, or by an earlier run.
    The same utterances and options give the same bytes. A number without a shard is one whose utterances were all rejected. Raises
    UserError where `out` exists, where another process writes it, or where nothing could be written.
    """
    work = _Workplace(Path(out).absolute())
    if seed is not None:
        utterances = list(utterances)
        random.Random(seed).shuffle(utterances)
    counts: Counter[str] = Counter()

    def jobs() -> Iterator[_Job]:
        """Of the shards that are not finished yet."""
        for number, chunk in enumerate(_chunks(utterances, utterances_per_shard)):
            job = _Job(number, chunk, work.shards, fields or {}, codec)
            counts["all"] += 1
            if work.is_finished(job):
                counts["kept"] += 1
                (keep or advance)(len(chunk))
            else:
                yield job

    with work.locked():
        with closing(run_parallel(_make_shard, jobs(), workers, advance)) as finished:
            for _, made in finished:
                work.commit(made)
        return dataclasses.replace(work.finish(counts["all"]), kept=counts["kept"])


def _chunks(utterances: Iterable[Utterance], size: int) -> Iterator[list[Utterance]]:
    """The utterances of each shard; repeated keys are marked as a problem."""
    iterator, seen = iter(utterances), SeenKeys()
    while chunk := list(itertools.islice(iterator, size)):
        usable = [i for i, utterance in enumerate(chunk) if utterance.problem is None]
        keys = [tar_key(chunk[i].key) for i in usable]
        for i, key, repeated in zip(usable, keys, seen.add(hash_keys(keys)), strict=True):
            if repeated:
                chunk[i] = dataclasses.replace(
                    chunk[i], problem=("duplicate_key", f"the tar's key {key!r} is taken")
                )
        yield chunk


class SeenKeys:
    """A set of 64-bit hashes that takes 8 bytes for each: sorted runs, each longer than twice the next."""

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Which of them (n,) were there before, or earlier among these."""
        _, first = np.unique(hashes, return_index=True)
        repeated: np.ndarray = np.ones(len(hashes), bool)
        repeated[first] = False
        for run in self.runs:
            places = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            repeated |= run[places] == hashes
        if len(fresh := np.sort(hashes[~repeated])):
            self.runs.append(fresh)
        while len(self.runs) > 1 and len(self.runs[-2]) <= 2 * len(self.runs[-1]):
            last = self.runs.pop()
            self.runs[-1] = np.union1d(self.runs[-1], last)
        return repeated


def hash_keys(keys: Sequence[str]) -> np.ndarray:
    digests = (
        hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        for key in keys
    )
    return np.frombuffer(b"".join(digests), np.uint64)


def tar_key(key: str) -> str:
    """WebDataset ends a key at the first dot; a tar's names do not begin at the root."""
    return key.replace(".", "_").lstrip("/")


# --- one shard ---


@dataclass(frozen=True)
class _Job:
    number: int
    utterances: list[Utterance]
    folder: Path
    fields: dict[str, Any]
    codec: Codec

    @property
    def digest(self) -> str:
        """Of the utterances, by what they and their `load` say of themselves, and of the options."""
        digest = hashlib.sha256(repr((MAKING, self.fields, self.codec)).encode())
        for utterance in self.utterances:
            digest.update(repr(utterance).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


@dataclass(frozen=True)
class _Made:
    """A shard under a passing name; record None: all was rejected."""

    number: int
    digest: str
    partial: Path
    record: ShardRecord | None
    rejected: list[Rejected]


def _make_shard(job: _Job, advance: Advance) -> _Made:
    name = f"shard-{job.number:06d}.tar"
    partial = (
        job.folder / f"{name}.{os.getpid()}"
    )  # a worker that outlives its killed parent does not meet the next run's
    rejected: list[Rejected] = []
    try:
        with open(partial, "wb") as file, tarfile.open(fileobj=file, mode="w|") as tar:
            for utterance in job.utterances:
                try:
                    sample = make_sample(utterance, job.fields, job.codec)
                except RejectedError as why:
                    rejected.append((utterance.key, *why.args))
                else:
                    write_sample(tar, sample)
                advance(1)
            tar.close()
            os.fsync(
                file.fileno()
            )  # before its record says that it is whole, even if the power fails
        record, bad, _ = scan_shard(partial, name=name)
    except ConnectionError:  # of `advance`: nobody waits for this shard any more
        raise
    except OSError as error:
        raise UserError(f"{str(partial)!r} cannot be written: {error}") from error
    rejected += [(sample.key, sample.reason, sample.detail) for sample in bad]
    return _Made(job.number, job.digest, partial, record if len(record.rows) else None, rejected)


def write_sample(tar: tarfile.TarFile, sample: dict[str, Any]) -> None:
    """Append the members of one sample, byte for byte as `webdataset.TarWriter` does.

    webdataset itself would import torch, which takes 2 s in every worker process.

    Args:
        tar: a tar open for writing.
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
    """The tar members of one utterance; raises RejectedError with the reason where it is not fit to be one."""
    key, text = tar_key(utterance.key), utterance.text.strip()
    _check_names(utterance, key, text)
    wave, rate = _load(utterance)
    duration = len(wave) / rate
    if utterance.duration is not None and abs(duration - utterance.duration) > MAX_DURATION_ERROR:
        raise RejectedError(
            "duration_mismatch",
            f"the source says {utterance.duration:.3f} s, the audio has {duration:.3f} s",
        )
    known = fields | utterance.fields | {"text": text, "duration": duration, "sampling_rate": rate}
    about = {name: known[name] for name in (*FIELD_ORDER, *known) if name in known}
    try:
        content = json.dumps(about, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RejectedError(
            "broken_text", f"the transcript or a field is not UTF-8 text: {error}"
        ) from error
    extension, audio = _audio(utterance, wave, rate, codec)
    return {"__key__": key, extension: audio, "json": content}


def _check_names(utterance: Utterance, key: str, text: str) -> None:
    """What is known without the audio."""
    if utterance.problem is not None:
        raise RejectedError(*utterance.problem)
    if not key or key.endswith("/") or not key.isprintable():
        raise RejectedError("bad_key", f"the key {utterance.key!r} cannot be a file name")
    if not text:
        raise RejectedError("empty_text", "the transcript is empty")
    if len(text.encode("utf-8", "replace")) > MAX_TEXT_BYTES:
        raise RejectedError("long_text", f"the transcript has more than {MAX_TEXT_BYTES} bytes")


def _load(utterance: Utterance) -> tuple[np.ndarray, int]:
    try:
        wave, rate = utterance.load()
    except RejectedError:
        raise
    except UserError as error:
        reason = "outside_audio" if isinstance(error, OutsideError) else "unreadable_audio"
        raise RejectedError(reason, str(error)) from error
    except ImportError as error:
        raise UserError(f"a package is missing: {error}. Install it with pip.") from error
    except (
        Exception
    ) as error:  # whatever a decoder raises, it is this utterance's row in rejected.jsonl
        raise RejectedError("unreadable_audio", f"{type(error).__name__}: {error}") from error
    if not len(wave):
        raise RejectedError("empty_audio", "the audio has no sample")
    if not np.isfinite(wave).all():
        raise RejectedError("non_finite_audio", "the audio holds NaN or infinite values")
    return wave, rate


def _audio(utterance: Utterance, wave: np.ndarray, rate: int, codec: Codec) -> tuple[str, bytes]:
    """(extension, bytes) of the tar's member."""
    extension = utterance.file.suffix.lower().removeprefix(".") if utterance.file else ""
    if codec == "keep" and utterance.file and extension in KEPT_EXTENSIONS:
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


# --- the workplace beside OUT ---


class _Workplace:
    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out.with_name(f".{out.name}.partial")
        self.shards, self.records = self.folder / "shards", self.folder / "records"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone with the workplace; what stays in it after an error are finished shards, or nothing."""
        self._check_free()
        try:
            for folder in (self.shards, self.records):
                folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / "lock", blocking=False)
            lock.acquire()
        except Timeout as error:
            raise UserError(
                f"another process is writing {str(self.out)!r}: wait for it, or choose another directory"
            ) from error
        except OSError as error:
            raise UserError(f"{str(self.out)!r} cannot be written: {error}") from error
        try:
            self._check_free()  # the other process may have finished while this one waited
            self._tidy()
            yield
        except BaseException:
            if finished := len(list(self.records.glob("shard-*.json"))):
                logger.warning(
                    "%d finished shards are kept in %s: run the same again to go on from there",
                    finished,
                    self.folder,
                )
            else:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise
        finally:
            lock.release()

    def _check_free(self) -> None:
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(
                f"{str(self.out)!r} is not empty: choose another directory, or remove it to make the shards again"
            )

    def _tidy(self) -> None:
        """Remove what no record stands for."""
        for path in (*self.shards.iterdir(), *self.records.iterdir()):
            if not (self.records / f"{path.stem}.json").is_file() or path.suffix not in (
                ".tar",
                ".json",
            ):
                path.unlink()

    def is_finished(self, job: _Job) -> bool:
        """Whether an interrupted run has made this very shard."""
        path = self.records / f"shard-{job.number:06d}.json"
        if not path.is_file():
            return False
        try:
            digest, record, _ = _read_record(path)
        except (ValueError, LookupError, TypeError) as error:
            logger.warning("%s is corrupted (%s), so its shard is made again", path, error)
            digest, record = "", None
        tar = self.shards / f"{path.stem}.tar"
        whole = record is None or (tar.is_file() and tar.stat().st_size == record.size)
        if whole and digest == job.digest:
            return True
        path.unlink()
        return False

    def commit(self, made: _Made) -> None:
        path = self.records / f"shard-{made.number:06d}.json"
        tar = self.shards / f"{path.stem}.tar"
        if made.record is None:
            made.partial.unlink()
            tar.unlink(missing_ok=True)
        else:
            made.partial.replace(tar)
        _write_record(path, made)

    def finish(self, count: int) -> ShardSummary:
        """Of the first `count` shards; OUT appears with everything in it."""
        records: list[ShardRecord] = []
        examples: dict[str, Rejected] = {}
        reasons: Counter[str] = Counter()
        with open(
            self.shards / "rejected.jsonl", "w", encoding="utf-8", errors="backslashreplace"
        ) as log:
            for number in range(count):
                _, record, rejected = _read_record(self.records / f"shard-{number:06d}.json")
                records += [record] if record else []
                reasons.update(reason for _, reason, _ in rejected)
                log.writelines(rejected_line(*row) for row in rejected)
                for row in rejected:
                    examples.setdefault(row[1], row)
        if not records:
            self._refuse(reasons, examples)
        write_index(self.shards, records)
        wanted = {record.name for record in records} | {"rejected.jsonl", "index.bin", "index.json"}
        for path in self.shards.iterdir():  # shards of an earlier run that had more of them
            if path.name not in wanted:
                path.unlink()
        self.shards.replace(self.out)
        shutil.rmtree(self.folder)
        return ShardSummary(
            index=open_index(self.out),
            rejected=dict(reasons),
            examples=tuple(examples_of(examples)),
        )

    def _refuse(self, reasons: Counter[str], examples: dict[str, Rejected]) -> NoReturn:
        """Say why there is no utterance, and keep the list of the rejected ones beside OUT."""
        message = f"no utterance could be written to {str(self.out)!r}"
        if not reasons:
            shutil.rmtree(self.folder)
            raise UserError(f"{message}: the source has no utterance. Check the source.")
        kept = self.out.with_name(f"{self.out.name}.rejected.jsonl")
        (self.shards / "rejected.jsonl").replace(kept)
        shutil.rmtree(self.folder)
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        lines = [f"{message}: {counts}", *examples_of(examples), f"All are in {str(kept)!r}."]
        raise UserError("\n".join(lines))


def examples_of(examples: dict[str, Rejected]) -> list[str]:
    """Return a line for the first rejected utterance of some reasons."""
    return [
        f"  {key}: {reason}: {detail}"
        for key, reason, detail in itertools.islice(examples.values(), SHOWN_EXAMPLES)
    ]


def rejected_line(key: str, reason: str, detail: str) -> str:
    return json.dumps({"key": key, "reason": reason, "detail": detail}, ensure_ascii=False) + "\n"


def _write_record(path: Path, made: _Made) -> None:
    record = made.record and dataclasses.asdict(made.record) | {
        "rows": base64.b64encode(made.record.rows.tobytes()).decode()
    }
    partial = path.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump({"digest": made.digest, "record": record, "rejected": made.rejected}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _read_record(path: Path) -> tuple[str, ShardRecord | None, list[Rejected]]:
    """(digest, record, rejected) of a finished shard."""
    about = parse_json(path.read_text(encoding="utf-8"))
    record = about["record"]
    if record is not None:
        rows = np.frombuffer(
            base64.b64decode(record["rows"]), ROW
        ).copy()  # writable: write_index numbers the shards
        record = ShardRecord(**record | {"rows": rows})
    return about["digest"], record, [tuple(row) for row in about["rejected"]]
