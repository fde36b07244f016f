"""Result files in icefall's forms."""

import collections
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asrllm.evaluation.score import EPSILON, Errors, Transcript, align, character_errors, word_errors
from asrllm.writing import write_whole


def write_results(folder: Path, name: str, suffix: str, transcripts: Sequence[Transcript], about: dict[str, Any]) -> dict[str, Any]:
    """Write recogs-, errs-, wer-summary- and generations- of one test set; gives its entry for results.json."""
    words, characters = word_errors(transcripts), character_errors(transcripts)
    low, high = words.confidence_interval()
    result = {
        "wer": round(words.rate, 3),
        "cer": round(characters.rate, 3),
        "wer_ci95": [round(low, 3), round(high, 3)],
        "utterances": len(transcripts),
        "words": int(words.units.sum()),
        "insertions": int(words.ins.sum()),
        "deletions": int(words.dels.sum()),
        "substitutions": int(words.subs.sum()),
        "empty": sum(not t.hypothesis for t in transcripts),
        **about,
    }
    write_whole(folder / f"recogs-{name}-{suffix}.txt", recogs_text(transcripts))
    write_whole(folder / f"errs-{name}-{suffix}.txt", errs_text(transcripts, words))
    write_whole(folder / f"wer-summary-{name}-{suffix}.txt", f"settings\tWER\n{folder.name}\t{words.rate:.2f}\n")
    write_whole(folder / f"generations-{name}.jsonl", generations_text(transcripts))
    return result


def write_summary(folder: Path, suffix: str, results: dict[str, dict[str, Any]]) -> None:
    """wer-summary-all-{suffix}.txt and results.json."""
    lines = ["set\tWER\tCER\tWER 95 %\tutterances"]
    for name, r in results.items():
        lines.append(f"{name}\t{r['wer']:.2f}\t{r['cer']:.2f}\t{r['wer_ci95'][0]:.2f}-{r['wer_ci95'][1]:.2f}\t{r['utterances']}")
    write_whole(folder / f"wer-summary-all-{suffix}.txt", "\n".join(lines) + "\n")
    write_whole(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def recogs_text(transcripts: Sequence[Transcript]) -> str:
    lines = []
    for t in transcripts:
        lines += [f"{t.key}:\tref={t.reference.split()}", f"{t.key}:\thyp={t.hypothesis.split()}"]
    return "\n".join(lines) + "\n"


def errs_text(transcripts: Sequence[Transcript], words: Errors) -> str:
    """The rate, the alignment of every utterance, and words by how often they were wrong."""
    ins, dels, subs = (int(x.sum()) for x in (words.ins, words.dels, words.subs))
    units = int(words.units.sum())
    lines = [
        f"%WER = {words.rate:.2f}",
        f"Errors: {ins} insertions, {dels} deletions, {subs} substitutions, over {units} reference words ({units - subs - dels} correct)",
        "Search below for sections starting with PER-UTT DETAILS:, SUBSTITUTIONS:, DELETIONS:, INSERTIONS:",
        "",
        "PER-UTT DETAILS: corr or (ref->hyp)",
    ]
    wrong: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in ("SUBSTITUTIONS", "DELETIONS", "INSERTIONS")}
    for t in transcripts:
        pairs = align(t.reference.split(), t.hypothesis.split())
        lines.append(f"{t.key}:\t" + " ".join(r if r == h else f"({r}->{h})" for r, h in pairs))
        for r, h in pairs:
            if r == EPSILON:
                wrong["INSERTIONS"][h] += 1
            elif h == EPSILON:
                wrong["DELETIONS"][r] += 1
            elif r != h:
                wrong["SUBSTITUTIONS"][f"{r} -> {h}"] += 1
    heads = {"SUBSTITUTIONS": "count ref -> hyp", "DELETIONS": "count ref", "INSERTIONS": "count hyp"}
    for kind, counter in wrong.items():
        lines += ["", f"{kind}: {heads[kind]}", *(f"{n}   {what}" for what, n in counter.most_common())]
    return "\n".join(lines) + "\n"


def generations_text(transcripts: Sequence[Transcript]) -> str:
    rows = [{"key": t.key, "duration": round(t.duration, 3), "ref": t.raw_reference, "hyp": t.raw_hypothesis} for t in transcripts]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
