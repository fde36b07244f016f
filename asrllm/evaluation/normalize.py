"""Text normalisers, named in every result."""

import re
import unicodedata
from collections.abc import Callable

from asrllm.errors import UserError, nearest

HAN = "[\u3400-\u9fff]"


def basic(text: str) -> str:
    """NFKC, lower case, punctuation and symbols out (apostrophes within words stay), single spaces. For any language."""
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    kept = "".join(" " if unicodedata.category(c)[0] in "PS" and c != "'" else c for c in text)
    return " ".join(re.sub(r"(?<!\w)'|'(?!\w)", " ", kept).split())


def zh(text: str) -> str:
    """basic, traditional characters made simplified, no spaces between Chinese characters. Needs the extra `zh`."""
    try:
        import opencc
    except ImportError as error:
        raise UserError("normalizer=zh needs OpenCC: pip install 'asrllm[zh]'") from error
    simplified = opencc.OpenCC("t2s").convert(basic(text))
    return re.sub(rf"(?<={HAN})\s+(?={HAN})", "", simplified)


def none(text: str) -> str:
    return " ".join(text.split())


NORMALIZERS: dict[str, Callable[[str], str]] = {"basic": basic, "zh": zh, "none": none}


def normalizer(name: str) -> Callable[[str], str]:
    if name not in NORMALIZERS:
        raise UserError(f"normalizer={name!r} is unknown: {nearest(name, NORMALIZERS)}")
    return NORMALIZERS[name]
