"""Whether windows of the plan have different kinds of utterances, because a manifest is sorted."""

from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np

from asrllm.data.tars import shortened
from asrllm.doctor.findings import Finding, ok, warning
from asrllm.doctor.overlap import read
from asrllm.training.data import TrainingData

MAX_WINDOWS = 16  # windows that are compared
PER_WINDOW = 64  # utterances of each window that are read
MIN_PER_WINDOW = 32  # ratios in fewer utterances differ too much by chance
# Largest difference between the ratios of a value in two windows. In 16 windows of random shards of
# one language each, the ratios of two languages differ by 0.8 (5 shards), 0.6 (10) or 0.45 (20),
# and by 0.2 if each shard has both.
MAX_DIFFERENCE = 0.6
FIELDS = ("lang", "corpus", "task", "text")  # equal texts are the labels of commands or sounds


def check_order(data: TrainingData) -> Finding:
    """Compare the windows of the plan by the languages, corpora, tasks and texts in them.

    A window has whole shards in random order. If the utterances were sorted before the shards were
    written, and a window has few shards, training sees one kind of utterances after the other.
    """
    plan = data.plan
    if plan.config.window >= sum(len(corpus.index) for corpus in data.corpora):
        return ok("order", "a window has all utterances, so that no order of them remains")
    count = min(plan.windows or MAX_WINDOWS, MAX_WINDOWS)
    ratios: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * count)
    for window in range(count):
        samples = list(sampled_fields(data, window))
        if len(samples) < MIN_PER_WINDOW:
            return ok("order", f"windows of {len(samples)} utterances are not compared")
        for name in FIELDS:
            for value, number in Counter(fields[name] for fields in samples).items():
                ratios[name, value][window] = number / len(samples)
    (name, value), found = max(ratios.items(), key=lambda item: max(item[1]) - min(item[1]))
    text = (
        f"windows of {plan.config.window} utterances differ: {min(found):.0%} to "
        f"{max(found):.0%} of them have {name}={shortened(value)!r}"
    )
    if max(found) - min(found) > MAX_DIFFERENCE:
        fix = "Write the shards with 'asrllm shards make --seed 0', or raise data.sampler.window."
        return warning("order", text, fix)
    return ok("order", f"{count} windows have the same kinds of utterances")


def sampled_fields(data: TrainingData, window: int) -> Iterator[dict[str, str]]:
    """Yield the FIELDS of utterances that are spread evenly over a window of the first epoch."""
    entries = data.plan.utterances(0, window)
    spread = np.linspace(0, len(entries) - 1, min(PER_WINDOW, len(entries))).round().astype(int)
    reader = data.reader(data.corpora)
    chosen = entries[spread]
    for number, corpus in enumerate(data.corpora):
        for sample in read(reader, number, chosen["row"][chosen["corpus"] == number]):
            fields = {name: str(sample.fields.get(name) or "") for name in FIELDS}
            fields["lang"] = fields["lang"] or corpus.lang or ""
            yield fields
