"""Text normalizers for training transcripts and for scoring. Results name the one that was used."""

import functools
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import kaldialign

from asrllm.data.scripts import EAST_ASIAN, HAN
from asrllm.errors import UserError, nearest

if TYPE_CHECKING:
    from opencc import OpenCC

# Whisper's patterns in Whisper's order: words in <> or [], then words in ()
TAGS = (re.compile(r"[<\[][^>\]]*[>\]]"), re.compile(r"\([^)]+?\)"))
# Invisible characters of a visible category: the grapheme joiner, and the variation selectors of
# Mongolian and of other scripts
INVISIBLE_MARKS = frozenset(
    [0x34F, 0x180B, 0x180C, 0x180D, 0x180F, *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)]
)


class _Invisible(dict[int, int | None]):
    """A table for str.translate that drops invisible characters other than white space.

    Each character is looked up in the Unicode database only once.
    """

    def __missing__(self, code: int) -> int | None:
        is_format = unicodedata.category(chr(code)) in ("Cf", "Cc") and not chr(code).isspace()
        if is_format or code in INVISIBLE_MARKS:
            self[code] = None
        else:
            self[code] = code
        return self[code]


_INVISIBLE = _Invisible()


def drop_invisible(text: str) -> str:
    """Remove zero-width, format and control characters, so that no invisible error is counted.

    This includes the zero-width joiner and non-joiner. In Persian and in Indic scripts they choose
    the form of a letter, and the same word is written with and without them. Whisper's normalizers
    keep them; those of the Indic NLP library remove them.
    """
    if text.isascii() and text.isprintable():
        return text
    return text.translate(_INVISIBLE)


def drop_tags(text: str) -> str:
    """Remove words in brackets, for example [noise], <unk> and (laughs), as Whisper does."""
    for tag in TAGS:
        text = tag.sub("", text)
    return text


def basic(text: str) -> str:
    """Return the words of a text in any language, for scoring and for training.

    Words in brackets and invisible characters are removed, and NFKC and lower case are applied.
    Punctuation and symbols become spaces, except apostrophes within words. Unlike Whisper's basic
    normalizer, it keeps combining marks, without which Indic scripts cannot be read.
    """
    return _fold(drop_tags(drop_invisible(text)))


def _fold(text: str) -> str:
    """Apply NFKC and lower case, and replace punctuation and symbols by spaces."""
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    text = "".join(" " if _is_separator(c) else c for c in text)
    return " ".join(re.sub(r"(?<!\w)'|'(?!\w)", " ", text).split())


def _is_separator(character: str) -> bool:
    return unicodedata.category(character)[0] in "PS" and character != "'"


def zh(text: str) -> str:
    """Apply `basic`, and simplify Chinese: simplified characters, no spaces between characters.

    Needs the extra `zh`.
    """
    return _simplify(basic(text))


def _simplify(text: str) -> str:
    return re.sub(rf"(?<=[{HAN}])\s+(?=[{HAN}])", "", _simplifier().convert(text))


def zh_numbers(text: str) -> str:
    """Apply `zh` with numbers as digits, so that 一百二十三 equals 123. Needs the extra `zh`."""
    text = unicodedata.normalize("NFKC", drop_tags(drop_invisible(text)))
    with warnings.catch_warnings():
        # cn2an warns about words that look like numbers and stay unchanged, for example 万一
        warnings.simplefilter("ignore", UserWarning)
        return _simplify(_fold(_digits()(text)))


def en(text: str) -> str:
    """Apply Whisper's English normalizer.

    It unifies contractions, numbers and British spelling, and removes fillers and words in
    brackets. Spoken digits become one number. See Radford et al., "Robust Speech Recognition via
    Large-Scale Weak Supervision", appendix C.
    """
    return str(_english()(drop_invisible(text)))


@functools.lru_cache(maxsize=1)
def _simplifier() -> "OpenCC":
    """Return the converter to simplified Chinese. Loading its dictionaries is slow."""
    try:
        import opencc
    except ImportError as error:
        raise UserError(
            "the normalizer 'zh' needs OpenCC. Run: pip install 'asrllm[zh]'"
        ) from error
    return opencc.OpenCC("t2s")


@functools.lru_cache(maxsize=1)
def _digits() -> Callable[[str], str]:
    try:
        import cn2an
    except ImportError as error:
        raise UserError(
            "the normalizer 'zh-numbers' needs cn2an. Run: pip install 'asrllm[zh]'"
        ) from error
    return functools.partial(cn2an.transform, method="cn2an")


@functools.lru_cache(maxsize=1)
def _english() -> Callable[[str], str]:
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


def none(text: str) -> str:
    """Return a text without invisible characters and with single spaces."""
    return single_spaces(drop_invisible(text))


def single_spaces(text: str) -> str:
    """Return a text with each run of white space replaced by one space."""
    return " ".join(text.split())


def join_texts(texts: Iterable[str]) -> str:
    """Join consecutive texts with spaces, except between Chinese or Japanese characters."""
    joined = ""
    for text in texts:
        no_space = re.match(f"[{EAST_ASIAN}]", joined[-1:]) and re.match(f"[{EAST_ASIAN}]", text)
        if joined and text and not no_space:
            joined += " "
        joined += text
    return joined


NORMALIZERS: dict[str, Callable[[str], str]] = {
    "basic": basic,
    "en": en,
    "zh": zh,
    "zh-numbers": zh_numbers,
    "none": none,
}
BY_LANGUAGE = {"en": "en", "zh": "zh", "yue": "zh"}
THREE_LETTERS = {"eng": "en", "zho": "zh", "chi": "zh", "cmn": "zh"}  # ISO 639-2 and -3 -> 639-1


def normalizer(name: str, key: str = "normalizer") -> Callable[[str], str]:
    """Return a normalizer by name.

    Args:
        name: one of NORMALIZERS.
        key: the configuration key that holds the name, for messages.

    Raises:
        UserError: the name is unknown, or its extra is not installed.
    """
    if name not in NORMALIZERS:
        raise UserError(f"{key}={name!r} is unknown. {nearest(name, NORMALIZERS)}")
    NORMALIZERS[name]("")
    return NORMALIZERS[name]


def transcript_normalizer(name: str) -> Callable[[str], str]:
    """Return the function to apply to training transcripts.

    "none" changes only white space, so that a model learns the joiners of Persian and Indic
    spelling. Other names are those of normalizers.
    """
    if name == "none":
        return single_spaces
    return normalizer(name, key="data.text_normalization")


@functools.lru_cache(maxsize=1000)
def language_tag(lang: str | None) -> str:
    """Return a language as a lower-case tag, whatever form a corpus uses.

    For example 'en_US' -> 'en-us', 'English' (as in Lhotse's recipes) and 'eng' -> 'en',
    None -> ''.
    """
    first, *rest = re.split("[-_]", (lang or "").strip().lower())
    if len(first) > 3:
        from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

        first = TO_LANGUAGE_CODE.get(first, first)
    return "-".join([THREE_LETTERS.get(first, first), *rest])


def normalizer_of(lang: str | None) -> str:
    """Return the normalizer's name for a language: 'en-US' -> 'en', 'zh' -> 'zh', else 'basic'."""
    return BY_LANGUAGE.get(language_tag(lang).split("-")[0], "basic")


def word_errors(reference: str, hypothesis: str) -> int:
    """Return the word edit distance: insertions, deletions and substitutions."""
    reference_words = drop_invisible(reference).split()
    hypothesis_words = drop_invisible(hypothesis).split()
    return int(kaldialign.edit_distance(reference_words, hypothesis_words)["total"])
