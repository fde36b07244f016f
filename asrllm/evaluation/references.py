"""What is wrong with a test set is said before a model is loaded for it."""

import re
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence

from asrllm.audio.reader import Reader
from asrllm.data.cache import ShardCache
from asrllm.data.corpora import Corpus
from asrllm.data.plan import Item
from asrllm.data.text import HAN, normalizer_of
from asrllm.errors import UserError

ANOTHER_SCRIPT = 0.5  # of the references, from which on the normaliser is the wrong one
# what a reference of the normaliser's language has letters of; the others take any script
SCRIPTS = {"en": "[A-Za-z]", "zh": HAN, "zh-numbers": HAN}


def language_of(corpus: Corpus) -> str | None:
    """As its data config says, else the one that all its utterances have."""
    found = [lang for lang in corpus.index.about.get("languages", {}) if lang]
    return corpus.lang or (found[0] if len(found) == 1 else None)


def choose_normalizer(name: str, corpus: Corpus) -> str:
    """ "auto": that of the corpus's language."""
    return normalizer_of(language_of(corpus)) if name == "auto" else name


def check_test_set(
    corpus: Corpus, cache: ShardCache, name: str, normalize: Callable[[str], str]
) -> None:
    """Read every transcript, no audio. Raises UserError for repeated keys, and for references that give no error rate or a wrong one.

    name, normalize: the normaliser and its name.
    """
    reader = Reader([corpus], cache=cache)
    keys: Counter[str] = Counter()
    references = []
    for row in range(len(corpus.index)):
        try:
            sample = reader.tar_sample(Item(corpus=0, row=row))
        except (OSError, ValueError, tarfile.TarError) as error:
            raise UserError(
                f"utterance {row} of the test set {corpus.name!r} cannot be read: {error}; index its tars again"
            ) from error
        keys[sample.key] += 1
        references.append(sample.fields["text"])
    if repeated := [key for key, count in keys.items() if count > 1]:
        raise UserError(
            f"the test set {corpus.name!r} has {len(repeated)} repeated keys, such as {repeated[0]!r}: index each utterance once"
        )
    check_references(corpus.name, references, name, normalize)


def check_references(
    test_set: str, references: Sequence[str], name: str, normalize: Callable[[str], str]
) -> None:
    """Raises UserError where nothing is left of all of them, or where they are in another script than the normaliser's."""
    left = [text for reference in references if (text := normalize(reference))]
    if not left:
        raise UserError(
            f"all {len(references)} references of the test set {test_set!r} are empty before or after the normalizer {name!r}: "
            "give it transcripts, or another normalizer="
        )
    script = SCRIPTS.get(name)
    with_letters = [text for text in left if re.search(r"[^\W\d_]", text)]
    foreign = [text for text in with_letters if script and not re.search(script, text)]
    if len(foreign) > ANOTHER_SCRIPT * len(with_letters):
        raise UserError(
            f"{len(foreign)} of {len(with_letters)} references of the test set {test_set!r} are in another script than the normalizer "
            f"{name!r} is for, such as {foreign[0]!r}: set normalizer=, or the 'lang' of the set"
        )
