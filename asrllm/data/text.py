"""Text normalisers: of transcripts for training, of both sides for scoring, where each is named in the result."""

import functools
import re
import unicodedata
from collections.abc import Callable
from typing import Any

import kaldialign

from asrllm.errors import UserError, nearest

HAN = "[\u3400-\u9fff]"


def basic(text: str) -> str:
    """NFKC, lower case, punctuation and symbols out (apostrophes within words stay), single spaces. For any language."""
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    kept = "".join(" " if unicodedata.category(c)[0] in "PS" and c != "'" else c for c in text)
    return " ".join(re.sub(r"(?<!\w)'|'(?!\w)", " ", kept).split())


def zh(text: str) -> str:
    """basic, traditional characters made simplified, no spaces between Chinese characters. Needs the extra `zh`."""
    return re.sub(rf"(?<={HAN})\s+(?={HAN})", "", _simplifier().convert(basic(text)))


@functools.lru_cache(maxsize=1)
def _simplifier() -> Any:
    """Made once in a process: it loads its dictionaries anew each time."""
    try:
        import opencc
    except ImportError as error:
        raise UserError("the normalizer 'zh' needs OpenCC: pip install 'asrllm[zh]'") from error
    return opencc.OpenCC("t2s")


def none(text: str) -> str:
    return " ".join(text.split())


NORMALIZERS: dict[str, Callable[[str], str]] = {"basic": basic, "zh": zh, "none": none}


def normalizer(name: str, key: str = "normalizer") -> Callable[[str], str]:
    """The function of that name; key: where the user wrote it. UserError for an unknown name, or one whose extra is not installed."""
    if name not in NORMALIZERS:
        raise UserError(f"{key}={name!r} is unknown: {nearest(name, NORMALIZERS)}")
    if name == "zh":
        _simplifier()
    return NORMALIZERS[name]


def word_errors(reference: str, hypothesis: str) -> int:
    """Insertions, deletions and substitutions between two texts' words, at the fewest."""
    return int(kaldialign.edit_distance(reference.split(), hypothesis.split())["total"])
