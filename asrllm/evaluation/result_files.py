"""Write and read the result files of an evaluation, which have icefall's formats."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asrllm.atomic import write_whole
from asrllm.errors import UserError
from asrllm.escape import escape
from asrllm.evaluation.score import NOTHING, UNITS, Transcript
from asrllm.text_files import parse_json, read_json_object, read_text

if TYPE_CHECKING:  # it imports torch, which comparing results does not need
    from asrllm.evaluation.summary import Entry, Pairs, Scored

MISSING_UNIT = "*"  # marks an insertion or deletion in errs-*.txt
UNIT_NAMES = {"wer": "words", "cer": "characters", "mer": "words and characters"}
HEADINGS = {
    "SUBSTITUTIONS": "count ref -> hyp",
    "DELETIONS": "count ref",
    "INSERTIONS": "count hyp",
}
RECOGS_LINE = re.compile(
    r"(?P<key>.*):\t(?P<what>ref|hyp|timestamp_ref|timestamp_hyp)=(?P<units>\[.*\])"
)
RECOGS_BEGIN = re.compile(r"[^{].*:\t(?:timestamp_)?(?:ref|hyp)=")
RESULT_FILES = "generations-*.jsonl or recogs-*.txt"
ResultRow = dict[str, Any]  # an utterance of a result file


def result_files(sets: Sequence[str], suffix: str) -> list[str]:
    """Return the names of all files that an evaluation of these test sets writes.

    Args:
        sets: names of the test sets.
        suffix: suffix of the file names, see EvaluationRun.suffix.
    """
    names = [f"wer-summary-all-{suffix}.txt"]
    for name in sets:
        names += [f"{kind}-{name}-{suffix}.txt" for kind in ("recogs", "errs", "wer-summary")]
        names.append(f"generations-{name}-{suffix}.jsonl")
    for kind, ending in (("results", "json"), ("report", "html")):
        names += [f"{kind}-{suffix}.{ending}", f"{kind}.{ending}"]
    return names


def write_results(folder: Path, name: str, suffix: str, scored: Scored, about: Entry) -> Entry:
    """Write recogs-, errs-, wer-summary- and generations- of one test set.

    Args:
        folder: where to write.
        name: the test set.
        suffix: suffix of the file names, see EvaluationRun.suffix.
        scored: the results.
        about: further fields of the entry, at least "normalizer".

    Returns:
        The test set's entry of results.json.
    """
    rate = f"{scored.main.rate:.2f}"
    summary = f"settings\tWER\n{folder.name}\t{rate}\n"
    generations = f"generations-{name}-{suffix}.jsonl"
    write_whole(folder / f"recogs-{name}-{suffix}.txt", recogs_text(scored))
    write_whole(folder / f"errs-{name}-{suffix}.txt", errs_text(scored))
    write_whole(folder / f"wer-summary-{name}-{suffix}.txt", summary)
    write_whole(folder / generations, generations_text(scored.transcripts, about["normalizer"]))
    return scored.entry() | about | {"generations": generations}


def write_summary(folder: Path, suffix: str, results: dict[str, Entry]) -> None:
    """Write wer-summary-all-{suffix}.txt, results-{suffix}.json and its copy, results.json."""
    lines = ["set\tWER\tCER\tMER\tWER 95 %\tutterances\tnormalizer"]
    for name, entry in results.items():
        low, high = entry["wer_ci95"]
        rates = f"{entry['wer']:.2f}\t{entry['cer']:.2f}\t{entry['mer']:.2f}"
        normalizer = entry.get("normalizer", "")
        lines.append(f"{name}\t{rates}\t{low:.2f}-{high:.2f}\t{entry['utterances']}\t{normalizer}")
    write_whole(folder / f"wer-summary-all-{suffix}.txt", "\n".join(lines) + "\n")
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    for file in (f"results-{suffix}.json", "results.json"):
        write_whole(folder / file, text)


def recogs_text(scored: Scored) -> str:
    """Return the content of recogs-*.txt: references and hypotheses as lists of units."""
    split = UNITS[scored.metric]
    lines = []
    for transcript in scored.transcripts:
        key = escape(transcript.key)
        lines.append(f"{key}:\tref={split(transcript.reference)}")
        lines.append(f"{key}:\thyp={split(transcript.hypothesis)}")
    return "\n".join(lines) + "\n"


def errs_text(scored: Scored) -> str:
    """Return the content of errs-*.txt: the rate, all alignments, and units by number of errors."""
    main = scored.main
    ins = int(main.ins.sum())
    dels = int(main.dels.sum())
    subs = int(main.subs.sum())
    units = int(main.units.sum())
    lines = [
        f"%WER = {main.rate:.2f}",  # icefall uses this name for every metric
        f"Errors: {ins} insertions, {dels} deletions, {subs} substitutions, "
        f"over {units} reference {UNIT_NAMES[scored.metric]} ({units - subs - dels} correct)",
        "Search below for sections starting with "
        "PER-UTT DETAILS:, SUBSTITUTIONS:, DELETIONS:, INSERTIONS:",
        "",
        "PER-UTT DETAILS: corr or (ref->hyp)",
    ]
    for transcript, pairs in zip(scored.transcripts, scored.pairs, strict=True):
        aligned = " ".join(_aligned_text(*pair) for pair in pairs)
        lines.append(f"{escape(transcript.key)}:\t{aligned}")
    for kind, counter in count_confusions(scored.pairs).items():
        lines.append("")
        lines.append(f"{kind}: {HEADINGS[kind]}")
        for what, count in counter.most_common():
            lines.append(f"{count}   {escape(what)}")
    return "\n".join(lines) + "\n"


def _aligned_text(reference: str, hypothesis: str) -> str:
    if reference == hypothesis:
        return escape(reference)
    return f"({_unit_text(reference)}->{_unit_text(hypothesis)})"


def _unit_text(unit: str) -> str:
    if unit == NOTHING:
        return MISSING_UNIT
    return escape(unit)


def count_confusions(alignments: Sequence[Pairs]) -> dict[str, Counter[str]]:
    """Count each substitution, deletion and insertion in alignments.

    Returns:
        Counters by kind: "SUBSTITUTIONS", "DELETIONS" and "INSERTIONS".
    """
    counters: dict[str, Counter[str]] = {}
    for kind in HEADINGS:
        counters[kind] = Counter()
    for pairs in alignments:
        for reference, hypothesis in pairs:
            if reference == NOTHING:
                counters["INSERTIONS"][hypothesis] += 1
            elif hypothesis == NOTHING:
                counters["DELETIONS"][reference] += 1
            elif reference != hypothesis:
                counters["SUBSTITUTIONS"][f"{reference} -> {hypothesis}"] += 1
    return counters


def generations_text(transcripts: Sequence[Transcript], normalizer: str) -> str:
    """Return the content of generations-*.jsonl: the texts before normalization.

    Args:
        transcripts: the utterances.
        normalizer: the name of the normalizer that they were scored with.
    """
    lines = []
    for transcript in transcripts:
        row: dict[str, Any] = {
            "key": transcript.key,
            "duration": round(transcript.duration, 3),
            "ref": transcript.raw_reference,
            "hyp": transcript.raw_hypothesis,
            "normalizer": normalizer,
        }
        if transcript.speaker:
            row["speaker"] = transcript.speaker
        if transcript.recording:
            row["recording"] = transcript.recording
        if transcript.end != "stop":
            row["end"] = transcript.end
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)


def find_sets(path: Path, *, like: Path | None = None) -> dict[str, Path]:
    """Return the result files by test set.

    Args:
        path: a directory, or a file, which is one set.
        like: the directory whose set has the name of the file.
    """
    if not path.exists():
        raise UserError(f"{str(path)!r} does not exist. Check the path.")
    if path.is_file():
        name = re.sub("^(generations|recogs)-", "", path.stem)
        known = find_sets(like) if like is not None else {}
        return {_known_name(name, known): path}
    folders = [path, *sorted(file.parent for file in path.glob("*/results.json"))]
    found = [newest_sets(folder) for folder in folders]
    found = [sets for sets in found if sets]
    if len(found) != 1:
        problem = "has several decodings" if found else "has no generations-*.jsonl"
        raise UserError(
            f"{str(path)!r} {problem}. Use a directory like EXP/greedy_search, "
            f"or a file {RESULT_FILES}."
        )
    return found[0]


def _known_name(name: str, known: Mapping[str, Path]) -> str:
    """Return the test set whose name a file name begins with, or the file name."""
    for test_set in known:
        if name == test_set or name.startswith(f"{test_set}-"):
            return test_set
    return name


def newest_sets(folder: Path) -> dict[str, Path]:
    """Return the result files of the evaluation that wrote results.json, by test set.

    Raises:
        UserError: results.json is corrupted, or names a file in another directory.
    """
    path = folder / "results.json"
    if not path.is_file():
        return {}
    sets = {}
    for name, entry in read_json_object(path, "the results").items():
        if isinstance(entry, dict) and isinstance(entry.get("generations"), str):
            file = entry["generations"]
            if Path(file).name != file:
                raise UserError(
                    f"{str(path)!r} names the result file {file!r}, which is not in its directory. "
                    "Evaluate again."
                )
            sets[name] = folder / file
    return sets


def read_rows(path: Path) -> list[ResultRow]:
    """Read a generations-*.jsonl or a recogs-*.txt, which icefall may have written.

    Returns:
        One {"key", "ref", "hyp", "duration", ...} per utterance.

    Raises:
        UserError: the file is not of this kind, has no utterance or repeats a key.
    """
    lines = read_text(path, "the results").split("\n")  # not splitlines(): texts may have U+2028
    lines = [line.removesuffix("\r") for line in lines]
    try:
        if is_recogs(path):
            rows = _parse_recogs(lines)
        else:
            rows = _parse_generations(lines)
    except ValueError as error:
        raise UserError(
            f"{str(path)!r} is not a {RESULT_FILES} file: {error}. Choose such a file, or "
            "copy it again."
        ) from error
    _check_unique_keys(rows, path)
    if not rows:
        raise UserError(f"{str(path)!r} has no utterances. Choose another {RESULT_FILES} file.")
    return rows


def _check_unique_keys(rows: Sequence[ResultRow], path: Path) -> None:
    """Raise UserError if two utterances have the same key."""
    counts = Counter(row["key"] for row in rows)
    repeated = [key for key, count in counts.items() if count > 1]
    if repeated:
        raise UserError(
            f"{str(path)!r} has {len(repeated)} repeated keys, for example {repeated[0]!r}. "
            "Make the keys of the utterances unique, and evaluate again."
        )


def _parse_generations(lines: Sequence[str]) -> list[ResultRow]:
    """Return the rows of a generations-*.jsonl.

    Raises:
        ValueError: a line is not an object with key, ref and hyp.
    """
    rows = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON, or not all of it") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not a JSON object")
        for name in ("key", "ref", "hyp"):
            if not isinstance(row.get(name), str):
                raise ValueError(f"line {number} has no text {name!r}")
        duration = row.get("duration", 0)
        if not isinstance(duration, (int, float)):
            raise ValueError(f"line {number} has the duration {duration!r}, which is not a number")
        rows.append(row | {"duration": float(duration)})
    return rows


def _parse_recogs(lines: Sequence[str]) -> list[ResultRow]:
    """Return a row for each reference with its hypothesis. A repeated key has several rows."""
    rows: list[ResultRow] = []
    last_of: dict[str, ResultRow] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = RECOGS_LINE.fullmatch(line)
        if not match:
            raise ValueError(f"{line[:80]!r} is neither a reference nor a hypothesis")
        key, what, units = match.group("key", "what", "units")
        if what.startswith("timestamp"):
            continue
        if key not in last_of or what in last_of[key]:
            last_of[key] = {"key": key}
            rows.append(last_of[key])
        last_of[key][what] = " ".join(_parse_units(units, number))
    for row in rows:
        if not {"ref", "hyp"} <= row.keys():
            raise ValueError(f"{row['key']!r} has no {'hyp' if 'ref' in row else 'ref'}")
    return [row | {"duration": 0.0} for row in rows]


def _parse_units(text: str, number: int) -> list[str]:
    """Return the units of a line.

    Raises:
        ValueError: they are not a list of texts.
    """
    try:
        units = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"line {number} is not a list of texts") from error
    if not isinstance(units, list) or not all(isinstance(unit, str) for unit in units):
        raise ValueError(f"line {number} is not a list of texts")
    return units


def is_recogs(path: Path) -> bool:
    """Return whether a result file is a recogs-*.txt, by its name or its first line."""
    if path.name.startswith("recogs"):
        return True
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        first = next((line for line in file if line.strip()), "")
    return RECOGS_BEGIN.match(first) is not None
