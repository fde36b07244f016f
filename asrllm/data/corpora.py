"""Data configs: the YAML lists that name the corpora of training, validation and testing."""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asrllm.data.cache import ShardCache
from asrllm.data.config import FilterConfig
from asrllm.data.index import RATE, Index, open_index
from asrllm.data.parallel import usable_cores
from asrllm.data.prompts import Prompt, parse_prompts
from asrllm.data.shards import write_shards
from asrllm.data.sources import read_cuts
from asrllm.errors import UserError, nearest
from asrllm.locks import FileLock
from asrllm.text_files import read_yaml

logger = logging.getLogger(__name__)
MAX_WEIGHT = 1000
CHUNK = 1 << 18  # rows looked at together
SEEN = 100_000
MUCH_DROPPED = 0.05  # of a corpus's utterances, above which the filters are probably not meant so
HOURS_TOLERANCE = 0.1  # stated hours are rounded: "960 h" of LibriSpeech are 961.05
CORPUS_KEYS: dict[str, Any] = {
    "name": str, "manifest": str, "shards": str, "hours": (int, float), "weights": (int, float), "lang": str, "prompts": list,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One entry of a data config. kept, kept_hours: what passes the filters; dropped: utterances that do not, by reason.

    hours: as the data config states them, else kept_hours.
    """

    name: str
    index: Index
    filters: FilterConfig | None
    kept: int
    kept_hours: float
    dropped: dict[str, int]
    hours: float
    weight: float = 1.0
    lang: str | None = None
    prompts: tuple[Prompt, ...] = ()

    def passes(self, rows: np.ndarray) -> np.ndarray:
        """(n,) of index.ROW -> (n,) bool"""
        return ~np.logical_or.reduce(list(_reasons(rows, self.filters).values()), axis=0)


def make_corpus(
    name: str,
    index: Index,
    filters: FilterConfig | None,
    *,
    hours: float | None = None,
    **more: Any,
) -> Corpus:
    """A corpus of an index, its utterances counted by one pass over the rows."""
    dropped: Counter[str] = Counter()
    kept = samples = 0
    for start in range(0, len(index), CHUNK):
        rows = index.rows[start : start + CHUNK]
        reasons = _reasons(rows, filters)
        passes = ~np.logical_or.reduce(list(reasons.values()), axis=0)
        kept += int(passes.sum())
        samples += int(rows["samples"][passes].sum(dtype=np.int64))
        if kept < start + len(rows):
            dropped += Counter({reason: int(mask.sum()) for reason, mask in reasons.items()})
    seconds = samples / RATE / 3600
    return Corpus(
        name=name,
        index=index,
        filters=filters,
        kept=kept,
        kept_hours=seconds,
        dropped=dict(dropped),
        hours=hours or seconds,
        **more,
    )


def long_utterance(corpora: Sequence[Corpus]) -> float:
    """Seconds: of all that pass the filters, one utterance in a hundred is longer; looked for among at most SEEN of each corpus."""
    chosen = [corpus.index.rows[:: -(-len(corpus.index) // SEEN)] for corpus in corpora]
    samples = np.concatenate(
        [rows["samples"][corpus.passes(rows)] for corpus, rows in zip(corpora, chosen, strict=True)]
    )
    return round(float(np.percentile(samples, 99)) / RATE, 2) if len(samples) else 0.0


def _reasons(rows: np.ndarray, filters: FilterConfig | None) -> dict[str, np.ndarray]:
    """Why rows are left out of training; an utterance may have several reasons."""
    if filters is None:
        return {"none": np.zeros(len(rows), bool)}
    samples, characters = rows["samples"], rows["text_chars"]
    return {
        "too_short": samples < filters.min_duration * RATE,
        "too_long": samples > filters.max_duration * RATE,
        "too_fast": characters > filters.max_chars_per_second / RATE * samples,
        "empty_text": characters == 0,
    }


def read_corpora(
    path: str | Path, *, filters: FilterConfig | None, made: Path, cache: ShardCache | None = None
) -> list[Corpus]:
    """The corpora of a data config: a list of `{manifest | shards, hours, weights, lang, prompts}`; `name` for test sets.

    A `manifest` (Lhotse cuts) is written as shards below `made` once and read from there; `cache` keeps shards that are URLs.
    Raises UserError naming the file and the entry.
    """
    entries = read_yaml(path, "the data config")
    if not isinstance(entries, list) or not entries:
        raise UserError(
            f"the data config {str(path)!r} must be a list of entries with 'shards: DIR' or 'manifest: CUTS'"
        )
    return [
        _read_entry(entry, f"{path}, entry {i}", filters, made, cache)
        for i, entry in enumerate(entries, 1)
    ]


def _read_entry(
    entry: Any, where: str, filters: FilterConfig | None, made: Path, cache: ShardCache | None
) -> Corpus:
    _check_keys(entry, where)
    name = str(
        entry.get("name") or Path(entry.get("shards", entry.get("manifest"))).name.partition(".")[0]
    )
    weight = float(entry.get("weights", 1.0))
    if not 0 < weight <= MAX_WEIGHT:
        raise UserError(
            f"{where}: weights={weight} must be above 0 and at most {MAX_WEIGHT}; leave the entry out instead of weighing it 0"
        )
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise UserError(
            f"{where}: name={name!r} becomes a part of file names: use letters, digits, '-', '_', '.' and '+'"
        )
    prompts = parse_prompts(entry.get("prompts") or [], where)
    index = (
        open_index(entry["shards"], cache)
        if "shards" in entry
        else _manifest_index(Path(entry["manifest"]), made)
    )
    hours = _stated_hours(entry, index, where)
    corpus = make_corpus(
        name, index, filters, hours=hours, weight=weight, lang=entry.get("lang"), prompts=prompts
    )
    log_dropped(corpus)
    if not corpus.kept or not round(weight * corpus.kept):
        raise UserError(f"{where}: no utterance is left after data.filter and weights: widen them")
    return corpus


def log_dropped(corpus: Corpus) -> None:
    """Log what data.filter drops of a corpus: as a warning if it is more than a few utterances in a hundred."""
    total = len(corpus.index)
    count = total - corpus.kept
    if not count:
        return
    reasons = ", ".join(f"{number} {reason}" for reason, number in corpus.dropped.items() if number)
    level = logging.WARNING if count > MUCH_DROPPED * total else logging.INFO
    message = "%s: data.filter drops %d of %d utterances (%.1f %%): %s. Widen data.filter if you need them."
    logger.log(level, message, corpus.name, count, total, 100 * count / total, reasons)


def _check_keys(entry: Any, where: str) -> None:
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: expected keys such as 'shards: DIR', found {entry!r}")
    for key in entry:
        if key not in CORPUS_KEYS:
            raise UserError(f"{where}: unknown key {key!r}: {nearest(str(key), CORPUS_KEYS)}")
        if not isinstance(entry[key], CORPUS_KEYS[key]) or isinstance(entry[key], bool):
            expected = {str: "text: put it in quotes", list: "a list"}.get(
                CORPUS_KEYS[key], "a number"
            )
            raise UserError(
                f"{where}: {key}={entry[key]!r} has the wrong type: it must be {expected}"
            )
    if ("shards" in entry) == ("manifest" in entry):
        raise UserError(f"{where}: give either 'shards: DIR' or 'manifest: CUTS.jsonl.gz'")


def _stated_hours(entry: Mapping[str, Any], index: Index, where: str) -> float | None:
    """`hours` is stated by people; the index has counted."""
    stated = entry.get("hours")
    if stated is not None and not 0 < stated <= 10**9:
        raise UserError(
            f"{where}: hours={stated} must be above 0 and at most 1000000000; leave it out to use what the index counts"
        )
    if stated is not None and abs(float(stated) - index.hours) > HOURS_TOLERANCE * index.hours:
        message = (
            "%s: hours=%g contradicts the index, which counts %.4g h. Correct it or leave it out: "
            "data.use_infinite_dataset=true mixes corpora by the stated hours."
        )
        logger.warning(message, where, stated, index.hours)
    return None if stated is None else float(stated)


def _manifest_index(manifest: Path, made: Path) -> Index:
    """Shards made from a cuts manifest, once: the first process to hold the lock makes them."""
    if not manifest.is_file():
        raise UserError(f"the manifest {str(manifest)!r} does not exist: check the path")
    if next(read_cuts(manifest), None) is None:
        raise UserError(f"the manifest {str(manifest)!r} has no utterance: make it again")
    stamp = f"{manifest.resolve()} {manifest.stat().st_size} {manifest.stat().st_mtime_ns}"
    folder = (
        made
        / f"{manifest.name.partition('.')[0]}-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}"
    )
    made.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            logger.warning(
                "writing shards from %s to %s; 'asrllm shards make' does this ahead of training",
                manifest,
                folder,
            )
            summary = write_shards(folder, read_cuts(manifest), workers=usable_cores())
            if summary.rejected:
                logger.warning(
                    "rejected of %s: %s; see %s",
                    manifest,
                    summary.rejected,
                    folder / "rejected.jsonl",
                )
    return open_index(folder)
