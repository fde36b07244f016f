"""Text normalisers, named in every result."""

import re
import unicodedata
from collections.abc import Callable

from asrllm.errors import UserError, nearest


def basic(text: str) -> str:
    """NFKC, lower case, punctuation and symbols out (apostrophes within words stay), single spaces. For any language."""
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    kept = "".join(" " if unicodedata.category(c)[0] in "PS" and c != "'" else c for c in text)
    return " ".join(re.sub(r"(?<!\w)'|'(?!\w)", " ", kept).split())


def none(text: str) -> str:
    return " ".join(text.split())


NORMALIZERS: dict[str, Callable[[str], str]] = {"basic": basic, "none": none}


def normalizer(name: str) -> Callable[[str], str]:
    if name not in NORMALIZERS:
        raise UserError(f"normalizer={name!r} is unknown: {nearest(name, NORMALIZERS)}")
    return NORMALIZERS[name]
