"""Check a test set before a model is loaded for it, and choose its normalizer."""

import re
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence

from asrllm.audio.reader import Reader
from asrllm.data.cache import ShardCache
from asrllm.data.corpora import Corpus
from asrllm.data.plan import Item
from asrllm.data.scripts import HAN
from asrllm.data.text import normalizer_of
from asrllm.errors import UserError

ANOTHER_SCRIPT = 0.5  # ratio of references in another script that shows a wrong normalizer
# letters of the languages of normalizers; the other normalizers accept any script
NORMALIZER_SCRIPTS = {"en": "[A-Za-z]", "zh": f"[{HAN}]", "zh-numbers": f"[{HAN}]"}


def language_of(corpus: Corpus) -> str | None:
    """Return the language in the data config, or the only language of the utterances."""
    languages = [lang for lang in corpus.index.about.get("languages", {}) if lang]
    if corpus.lang:
        return corpus.lang
    if len(languages) == 1:
        return languages[0]
    return None


def choose_normalizer(name: str, corpus: Corpus) -> str:
    """Return the normalizer's name; "auto" chooses by the language of the corpus."""
    if name == "auto":
        return normalizer_of(language_of(corpus))
    return name


def check_unreadable(corpus: Corpus, problems: Sequence[str], max_share: float) -> None:
    """Check that few utterances of a test set cannot be read. One may, unless none may.

    Args:
        corpus: the test set.
        problems: why each of them cannot be read.
        max_share: largest ratio of them.

    Raises:
        UserError: there are more, or no other utterance is left.
    """
    count = len(problems)
    total = len(corpus.index)
    most = max(max_share * total, 1) if max_share else 0
    if count and (count > most or count == total):
        limit = f"more than data.max_bad_share={max_share:g} allows"
        if count <= most:
            limit = "so none is left to score"
        first = problems[0].removesuffix(".")
        raise UserError(
            f"{count} of {total} utterances of the test set {corpus.name!r} cannot be read, "
            f"{limit}. The first one: {first}. Copy the shards again, or remove these utterances."
        )


def check_test_set(
    corpus: Corpus,
    cache: ShardCache,
    name: str,
    normalize: Callable[[str], str],
    max_bad_share: float,
) -> None:
    """Check the keys and references of a test set. No audio is decoded.

    Args:
        corpus: the test set.
        cache: cache of remote shards.
        name: name of the normalizer.
        normalize: the normalizer.
        max_bad_share: largest ratio of utterances that cannot be read.

    Raises:
        UserError: keys are repeated, the references give no error rate or a wrong one, or too many
            utterances cannot be read.
    """
    reader = Reader([corpus], cache=cache)
    keys: Counter[str] = Counter()
    references = []
    problems = []
    for row in range(len(corpus.index)):
        try:
            sample = reader.tar_sample(Item(corpus=0, row=row))
        except (OSError, ValueError, tarfile.TarError) as error:
            shard = corpus.index.shards[corpus.index.rows[row]["shard"]]
            problems.append(f"utterance {row} in {shard}: {error}")
            continue
        keys[sample.key] += 1
        references.append(sample.fields["text"])
    check_unreadable(corpus, problems, max_bad_share)
    repeated = [key for key, count in keys.items() if count > 1]
    if repeated:
        raise UserError(
            f"the test set {corpus.name!r} has {len(repeated)} repeated keys, "
            f"for example {repeated[0]!r}. Index each utterance once."
        )
    check_references(corpus.name, references, name, normalize)


def check_references(
    test_set: str, references: Sequence[str], name: str, normalize: Callable[[str], str]
) -> None:
    """Check that references fit a normalizer.

    Args:
        test_set: the name of the test set.
        references: the references before normalization.
        name: name of the normalizer.
        normalize: the normalizer.

    Raises:
        UserError: all references are empty after normalization, or most are in another script than
            the normalizer's.
    """
    normalized = [normalize(reference) for reference in references]
    if not any(normalized):
        raise UserError(
            f"all {len(references)} references of the test set {test_set!r} are empty before or "
            f"after the normalizer {name!r}. Add transcripts, or set another normalizer=."
        )
    if name not in NORMALIZER_SCRIPTS:
        return
    with_letters = [text for text in normalized if re.search(r"[^\W\d_]", text)]
    foreign = [text for text in with_letters if not re.search(NORMALIZER_SCRIPTS[name], text)]
    if len(foreign) > ANOTHER_SCRIPT * len(with_letters):
        raise UserError(
            f"{len(foreign)} of {len(with_letters)} references of the test set {test_set!r} are in "
            f"another script than that of the normalizer {name!r}, for example {foreign[0]!r}. "
            "Set normalizer=, or the 'lang' of the set."
        )
