"""Units and meanings of the numbers that an evaluation writes to W&B.

results.json has the same numbers, with intervals as lists and groups as objects.
"""

from asrllm.evaluation.summary import HALLUCINATION_FLAGS

EVALUATED_SAMPLES = "evaluation/samples"  # name of the table of the utterances of all test sets
RATE_NAMES = {
    "wer": "word error rate",
    "cer": "character error rate",
    "mer": "error rate by characters of scripts without spaces and words of others",
}


def _rates() -> dict[str, tuple[str, str]]:
    found = {}
    for name, meaning in RATE_NAMES.items():
        found[name] = ("%", meaning)
        found[f"{name}_low"] = ("%", f"lower end of the 95 % interval of {name}")
        found[f"{name}_high"] = ("%", f"upper end of the 95 % interval of {name}")
    return found


RTFX = ("s/s", "seconds of audio per second of decoding")
COMPARISON = {
    "a": ("%", "error rate of the baseline in the metric that fits the references"),
    "b": ("%", "error rate of the model in the same metric"),
    "difference": ("points", "b - a"),
    "difference_low": ("points", "lower end of the 95 % interval of the difference"),
    "difference_high": ("points", "upper end of the 95 % interval of the difference"),
    "p": ("ratio", "probability of a difference at least this large by chance"),
    "better": ("utterances", "with fewer errors than the baseline"),
    "worse": ("utterances", "with more errors than the baseline"),
    "utterances": ("utterances", "compared"),
}
EVALUATION_METRICS: dict[str, tuple[str, str]] = {
    **_rates(),
    "utterances": ("utterances", "decoded"),
    "hours": ("h", "audio of the set"),
    "words": ("words", "in the references"),
    "insertions": ("words", "inserted"),
    "deletions": ("words", "deleted"),
    "substitutions": ("words", "substituted"),
    "unreadable": ("utterances", "that could not be read, and are not in the rates"),
    "empty_references": ("utterances", "with an empty reference"),
    "rtfx": RTFX,
    **{f"hallucinations/{f}": ("utterances", why) for f, why in HALLUCINATION_FLAGS.items()},
    "hallucinations/length_ratio": ("ratio", "units of all hypotheses to those of all references"),
    **{f"baseline/{n}": (unit, f"Whisper: {meaning}") for n, (unit, meaning) in _rates().items()},
    "baseline/rtfx": (RTFX[0], f"Whisper: {RTFX[1]}"),
    **{f"baseline/paired/{name}": about for name, about in COMPARISON.items()},
}
