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

from asrllm.data.cache import ShardCache
from asrllm.data.config import FilterConfig
from asrllm.data.index import RATE, Index, open_index
from asrllm.data.parallel import usable_cores
from asrllm.data.prompts import Prompt, parse_prompts
from asrllm.data.shards import write_shards
from asrllm.data.sources import read_cuts
from asrllm.errors import UserError, nearest
from asrllm.locks import FileLock
from asrllm.text_files import check_file, read_yaml

logger = logging.getLogger(__name__)
MAX_WEIGHT = 1000
CHUNK = 1 << 18  # rows processed together
MAX_SAMPLED_ROWS = 100_000  # rows of a corpus from which long_utterance estimates
# Filters that drop more than this ratio of a corpus are probably a mistake.
HIGH_DROP_RATIO = 0.05
HOURS_TOLERANCE = 0.1  # stated hours are rounded: "960 h" of LibriSpeech are 961.05
CORPUS_KEYS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "manifest": str,
    "shards": str,
    "hours": (int, float),
    "weights": (int, float),
    "lang": str,
    "prompts": list,
}


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One entry of a data config.

    Attributes:
        name: its name, which becomes part of file names.
        index: the index of its shards.
        filters: which utterances are used; None uses all.
        kept: utterances that pass the filters.
        kept_hours: hours of audio that pass the filters.
        dropped: utterances that do not pass, by reason.
        hours: hours as stated in the data config, or else kept_hours.
        weight: how often an epoch repeats the corpus, or its factor in an endless mix.
        lang: language of utterances that name none.
        prompts: prompts that replace the run's prompts.
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
    kept = 0
    samples = 0
    for start in range(0, len(index), CHUNK):
        rows = index.rows[start : start + CHUNK]
        reasons = _drop_reasons(rows, filters)
        passes = _passes(reasons)
        kept += int(passes.sum())
        samples += int(rows["samples"][passes].sum(dtype=np.int64))
        if kept < start + len(rows):
            dropped += Counter({reason: int(mask.sum()) for reason, mask in reasons.items()})
    kept_hours = samples / RATE / 3600
    return Corpus(
        name=name,
        index=index,
        filters=filters,
        kept=kept,
        kept_hours=kept_hours,
        dropped=dict(dropped),
        hours=hours or kept_hours,
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
    """Return masks (n,) of the rows that the filters drop, by reason. Reasons may overlap."""
    if filters is None:
        return {"none": np.zeros(len(rows), bool)}
    samples = rows["samples"]
    characters = rows["text_chars"]
    return {
        "too_short": samples < filters.min_duration * RATE,
        "too_long": samples > filters.max_duration * RATE,
        "too_fast": characters > filters.max_chars_per_second / RATE * samples,
        "empty_text": characters == 0,
    }


def _passes(reasons: Mapping[str, np.ndarray]) -> np.ndarray:
    return ~np.logical_or.reduce(list(reasons.values()), axis=0)


def read_corpora(
    path: str | Path,
    *,
    filters: FilterConfig | None,
    made: Path,
    cache: ShardCache | None = None,
) -> list[Corpus]:
    """Read a data config: a list of `{manifest | shards, name, hours, weights, lang, prompts}`.

    Args:
        path: the YAML file.
        filters: which utterances are used; None uses all.
        made: directory for shards made from a `manifest` (Lhotse cuts). They are written once and
            reused by later runs.
        cache: cache for shards at URLs.

    Raises:
        UserError: an entry is invalid. The message names the file and the entry.
    """
    entries = read_yaml(path, "the data config")
    if not isinstance(entries, list) or not entries:
        raise UserError(
            f"the data config {str(path)!r} is not a list of entries. "
            "Write one entry with 'shards: DIR' or 'manifest: CUTS' per corpus."
        )
    return [
        _read_entry(entry, f"{path}, entry {i}", filters, made, cache)
        for i, entry in enumerate(entries, 1)
    ]


def _read_entry(
    entry: Any,
    where: str,
    filters: FilterConfig | None,
    made: Path,
    cache: ShardCache | None,
) -> Corpus:
    _check_keys(entry, where)
    weight = _entry_weight(entry, where)
    name = _entry_name(entry, where)
    prompts = parse_prompts(entry.get("prompts") or [], where)
    index = _entry_index(entry, made, cache)
    corpus = make_corpus(
        name,
        index,
        filters,
        hours=_stated_hours(entry, index, where),
        weight=weight,
        lang=entry.get("lang"),
        prompts=prompts,
    )
    log_dropped(corpus)
    if not corpus.kept or not round(weight * corpus.kept):
        raise UserError(
            f"{where}: no utterance is left after data.filter and weights. "
            "Widen data.filter, or raise weights."
        )
    return corpus


def log_dropped(corpus: Corpus) -> None:
    """Log what data.filter drops from a corpus, as a warning if the ratio is high."""
    total = len(corpus.index)
    count = total - corpus.kept
    if not count:
        return
    reasons = ", ".join(f"{number} {reason}" for reason, number in corpus.dropped.items() if number)
    level = logging.WARNING if count > HIGH_DROP_RATIO * total else logging.INFO
    logger.log(
        level,
        "%s: data.filter drops %d of %d utterances (%.1f %%): %s. "
        "Widen data.filter if you need them.",
        corpus.name,
        count,
        total,
        100 * count / total,
        reasons,
    )


def _check_keys(entry: Any, where: str) -> None:
    """Raise UserError unless an entry has valid keys, values of their types, and one source."""
    if not isinstance(entry, Mapping):
        raise UserError(
            f"{where}: {entry!r} is not a mapping. Use keys, for example 'shards: DIR'."
        )
    for key, value in entry.items():
        if key not in CORPUS_KEYS:
            raise UserError(f"{where}: unknown key {key!r}: {nearest(str(key), CORPUS_KEYS)}")
        if not isinstance(value, CORPUS_KEYS[key]) or isinstance(value, bool):
            raise UserError(f"{where}: {key}={value!r} has the wrong type. {_type_hint(key)}")
    if ("shards" in entry) == ("manifest" in entry):
        raise UserError(f"{where}: set exactly one of 'shards: DIR' and 'manifest: CUTS.jsonl.gz'.")


def _type_hint(key: str) -> str:
    if CORPUS_KEYS[key] is str:
        return "Use text, in quotes."
    if CORPUS_KEYS[key] is list:
        return "Use a list."
    return "Use a number."


def _entry_name(entry: Mapping[str, Any], where: str) -> str:
    """Return the name of an entry, which by default is that of its shards or manifest."""
    source = Path(entry.get("shards", entry.get("manifest")))
    name = str(entry.get("name") or source.name.partition(".")[0])
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise UserError(
            f"{where}: name={name!r} cannot be part of a file name. "
            "Use letters, digits, '-', '_', '.' and '+', and do not begin with '.'."
        )
    return name


def _entry_index(
    entry: Mapping[str, Any],
    made: Path,
    cache: ShardCache | None,
) -> Index:
    if "shards" in entry:
        return open_index(entry["shards"], cache)
    return _manifest_index(Path(entry["manifest"]), made)


def _entry_weight(entry: Mapping[str, Any], where: str) -> float:
    weight = float(entry.get("weights", 1.0))
    if not 0 < weight <= MAX_WEIGHT:
        raise UserError(
            f"{where}: weights={weight} is out of range. "
            f"Use a value above 0 and at most {MAX_WEIGHT}, or remove the entry."
        )
    return weight


def _stated_hours(
    entry: Mapping[str, Any],
    index: Index,
    where: str,
) -> float | None:
    """Return the `hours` of an entry, and warn if they differ much from the index."""
    stated = entry.get("hours")
    if stated is None:
        return None
    if not 0 < stated <= 10**9:
        raise UserError(
            f"{where}: hours={stated} is out of range. "
            "Use a value above 0 and at most 1000000000, or remove it to use the index's count."
        )
    if abs(float(stated) - index.hours) > HOURS_TOLERANCE * index.hours:
        logger.warning(
            "%s: hours=%g contradicts the index, which counts %.4g h. Correct or remove it: "
            "data.use_infinite_dataset=true mixes corpora by the stated hours.",
            where,
            stated,
            index.hours,
        )
    return float(stated)


def _manifest_index(manifest: Path, made: Path) -> Index:
    """Return the index of shards made from a cuts manifest.

    The first process that holds the lock writes the shards; later ones reuse them.
    """
    check_file(manifest, "the manifest")
    if next(read_cuts(manifest), None) is None:
        raise UserError(f"the manifest {str(manifest)!r} has no utterance. Make it again.")
    stat = manifest.stat()
    version = f"{manifest.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    digest = hashlib.sha256(version.encode()).hexdigest()[:12]
    folder = made / f"{manifest.name.partition('.')[0]}-{digest}"
    made.mkdir(parents=True, exist_ok=True)
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
