"""The working directory `.OUT.partial`, in which shards are written until all are complete.

shards/     the tars; becomes OUT by one rename
records/    one file per finished shard: its index record, its rejects, and the digest of what
            it was made from. A shard with a record is finished.
lock        held by the process that writes, which alone gives a shard its final name
"""

import base64
import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from filelock import Timeout

from asrllm.atomic import replaceable_folder, write_error
from asrllm.data.index import ROW, ShardRecord, open_index, write_index
from asrllm.data.rejects import Rejected, RejectedExamples, rejected_line
from asrllm.data.samples import Codec
from asrllm.data.shard_summary import ShardSummary
from asrllm.data.sources import Utterance
from asrllm.errors import UserError
from asrllm.locks import FileLock
from asrllm.text_files import parse_json

# Increment this when the same utterances and options give other bytes.
WRITER_VERSION = 2
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardJob:
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
class FinishedShard:
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


class WorkDir:
    """The directory `.OUT.partial`. See the module's docstring for its content."""

    def __init__(self, out: Path) -> None:
        self.out = _free_folder(out)
        self.folder = self.out.with_name(f".{self.out.name}.partial")
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

    def is_finished(self, job: ShardJob) -> bool:
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

    def commit(self, shard: FinishedShard) -> None:
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
                    reasons[row.reason] += 1
                    examples.add(row)
                    log.write(rejected_line(row))
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

    def _raise_no_utterance(self, reasons: Counter[str], examples: RejectedExamples) -> NoReturn:
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


def _free_folder(out: Path) -> Path:
    """Return the resolved path of the output directory.

    Raises:
        UserError: it cannot be created, is not empty, or is a mount point.
    """
    fix = "Choose another directory, or remove it to make the shards again."
    return replaceable_folder(out, "", fix)


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _write_record(path: Path, shard: FinishedShard) -> None:
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
    return content["digest"], record, [Rejected(*row) for row in content["rejected"]]
