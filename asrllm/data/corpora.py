"""Data configs: the YAML lists that name the corpora of training, validation and testing."""

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from asrllm.config import read_yaml
from asrllm.data.config import FilterConfig
from asrllm.data.index import RATE, Index, open_index
from asrllm.data.shards import write_shards
from asrllm.data.sources import read_cuts
from asrllm.errors import UserError, nearest

logger = logging.getLogger(__name__)
MAX_WEIGHT = 1000
CORPUS_KEYS: dict[str, Any] = {
    "name": str, "manifest": str, "shards": str, "hours": (int, float), "weights": (int, float), "lang": str, "prompts": list,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One entry of a data config. rows: the rows of `index` that pass the filters."""

    name: str
    index: Index
    rows: np.ndarray
    weight: float = 1.0
    lang: str | None = None
    prompts: tuple[str, ...] = ()


def read_corpora(path: str | Path, *, filters: FilterConfig | None, cache: Path) -> list[Corpus]:
    """The corpora of a data config: a list of `{manifest | shards, hours, weights, lang, prompts}`; `name` for test sets.

    A `manifest` (Lhotse cuts) is written as shards below `cache` once and read from there. Raises UserError naming the file and the entry.
    """
    entries = read_yaml(path, "the data config")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"the data config {str(path)!r} must be a list of entries with 'shards: DIR' or 'manifest: CUTS'")
    return [_read_entry(entry, f"{path}, entry {i}", filters, cache) for i, entry in enumerate(entries, 1)]


def _read_entry(entry: Any, where: str, filters: FilterConfig | None, cache: Path) -> Corpus:
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: expected keys such as 'shards: DIR', found {entry!r}")
    for key in entry:
        if key not in CORPUS_KEYS:
            raise UserError(f"{where}: unknown key {key!r}: {nearest(str(key), CORPUS_KEYS)}")
        if not isinstance(entry[key], CORPUS_KEYS[key]) or isinstance(entry[key], bool):
            raise UserError(f"{where}: {key}={entry[key]!r} has the wrong type")
    if ("shards" in entry) == ("manifest" in entry):
        raise UserError(f"{where}: give either 'shards: DIR' or 'manifest: CUTS.jsonl.gz'")
    index = open_index(entry["shards"]) if "shards" in entry else _manifest_index(Path(entry["manifest"]), cache)
    name = str(entry.get("name") or Path(entry.get("shards") or entry["manifest"]).name.partition(".")[0])
    weight = float(entry.get("weights", 1.0))
    if not 0 < weight <= MAX_WEIGHT:
        raise UserError(f"{where}: weights={weight} must be above 0 and at most {MAX_WEIGHT}; leave the entry out instead of weighing it 0")
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise UserError(f"{where}: name={name!r} becomes a part of file names: use letters, digits, '-', '_', '.' and '+'")
    _check_hours(entry, index, where)
    prompts = tuple(entry.get("prompts") or ())
    if not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise UserError(f"{where}: prompts={list(prompts)!r} must be a list of texts")
    rows = _filtered(name, index, filters) if filters else np.arange(len(index))
    if not len(rows) or not round(weight * len(rows)):
        raise UserError(f"{where}: no utterance is left after data.filter and weights: widen them")
    return Corpus(name=name, index=index, rows=rows, weight=weight, lang=entry.get("lang"), prompts=prompts)


def _check_hours(entry: Mapping[str, Any], index: Index, where: str) -> None:
    """`hours` is stated by people; the index has counted."""
    stated = entry.get("hours")
    if stated is not None and not 0.5 <= float(stated) / max(index.hours, 1e-9) <= 2:
        logger.warning("%s: hours=%s, but the index counts %.2f h; the index is used", where, stated, index.hours)


def _manifest_index(manifest: Path, cache: Path) -> Index:
    """Shards made from a cuts manifest, once: the first process to hold the lock makes them."""
    if not manifest.is_file():
        raise UserError(f"the manifest {str(manifest)!r} does not exist: check the path")
    if next(read_cuts(manifest), None) is None:
        raise UserError(f"the manifest {str(manifest)!r} has no utterance: make it again")
    stamp = f"{manifest.resolve()} {manifest.stat().st_size} {manifest.stat().st_mtime_ns}"
    folder = cache / f"{manifest.name.partition('.')[0]}-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            logger.warning("writing shards from %s to %s; 'asrllm shards make' does this ahead of training", manifest, folder)
            summary = write_shards(folder, read_cuts(manifest))
            if summary.rejected:
                logger.warning("rejected of %s: %s; see %s", manifest, summary.rejected, folder / "rejected.jsonl")
    return open_index(folder)


def _filtered(name: str, index: Index, filters: FilterConfig) -> np.ndarray:
    seconds = index.rows["samples"] / RATE
    reasons = {
        "too_short": seconds < filters.min_duration,
        "too_long": seconds > filters.max_duration,
        "too_fast": index.rows["text_bytes"] > filters.max_bytes_per_second * seconds,
        "empty_text": index.rows["text_bytes"] == 0,
    }
    dropped = {reason: int(mask.sum()) for reason, mask in reasons.items() if mask.any()}
    if dropped:
        logger.warning("%s: data.filter drops %s of %d utterances", name, dropped, len(index))
    return np.flatnonzero(~np.logical_or.reduce(list(reasons.values())))
