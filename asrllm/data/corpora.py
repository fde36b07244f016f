"""Data configs: YAML lists that name the corpora of training, validation and testing."""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from asrllm.data.cache import ShardCache
from asrllm.data.config import FilterConfig
from asrllm.data.index import Index, check_index_exists, open_index
from asrllm.data.parallel import usable_cores
from asrllm.data.prompts import Prompt, parse_prompts
from asrllm.data.shards import write_shards
from asrllm.data.sources import read_cuts
from asrllm.data.storage import is_url
from asrllm.defaults import RATE
from asrllm.errors import UserError
from asrllm.locks import FileLock
from asrllm.schema import Text, build, component
from asrllm.text_files import check_file, read_yaml

logger = logging.getLogger(__name__)
MAX_WEIGHT = 1000
ROWS_PER_CHUNK = 1 << 18  # rows processed together
MAX_SAMPLED_ROWS = 100_000  # rows of a corpus from which long_utterance estimates
# Filters that drop more than this ratio of a corpus are probably a mistake.
HIGH_DROP_RATIO = 0.05
WIDEN_FILTER = "Widen data.filter if you need them."
HOURS_TOLERANCE = 0.1  # stated hours are rounded: "960 h" of LibriSpeech are 961.05


@component
class CorpusEntry:
    """An entry of a data config, as the user writes it."""

    name: Text | None = None
    """part of file names; default: the name of the shards or of the manifest"""
    manifest: Text | None = None
    """Lhotse cuts, from which shards are written once"""
    shards: Text | None = None
    """directory or URL of shards; either this or manifest"""
    hours: float | None = Field(default=None, gt=0, le=10**9)
    """hours of audio for the mix of use_infinite_dataset; default: the index's count"""
    weights: float = Field(default=1.0, gt=0, le=MAX_WEIGHT)
    """how often an epoch repeats the corpus, or its factor in an endless mix"""
    lang: Text | None = None
    """language of utterances that name none"""
    prompts: list[Any] | None = None
    """prompts that replace those of prompt_file"""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One entry of a data config.

    Attributes:
        name: its name, which becomes part of file names.
        index: the index of its shards.
        filters: which utterances are used; None uses all.
        usable: utterances that pass the filters.
        usable_hours: hours of audio that pass the filters.
        dropped: utterances that do not pass, by reason.
        hours: hours as stated in the data config, or else usable_hours.
        weight: how often an epoch repeats the corpus, or its factor in an endless mix.
        lang: language of utterances that name none.
        prompts: prompts that replace the run's prompts.
    """

    name: str
    index: Index
    filters: FilterConfig | None
    usable: int
    usable_hours: float
    dropped: dict[str, int]
    hours: float
    weight: float = 1.0
    lang: str | None = None
    prompts: tuple[Prompt, ...] = ()

    def passes(self, rows: np.ndarray) -> np.ndarray:
        """Return which rows pass the filters: (n,) of index.ROW -> (n,) bool."""
        return _passes(_drop_reasons(rows, self.filters))


def make_corpus(
    name: str,
    index: Index,
    filters: FilterConfig | None,
    *,
    hours: float | None = None,
    weight: float = 1.0,
    lang: str | None = None,
    prompts: tuple[Prompt, ...] = (),
) -> Corpus:
    """Make a corpus, and count its utterances in one pass over the index.

    Arguments are those of Corpus; hours=None uses the hours that pass the filters.
    """
    dropped: Counter[str] = Counter()
    usable = 0
    samples = 0
    for start in range(0, len(index), ROWS_PER_CHUNK):
        rows = index.rows[start : start + ROWS_PER_CHUNK]
        reasons = _drop_reasons(rows, filters)
        passes = _passes(reasons)
        usable += int(passes.sum())
        samples += int(rows["samples"][passes].sum(dtype=np.int64))
        if usable < start + len(rows):
            dropped += Counter({reason: int(mask.sum()) for reason, mask in reasons.items()})
    usable_hours = samples / RATE / 3600
    return Corpus(
        name=name,
        index=index,
        filters=filters,
        usable=usable,
        usable_hours=usable_hours,
        dropped=dict(dropped),
        hours=hours or usable_hours,
        weight=weight,
        lang=lang,
        prompts=prompts,
    )


def long_utterance(corpora: Sequence[Corpus]) -> float:
    """Return the 99th percentile of the durations that pass the filters, in seconds.

    It is estimated from at most MAX_SAMPLED_ROWS rows of each corpus. The result is 0 if none of
    them passes.
    """
    parts = []
    for corpus in corpora:
        stride = -(-len(corpus.index) // MAX_SAMPLED_ROWS)
        rows = corpus.index.rows[::stride]
        parts.append(rows["samples"][corpus.passes(rows)])
    samples = np.concatenate(parts)
    if not len(samples):
        return 0.0
    return round(float(np.percentile(samples, 99)) / RATE, 2)


def _drop_reasons(rows: np.ndarray, filters: FilterConfig | None) -> dict[str, np.ndarray]:
    """Return masks (n,) of the rows that the filters drop, by their first reason."""
    if filters is None:
        return {"none": np.zeros(len(rows), bool)}
    samples = rows["samples"]
    characters = rows["text_chars"]
    reasons = {
        "too_short": samples < filters.min_duration * RATE,
        "too_long": samples > filters.max_duration * RATE,
        "too_fast": characters > filters.max_chars_per_second / RATE * samples,
        "empty_text": characters == 0,
    }
    dropped: np.ndarray = np.zeros(len(rows), bool)
    for reason, mask in reasons.items():
        reasons[reason] = mask & ~dropped
        dropped |= mask
    return reasons


def _passes(reasons: Mapping[str, np.ndarray]) -> np.ndarray:
    return ~np.logical_or.reduce(list(reasons.values()), axis=0)


def read_corpora(
    path: str | Path,
    *,
    filters: FilterConfig | None,
    shards_dir: Path,
    cache: ShardCache | None = None,
    what: str = "the data config",
) -> list[Corpus]:
    """Read a data config: a list of `{manifest | shards, name, hours, weights, lang, prompts}`.

    Args:
        path: the YAML file.
        filters: which utterances are used; None uses all.
        shards_dir: directory for shards made from a `manifest` (Lhotse cuts). They are written
            once and reused by later runs.
        cache: cache for shards at URLs.
        what: what the file is, as the beginning of messages.

    Raises:
        UserError: an entry is invalid. The message names the file and the entry.
    """
    # Shards may be made from a manifest for hours, so later entries are checked first.
    return [_open_entry(entry, filters, shards_dir, cache) for entry in read_entries(path, what)]


@dataclass(frozen=True, kw_only=True)
class NamedEntry:
    """An entry whose keys have been checked.

    Attributes:
        entry: its keys.
        where: its place in the data config, for messages.
        name: the name of the corpus.
        prompts: the prompts that replace the run's prompts.
    """

    entry: CorpusEntry
    where: str
    name: str
    prompts: tuple[Prompt, ...]


def read_entries(path: str | Path, what: str = "the data config") -> list[NamedEntry]:
    """Check a data config without opening the corpora that it names.

    Args:
        path: the YAML file.
        what: the name of the file in messages.

    Raises:
        UserError: an entry is invalid, or its local shards or manifest do not exist.
    """
    entries = read_yaml(path, what)
    if not isinstance(entries, list) or not entries:
        raise UserError(
            f"{what} {str(path)!r} is not a list of entries. "
            "Write one entry with 'shards: DIR' or 'manifest: CUTS' per corpus."
        )
    return [_check_entry(entry, f"{path}, entry {i}") for i, entry in enumerate(entries, 1)]


def _check_entry(values: Any, where: str) -> NamedEntry:
    if not isinstance(values, Mapping):
        raise UserError(
            f"{where}: {values!r} is not a mapping. Use keys, for example 'shards: DIR'."
        )
    entry = build(CorpusEntry, values, where=f"{where}: ")
    if (entry.shards is None) == (entry.manifest is None):
        raise UserError(f"{where}: set exactly one of 'shards: DIR' and 'manifest: CUTS.jsonl.gz'.")
    name = _entry_name(entry, where)
    prompts = parse_prompts(entry.prompts or [], where)
    if entry.shards is not None and not is_url(entry.shards):
        check_index_exists(Path(entry.shards))
    if entry.manifest is not None:
        check_file(Path(entry.manifest), "the manifest")
    return NamedEntry(entry=entry, where=where, name=name, prompts=prompts)


def _open_entry(
    named: NamedEntry, filters: FilterConfig | None, shards_dir: Path, cache: ShardCache | None
) -> Corpus:
    entry = named.entry
    index = _entry_index(entry, shards_dir, cache)
    if entry.hours is not None:
        _check_hours(entry.hours, index, named.where)
    corpus = make_corpus(
        named.name,
        index,
        filters,
        hours=entry.hours,
        weight=entry.weights,
        lang=entry.lang,
        prompts=named.prompts,
    )
    log_dropped(corpus)
    if not corpus.usable or not round(entry.weights * corpus.usable):
        raise UserError(
            f"{named.where}: no utterance is left after data.filter and weights. "
            "Widen data.filter, or raise weights."
        )
    return corpus


def log_dropped(corpus: Corpus) -> None:
    """Log what data.filter drops from a corpus, as a warning if the ratio is high."""
    total = len(corpus.index)
    count = total - corpus.usable
    if not count:
        return
    reasons = ", ".join(f"{number} {reason}" for reason, number in corpus.dropped.items() if number)
    level = logging.WARNING if count > HIGH_DROP_RATIO * total else logging.INFO
    logger.log(
        level,
        "%s: data.filter drops %d of %d utterances (%.1f %%): %s. %s",
        corpus.name,
        count,
        total,
        100 * count / total,
        reasons,
        WIDEN_FILTER,
    )


def _entry_name(entry: CorpusEntry, where: str) -> str:
    """Return the name of an entry, which by default is that of its shards or manifest."""
    source = Path(entry.shards or entry.manifest or "")
    name = entry.name or source.name.partition(".")[0]
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        key = "name" if entry.name else "shards" if entry.shards else "manifest"
        shown = getattr(entry, key)
        if set(shown) & set("*?[") and key != "name":
            raise UserError(
                f"{where}: {key}={shown!r} is a pattern. Name one directory or manifest in each "
                "entry; a directory with an index includes all its tars."
            )
        subject = f"name={shown!r}"
        if key != "name":
            subject = f"the name {name!r} of {key}={shown!r}"
        raise UserError(
            f"{where}: {subject} cannot be part of a file name. Set 'name' to letters, digits, "
            "'-', '_', '.' and '+', and do not begin with '.'."
        )
    return name


def _entry_index(entry: CorpusEntry, shards_dir: Path, cache: ShardCache | None) -> Index:
    if entry.shards is not None:
        return open_index(entry.shards, cache)
    assert entry.manifest is not None
    return _manifest_index(Path(entry.manifest), shards_dir)


def _check_hours(stated: float, index: Index, where: str) -> None:
    """Warn if the stated hours differ much from those of the index."""
    if abs(stated - index.hours) > HOURS_TOLERANCE * index.hours:
        logger.warning(
            "%s: hours=%g contradicts the index, which counts %.4g h. Correct or remove it: "
            "data.use_infinite_dataset=true mixes corpora by the stated hours.",
            where,
            stated,
            index.hours,
        )


def _manifest_index(manifest: Path, shards_dir: Path) -> Index:
    """Return the index of shards made from a cuts manifest.

    The first process that holds the lock writes the shards; later ones reuse them.
    """
    if next(read_cuts(manifest), None) is None:
        raise UserError(f"the manifest {str(manifest)!r} has no utterance. Make it again.")
    stat = manifest.stat()
    version = f"{manifest.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    digest = hashlib.sha256(version.encode()).hexdigest()[:12]
    folder = shards_dir / f"{manifest.name.partition('.')[0]}-{digest}"
    shards_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _write_manifest_shards(manifest, folder)
    return open_index(folder)


def _write_manifest_shards(manifest: Path, folder: Path) -> None:
    logger.warning(
        "Writing shards from %s to %s. Run 'asrllm shards make' beforehand to avoid this delay.",
        manifest,
        folder,
    )
    summary = write_shards(folder, read_cuts(manifest), workers=usable_cores())
    if summary.rejected:
        logger.warning(
            "Rejected utterances of %s: %s. See %s.",
            manifest,
            summary.rejected,
            folder / "rejected.jsonl",
        )
