"""Write result files in icefall's formats."""

import collections
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asrllm.atomic import write_whole
from asrllm.escape import escape
from asrllm.evaluation.score import NOTHING, UNITS, Transcript
from asrllm.evaluation.summary import Entry, Pairs, Scored

MISSING_UNIT = "*"  # marks an insertion or deletion in errs-*.txt
UNIT_NAMES = {"wer": "words", "cer": "characters", "mer": "words and characters"}
HEADINGS = {
    "SUBSTITUTIONS": "count ref -> hyp",
    "DELETIONS": "count ref",
    "INSERTIONS": "count hyp",
}


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


def count_confusions(alignments: Sequence[Pairs]) -> dict[str, collections.Counter[str]]:
    """Count each substitution, deletion and insertion in alignments.

    Returns:
        Counters by kind: "SUBSTITUTIONS", "DELETIONS" and "INSERTIONS".
    """
    counters: dict[str, collections.Counter[str]] = {}
    for kind in HEADINGS:
        counters[kind] = collections.Counter()
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
