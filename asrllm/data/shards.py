"""Write shards: WebDataset tars of KEY.flac + KEY.json, their index, and a list of rejects.

Shard k holds the source's utterances k*n to (k+1)*n without the rejected ones. Each shard is
therefore independent: any of several processes can write it, and after an interruption only the
unfinished ones are written again: see shard_work_dir.py.
"""

import dataclasses
import itertools
import os
import random
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from asrllm.atomic import write_error
from asrllm.data.index import scan_shard
from asrllm.data.keys import SeenKeys, hash_keys, tar_key
from asrllm.data.parallel import Advance, run_parallel
from asrllm.data.rejects import Rejected
from asrllm.data.samples import Codec, make_sample, write_sample
from asrllm.data.shard_summary import ShardSummary
from asrllm.data.shard_work_dir import FinishedShard, ShardJob, WorkDir
from asrllm.data.sources import RejectedError, Utterance


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
    advance_reused: Advance | None = None,
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
        advance_reused: receives the number of utterances that an interrupted run had already
            written; `advance` by default.

    Raises:
        UserError: `out` is not empty, another process writes it, or nothing could be written.
    """
    work = WorkDir(Path(out))
    if seed is not None:
        utterances = list(utterances)
        random.Random(seed).shuffle(utterances)
    counts: Counter[str] = Counter()

    def unfinished_jobs() -> Iterator[ShardJob]:
        for number, chunk in enumerate(_chunks(utterances, utterances_per_shard)):
            job = ShardJob(number, chunk, work.shards, fields or {}, codec)
            counts["all"] += 1
            if work.is_finished(job):
                counts["reused"] += 1
                (advance_reused or advance)(len(chunk))
            else:
                yield job

    with work.locked():
        with closing(run_parallel(_write_shard, unfinished_jobs(), workers, advance)) as finished:
            for _, shard in finished:
                work.commit(shard)
        return dataclasses.replace(work.finish(counts["all"]), reused=counts["reused"])


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


def _write_shard(job: ShardJob, advance: Advance) -> FinishedShard:
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
    rejected += [Rejected(sample.key, sample.reason, sample.detail) for sample in bad]
    return FinishedShard(
        number=job.number,
        digest=job.digest,
        partial=partial,
        record=record if len(record.rows) else None,
        rejected=rejected,
    )


def _write_tar(
    job: ShardJob,
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
                rejected.append(Rejected(utterance.key, *error.args))
            else:
                write_sample(tar, sample)
            advance(1)
        tar.close()
        # before its record says that it is complete, even if the power fails
        os.fsync(file.fileno())
    return rejected
