"""Whether transcripts mix styles: upper and lower case, with and without punctuation, numbers."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from asrllm.data.corpora import Corpus
from asrllm.data.tars import shortened
from asrllm.data.text import language_tag
from asrllm.doctor.findings import Finding, ok, warning
from asrllm.doctor.overlap import read
from asrllm.training.data import TrainingData

MAX_TEXTS = 3000  # of all corpora together
PER_CORPUS = 500
MIN_TEXTS = 5  # of a style, before it counts
MIN_UPPER = 6  # letters; shorter texts may be abbreviations
MIN_BYTES = 48  # eight English words or 16 Chinese characters; shorter texts may not be sentences
PUNCTUATION = re.compile("[.,!?;:。，、！？；：．…؟،؛।]")
DIGITS = re.compile(r"(?<![A-Za-z\d])\d")  # not in MP3 or H264
# Ordinary text has small numbers as words, and 一 in words that are not numbers.
NUMBER_WORDS = re.compile(
    r"\b(eleven|twelve|(thir|four|fif|six|seven|eigh|nine)teen"
    r"|(twen|thir|for|fif|six|seven|eigh|nine)ty"
    r"|\w*(zwanzig|dreißig|vierzig|fünfzig|sechzig|siebzig|achtzig|neunzig)"
    r"|vingt|trente|quarante|cinquante|soixante"
    r"|veinte|treinta|cuarenta|cincuenta|sesenta|setenta|ochenta|noventa)\b"
    "|[零〇一二三四五六七八九十百千万亿两]{3,}",
    re.IGNORECASE,
)

Group = tuple[object, ...]


@dataclass(frozen=True, kw_only=True)
class Style:
    """Something that a text has or has not.

    Attributes:
        check: the name of the check.
        has: what texts have for which `test` is true.
        lacks: what the others have.
        min_ratio: ratio of the rarer of the two from which a corpus counts as mixed.
        test: whether a text has it; None if it cannot be known.
    """

    check: str
    has: str
    lacks: str
    min_ratio: float
    test: Callable[[str], bool | None]


@dataclass(frozen=True, kw_only=True)
class Text:
    """A normalized transcript.

    Attributes:
        corpus: the name of its corpus.
        group: what a text of another style may differ in on purpose: language, task, prompts.
        text: the transcript.
    """

    corpus: str
    group: Group
    text: str


def is_upper(text: str) -> bool | None:
    """Return whether all letters are upper-case ones."""
    cased = cased_letters(text)
    return cased.isupper() if len(cased) >= MIN_UPPER else None


def has_capitals(text: str) -> bool | None:
    """Return whether a text, which is not in upper case, has upper-case letters."""
    cased = cased_letters(text)
    if not cased or is_upper(text) or is_short(text):
        return None
    return not cased.islower()


def has_punctuation(text: str) -> bool | None:
    """Return whether a text has punctuation of sentences."""
    return None if is_short(text) else bool(PUNCTUATION.search(text))


def has_digits(text: str) -> bool | None:
    """Return whether the numbers of a text are digits, or words."""
    if DIGITS.search(text):
        return True
    return False if NUMBER_WORDS.search(text) else None


def cased_letters(text: str) -> str:
    """Return the letters that have two cases."""
    return "".join(char for char in text if char.lower() != char.upper())


def is_short(text: str) -> bool:
    """Return whether a text may be less than a sentence."""
    return len(text.encode()) < MIN_BYTES


STYLES = (
    Style(
        check="case",
        has="upper-case letters only",
        lacks="lower-case letters",
        min_ratio=0.05,
        test=is_upper,
    ),
    # Of parts of sentences with 6 to 12 words, as in subtitles, 28 % have no capital letter and
    # 16 % no punctuation.
    Style(
        check="case",
        has="capital letters",
        lacks="lower-case letters only",
        min_ratio=0.35,
        test=has_capitals,
    ),
    Style(
        check="punctuation",
        has="punctuation",
        lacks="no punctuation",
        min_ratio=0.35,
        test=has_punctuation,
    ),
    Style(
        check="numbers",
        has="digits",
        lacks="numbers as words",
        min_ratio=0.2,
        test=has_digits,
    ),
)


def check_styles(data: TrainingData) -> list[Finding]:
    """Compare the styles of transcripts within each corpus, and between the corpora."""
    corpora = data.corpora + data.valid
    limit = max(MIN_TEXTS, min(PER_CORPUS, MAX_TEXTS // len(corpora)))
    texts = [text for corpus in corpora for text in sampled_texts(data, corpus, limit)]
    found: dict[str, str] = {}
    for style in STYLES:
        mixed = mixture(style, texts)
        if mixed:
            found.setdefault(style.check, mixed)  # two styles belong to the check "case"
    if not found:
        return [ok("style", f"{len(texts)} transcripts have the same style")]
    fix = "Write them alike, or with data.text_normalization, or give each style its own prompt."
    return [warning(f"style of {check}", text, fix) for check, text in found.items()]


def sampled_texts(data: TrainingData, corpus: Corpus, limit: int) -> Iterator[Text]:
    """Yield transcripts that are spread evenly over a corpus."""
    rows = np.flatnonzero(corpus.passes(corpus.index.rows[:]))
    spread = np.linspace(0, len(rows) - 1, min(limit, len(rows))).round().astype(int)
    for sample in read(data.reader([corpus]), 0, rows[spread]):
        text = data.normalize(str(sample.fields["text"]))
        lang = str(sample.fields.get("lang") or corpus.lang or "")
        prompts = tuple(prompt.text for prompt in corpus.prompts)
        own = str(sample.fields.get("task")), str(sample.fields.get("prompt"))
        # Chinese and English texts without a language are not a mixture
        group = (language_tag(lang).split("-")[0], bool(cased_letters(text)), prompts, *own)
        yield Text(corpus=corpus.name, group=group, text=text)


def mixture(style: Style, texts: list[Text]) -> str:
    """Return how texts differ in a style, or "" if they do not."""
    places: dict[tuple[str, Group], tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for text in texts:
        has = style.test(text.text)
        if has is not None:
            places[text.corpus, text.group][0 if has else 1].append(text.text)
    # for each group, the first corpus whose texts mostly have it, and the first whose do not
    first: dict[Group, list[tuple[str, str] | None]] = defaultdict(lambda: [None, None])
    for (corpus, group), (having, lacking) in places.items():
        both = len(having) + len(lacking)
        fewer = min(len(having), len(lacking))
        if fewer >= max(MIN_TEXTS, style.min_ratio * both):
            return (
                f"{corpus}: of {both} transcripts, {len(having)} have {style.has} "
                f"({shortened(having[0])!r}), the others {style.lacks} ({shortened(lacking[0])!r})"
            )
        if both - fewer < MIN_TEXTS:
            continue
        side = 0 if len(having) > len(lacking) else 1
        first[group][side] = first[group][side] or (corpus, (having, lacking)[side][0])
    for one, other in first.values():
        if one and other:
            return (
                f"transcripts of {one[0]} have {style.has} ({shortened(one[1])!r}), and those of "
                f"{other[0]} {style.lacks} ({shortened(other[1])!r})"
            )
    return ""
