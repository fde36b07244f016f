"""Text normalisers: of transcripts for training, of both sides for scoring, where each is named in the result."""

import functools
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import kaldialign

from asrllm.errors import UserError, nearest

HAN = "[\u3400-\u9fff\U00020000-\U0003ffff]"
# Chinese and Japanese, and their punctuation
NO_SPACE_BETWEEN = re.compile("[\u3000-\u30ff\u3400-\u9fff\uff00-\uff9f\U00020000-\U0003ffff]")


# Whisper's, in its order: words in <> or [], then words in ()
TAGS = (re.compile(r"[<\[][^>\]]*[>\]]"), re.compile(r"\([^)]+?\)"))
# characters that are not seen, but are of a visible category: grapheme joiner, Mongolian and other variation selectors
INVISIBLE_MARKS = frozenset(
    [0x34F, 0x180B, 0x180C, 0x180D, 0x180F, *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)]
)


class _Invisible(dict[int, int | None]):
    """A table for str.translate that drops what is not seen and is no white space; it looks a character up once."""

    def __missing__(self, code: int) -> int | None:
        is_format = unicodedata.category(chr(code)) in ("Cf", "Cc") and not chr(code).isspace()
        self[code] = None if is_format or code in INVISIBLE_MARKS else code
        return self[code]


_INVISIBLE = _Invisible()


def drop_invisible(text: str) -> str:
    """Remove zero-width, format and control characters, so that nobody is charged with an error that cannot be seen.

    Among them are the zero-width joiner and non-joiner. In Persian and in Indic scripts they choose the form
    of a letter, and the same word is written with and without them. Whisper's normalisers keep them; those of
    the Indic NLP library remove them.
    """
    return text if text.isascii() and text.isprintable() else text.translate(_INVISIBLE)


def drop_tags(text: str) -> str:
    """Remove words in brackets, such as [noise], <unk> and (laughs), as Whisper's normalisers do."""
    for tag in TAGS:
        text = tag.sub("", text)
    return text


def basic(text: str) -> str:
    """Return the words of a text in any language, for scoring and for training.

    Words in brackets and invisible characters are removed, and NFKC and lower case are applied. Punctuation and
    symbols become spaces, except apostrophes within words. Unlike Whisper's, it keeps combining marks, without
    which Indic scripts cannot be read.
    """
    return _fold(drop_tags(drop_invisible(text)))


def _fold(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    kept = "".join(" " if unicodedata.category(c)[0] in "PS" and c != "'" else c for c in text)
    return " ".join(re.sub(r"(?<!\w)'|'(?!\w)", " ", kept).split())


def zh(text: str) -> str:
    """basic, traditional characters made simplified, no spaces between Chinese characters. Needs the extra `zh`."""
    return _simplify(basic(text))


def _simplify(text: str) -> str:
    return re.sub(rf"(?<={HAN})\s+(?={HAN})", "", _simplifier().convert(text))


def zh_numbers(text: str) -> str:
    """zh with numbers as digits, so that 一百二十三 and 123 are the same. Needs the extra `zh`."""
    text = unicodedata.normalize("NFKC", drop_tags(drop_invisible(text)))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # cn2an's, of what is no number and stays as it is: 万一
        return _simplify(_fold(_digits()(text)))


def en(text: str) -> str:
    """Whisper's English normaliser: contractions, numbers and British spelling in one form, fillers and brackets out.

    Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", appendix C. Spoken digits become one number.
    """
    return str(_english()(drop_invisible(text)))


@functools.lru_cache(maxsize=1)
def _simplifier() -> Any:
    """Made once in a process: it loads its dictionaries anew each time."""
    try:
        import opencc
    except ImportError as error:
        raise UserError("the normalizer 'zh' needs OpenCC: pip install 'asrllm[zh]'") from error
    return opencc.OpenCC("t2s")


@functools.lru_cache(maxsize=1)
def _digits() -> Callable[[str], str]:
    try:
        import cn2an
    except ImportError as error:
        raise UserError(
            "the normalizer 'zh-numbers' needs cn2an: pip install 'asrllm[zh]'"
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
    return " ".join(text.split())


def join_texts(texts: Iterable[str]) -> str:
    """Texts that follow one another, with a space between two, but none where Chinese or Japanese stands on both sides."""
    joined = ""
    for text in texts:
        beside = NO_SPACE_BETWEEN.match(joined[-1:]) and NO_SPACE_BETWEEN.match(text)
        joined += f" {text}" if joined and text and not beside else text
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
    """The function of that name; key: where the user wrote it. UserError for an unknown name, or one whose extra is not installed."""
    if name not in NORMALIZERS:
        raise UserError(f"{key}={name!r} is unknown: {nearest(name, NORMALIZERS)}")
    NORMALIZERS[name]("")
    return NORMALIZERS[name]


def transcript_normalizer(name: str) -> Callable[[str], str]:
    """Return the function that transcripts pass before training on them: that of a normaliser.

    "none" changes nothing but white space, so that a model learns the joiners of Persian and Indic spelling.
    """
    return single_spaces if name == "none" else normalizer(name, key="data.text_normalization")


@functools.lru_cache(maxsize=1000)
def language_tag(lang: str | None) -> str:
    """One form of what corpora write: 'en_US' -> 'en-us', 'English' (as Lhotse's recipes have it) and 'eng' -> 'en', None -> ''."""
    first, *rest = re.split("[-_]", (lang or "").strip().lower())
    if len(first) > 3:
        from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

        first = TO_LANGUAGE_CODE.get(first, first)
    return "-".join([THREE_LETTERS.get(first, first), *rest])


def normalizer_of(lang: str | None) -> str:
    """The name of a language's normaliser: 'en-US' -> 'en', 'zh' -> 'zh', others -> 'basic'."""
    return BY_LANGUAGE.get(language_tag(lang).split("-")[0], "basic")


def word_errors(reference: str, hypothesis: str) -> int:
    """Insertions, deletions and substitutions between two texts' words, at the fewest."""
    reference, hypothesis = drop_invisible(reference), drop_invisible(hypothesis)
    return int(kaldialign.edit_distance(reference.split(), hypothesis.split())["total"])
