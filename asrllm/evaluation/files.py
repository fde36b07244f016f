"""Result files in icefall's forms."""

import collections
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asrllm.atomic import write_whole
from asrllm.escape import escape
from asrllm.evaluation.score import NOTHING, UNITS, Transcript
from asrllm.evaluation.summary import Pairs, Scored

SHOWN_FOR_NOTHING = "*"


def write_results(
    folder: Path, name: str, suffix: str, scored: Scored, about: dict[str, Any]
) -> dict[str, Any]:
    """Write recogs-, errs-, wer-summary- and generations- of one test set; gives its entry for results.json.

    about: what the entry says beside, "normalizer" at least.
    """
    rate = f"{scored.main.rate:.2f}"
    write_whole(folder / f"recogs-{name}-{suffix}.txt", recogs_text(scored))
    write_whole(folder / f"errs-{name}-{suffix}.txt", errs_text(scored))
    write_whole(
        folder / f"wer-summary-{name}-{suffix}.txt", f"settings\tWER\n{folder.name}\t{rate}\n"
    )
    generations = f"generations-{name}-{suffix}.jsonl"
    write_whole(folder / generations, generations_text(scored.transcripts, about["normalizer"]))
    return scored.entry() | about | {"generations": generations}


def write_summary(folder: Path, suffix: str, results: dict[str, dict[str, Any]]) -> None:
    """Write wer-summary-all-{suffix}.txt, results-{suffix}.json and its copy, results.json."""
    lines = ["set\tWER\tCER\tMER\tWER 95 %\tutterances\tnormalizer"]
    for name, r in results.items():
        low, high = r["wer_ci95"]
        lines.append(
            f"{name}\t{r['wer']:.2f}\t{r['cer']:.2f}\t{r['mer']:.2f}\t{low:.2f}-{high:.2f}\t{r['utterances']}\t{r.get('normalizer', '')}"
        )
    write_whole(folder / f"wer-summary-all-{suffix}.txt", "\n".join(lines) + "\n")
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    for file in (f"results-{suffix}.json", "results.json"):
        write_whole(folder / file, text)


def recogs_text(scored: Scored) -> str:
    units, lines = UNITS[scored.metric], []
    for t in scored.transcripts:
        key = escape(t.key)
        lines += [f"{key}:\tref={units(t.reference)}", f"{key}:\thyp={units(t.hypothesis)}"]
    return "\n".join(lines) + "\n"


def errs_text(scored: Scored) -> str:
    """The rate, the alignment of every utterance, and units by how often they were wrong."""
    main = scored.main
    ins, dels, subs, units = (int(x.sum()) for x in (main.ins, main.dels, main.subs, main.units))
    what = {"wer": "words", "cer": "characters", "mer": "words and characters"}[scored.metric]
    lines = [
        f"%WER = {main.rate:.2f}",  # so named in icefall whatever the units
        f"Errors: {ins} insertions, {dels} deletions, {subs} substitutions, over {units} reference {what} ({units - subs - dels} correct)",
        "Search below for sections starting with PER-UTT DETAILS:, SUBSTITUTIONS:, DELETIONS:, INSERTIONS:",
        "",
        "PER-UTT DETAILS: corr or (ref->hyp)",
    ]
    for t, pairs in zip(scored.transcripts, scored.pairs, strict=True):
        aligned = " ".join(escape(r) if r == h else f"({_shown(r)}->{_shown(h)})" for r, h in pairs)
        lines.append(f"{escape(t.key)}:\t{aligned}")
    heads = {
        "SUBSTITUTIONS": "count ref -> hyp",
        "DELETIONS": "count ref",
        "INSERTIONS": "count hyp",
    }
    for kind, counter in most_wrong(scored.pairs).items():
        lines += [
            "",
            f"{kind}: {heads[kind]}",
            *(f"{n}   {escape(what)}" for what, n in counter.most_common()),
        ]
    return "\n".join(lines) + "\n"


def _shown(unit: str) -> str:
    return escape(unit) if unit != NOTHING else SHOWN_FOR_NOTHING


def most_wrong(aligned: Sequence[Pairs]) -> dict[str, collections.Counter[str]]:
    """{"SUBSTITUTIONS" | "DELETIONS" | "INSERTIONS": how often each was}"""
    wrong: dict[str, collections.Counter[str]] = {
        kind: collections.Counter() for kind in ("SUBSTITUTIONS", "DELETIONS", "INSERTIONS")
    }
    for pairs in aligned:
        for r, h in pairs:
            if r == NOTHING:
                wrong["INSERTIONS"][h] += 1
            elif h == NOTHING:
                wrong["DELETIONS"][r] += 1
            elif r != h:
                wrong["SUBSTITUTIONS"][f"{r} -> {h}"] += 1
    return wrong


def generations_text(transcripts: Sequence[Transcript], normalizer: str) -> str:
    """Texts as they are; normalizer: the one that they were scored by."""
    rows = [
        {
            "key": t.key,
            "duration": round(t.duration, 3),
            "ref": t.raw_reference,
            "hyp": t.raw_hypothesis,
            "normalizer": normalizer,
        }
        | {name: value for name in ("speaker", "recording") if (value := getattr(t, name))}
        | ({"end": t.end} if t.end != "stop" else {})
        for t in transcripts
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
