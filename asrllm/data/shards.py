"""Writing shards: WebDataset tars of KEY.flac + KEY.json, the index, and a row for everything rejected."""

import collections
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import webdataset

from asrllm.data.index import Index, write_index
from asrllm.data.sources import Utterance
from asrllm.errors import UserError

MAX_TEXT_BYTES = 10_000
MAX_DURATION_ERROR = 0.1  # seconds between what the source says and what the audio holds


class RejectedError(Exception):
    """Why an utterance does not become a sample: (reason, detail)."""


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """index: of what was written; rejected: utterances by reason."""

    index: Index
    rejected: dict[str, int]


def write_shards(
    out: str | Path,
    utterances: Iterable[Utterance],
    *,
    utterances_per_shard: int = 1000,
    workers: int = 2,
    fields: dict[str, Any] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> ShardSummary:
    """Write `out/shard-NNNNNN.tar`, `index.bin`, `index.json` and `rejected.jsonl`; `out` appears when all is complete.

    fields: written into every KEY.json where the utterance has none of that name (lang, corpus). advance: called once an utterance.
    Raises UserError where `out` exists, or where nothing could be written (its reasons are in the message).
    """
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{str(out)!r} is not empty: choose another directory, or remove it to make the shards again")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", suffix=".partial", dir=out.parent))
        partial.chmod(0o755)
    except OSError as error:
        raise UserError(f"{str(out)!r} cannot be written: {error}") from error
    try:
        shards, rejected = _write_partial(partial, utterances, utterances_per_shard, workers, fields or {}, advance)
        if not shards:
            reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(rejected.items())) or "the source has no utterance"
            raise UserError(f"no utterance could be written to {str(out)!r}: {reasons}")
        index = write_index(partial, shards)
        partial.replace(out)
    except BaseException:
        shutil.rmtree(partial)
        raise
    return ShardSummary(index=Index(rows=index.rows, shards=[out / p.name for p in shards]), rejected=rejected)


def _write_partial(
    folder: Path,
    utterances: Iterable[Utterance],
    size: int,
    workers: int,
    fields: dict[str, Any],
    advance: Callable[[], None],
) -> tuple[list[Path], dict[str, int]]:
    """The tars, and how many utterances were rejected for which reason; `rejected.jsonl` says which."""
    rejected: collections.Counter[str] = collections.Counter()
    with open(folder / "rejected.jsonl", "w", encoding="utf-8") as log:

        def reject(key: str, reason: str, detail: str) -> None:
            rejected[reason] += 1
            log.write(json.dumps({"key": key, "reason": reason, "detail": detail}, ensure_ascii=False) + "\n")

        samples = _samples(utterances, fields, workers, reject, advance)
        return list(_write_tars(folder, samples, size)), dict(rejected)


def _samples(
    utterances: Iterable[Utterance],
    fields: dict[str, Any],
    workers: int,
    reject: Callable[[str, str, str], None],
    advance: Callable[[], None],
) -> Iterator[dict[str, Any]]:
    """WebDataset samples in the source's order; audio is read and encoded by threads, a bounded number ahead."""
    seen: set[str] = set()
    pending: collections.deque[tuple[str, Future[dict[str, Any]]]] = collections.deque()

    def finished() -> Iterator[dict[str, Any]]:
        key, future = pending.popleft()
        advance()
        try:
            yield future.result()
        except RejectedError as why:
            reject(key, *why.args)

    with ThreadPoolExecutor(workers) as pool:
        for utterance in utterances:
            key = utterance.key.replace(".", "_")  # WebDataset ends a key at the first dot
            if key in seen:
                advance()
                reject(utterance.key, "duplicate_key", f"the tar's key {key!r} is taken")
                continue
            seen.add(key)
            pending.append((utterance.key, pool.submit(make_sample, key, utterance, fields)))
            if len(pending) > 4 * workers:
                yield from finished()
        while pending:
            yield from finished()


def make_sample(key: str, utterance: Utterance, fields: dict[str, Any]) -> dict[str, Any]:
    """The tar members of one utterance; raises RejectedError with the reason where it is not fit to be one."""
    text = utterance.text.strip()
    if not text:
        raise RejectedError("empty_text", "the transcript is empty")
    if len(text.encode("utf-8")) > MAX_TEXT_BYTES:
        raise RejectedError("long_text", f"the transcript has more than {MAX_TEXT_BYTES} bytes")
    try:
        wave, rate = utterance.load()
    except Exception as error:  # whatever a decoder raises, it is this utterance's row in rejected.jsonl
        raise RejectedError("unreadable_audio", f"{type(error).__name__}: {error}") from error
    if not len(wave):
        raise RejectedError("empty_audio", "the audio has no sample")
    if not np.isfinite(wave).all():
        raise RejectedError("non_finite_audio", "the audio holds NaN or infinite values")
    duration = len(wave) / rate
    if utterance.duration is not None and abs(duration - utterance.duration) > MAX_DURATION_ERROR:
        raise RejectedError("duration_mismatch", f"the source says {utterance.duration:.3f} s, the audio has {duration:.3f} s")
    flac = io.BytesIO()
    try:
        soundfile.write(flac, wave, rate, format="FLAC", subtype="PCM_16")
    except (RuntimeError, ValueError) as error:
        raise RejectedError("not_encodable", f"{rate} Hz as FLAC: {error}") from error
    about = fields | {"text": text, "duration": duration, "sampling_rate": rate} | utterance.fields
    return {"__key__": key, "flac": flac.getvalue(), "json": json.dumps(about, ensure_ascii=False).encode("utf-8")}


def _write_tars(folder: Path, samples: Iterator[dict[str, Any]], size: int) -> Iterator[Path]:
    """Tars of `size` samples; the same samples give the same bytes."""
    writer, count = None, 0
    try:
        for sample in samples:
            if writer is None or count % size == 0:
                if writer is not None:
                    writer.close()
                path = folder / f"shard-{count // size:06d}.tar"
                writer = webdataset.TarWriter(str(path), encoder=False, mtime=0, user="", group="")
                yield path
            writer.write(sample)
            count += 1
    finally:
        if writer is not None:
            writer.close()
