"""Hotwords: lists of words in the prompt that an utterance may hold, some of which it does."""

import hashlib
import random
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from asrllm.errors import UserError
from asrllm.text_files import read_text

PLACE = "{words}"
# scripts without spaces between words, and Hangul, whose particles are written onto the word: any character may begin or end a hotword
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)
# an apostrophe within a word belongs to it ("don't"), but not that of "'s": McDonald's names McDonald
APART = re.compile(r"(?<!\w)'|'(?!\w)|'(?=s\b)")


@dataclass(frozen=True, kw_only=True)
class HotwordConfig:
    file: str | None
    prob: float
    max_words: int
    distractor_rate: float
    template: str

    def __post_init__(self) -> None:
        if not 0 <= self.prob <= 1:
            raise UserError(f"data.hotwords.prob={self.prob} must lie between 0 and 1")
        if not 1 <= self.max_words <= 10_000:
            raise UserError(
                f"data.hotwords.max_words={self.max_words} must be from 1 to 10000; data.hotwords.prob=0 gives no lists"
            )
        if not 0 <= self.distractor_rate < 1:
            raise UserError(
                f"data.hotwords.distractor_rate={self.distractor_rate} must be at least 0 and below 1"
            )
        if self.template.count(PLACE) != 1:
            raise UserError(
                f"data.hotwords.template={self.template!r} must hold {PLACE} once, where the list stands"
            )


def filled(template: str, words: Sequence[str]) -> str:
    return template.replace(PLACE, ", ".join(words)) if words else ""


def with_context(prompt: str, context: str) -> str:
    """The prompt as training and decoding give it; context: of `filled`."""
    return f"{prompt} {context}".rstrip()


class Hotwords:
    """The list of hotwords for each utterance. forbidden: the audio token, which may stand in no hotword."""

    def __init__(self, config: HotwordConfig, *, seed: int, forbidden: str) -> None:
        if forbidden in config.template:
            raise UserError(
                f"data.hotwords.template={config.template!r} holds the audio token {forbidden!r}: take it out"
            )
        self.config, self.seed, self.forbidden = config, seed, forbidden
        self.phrases = _read_phrases(config.file, forbidden) if config.file else {}
        self._names = list(self.phrases)
        self._lengths = _lengths_by_first(self._names)

    def context(self, text: str, *, key: str, pass_index: int, own: Sequence[str] = ()) -> str:
        """The filled template, or "" where the draw from (seed, pass_index, key) says so or there is nothing to list.

        text: the transcript; own: hotwords that the sample carries, which join the list of all. True ones are those that occur in the
        transcript as whole words in any case. Each place of the list is given to a distractor with the probability `distractor_rate`,
        else to the next true one, until these or the places are used up; without a true one there are as many distractors as for one.
        """
        digest = hashlib.blake2b(
            f"{self.seed}/{pass_index}/hotwords/{key}".encode(), digest_size=8
        ).digest()
        draws = random.Random(int.from_bytes(digest, "little"))
        if draws.random() >= self.config.prob:
            return ""
        own_words = [word.replace(self.forbidden, "").strip() for word in own]
        own_phrases = {name: word for word in own_words if (name := _name(word))}
        phrases = {
            name: own_phrases.get(name) or self.phrases[name]
            for name in self._occurring(text, own_phrases)
        }
        true, others = self._share_out(len(phrases), draws)
        words = draws.sample(list(phrases.values()), true)
        words += self._distractors(others, phrases, own_phrases, draws)
        draws.shuffle(words)  # else the true ones would be told by their place
        return filled(self.config.template, words)

    def _occurring(self, text: str, own: dict[str, str]) -> list[str]:
        """Names of the phrases in the text, in its order: every run of units of a length that some phrase with its first unit has."""
        units, own_lengths = _units(text), _lengths_by_first(own)
        found = {}
        for i, unit in enumerate(units):
            for lengths, names in ((self._lengths, self.phrases), (own_lengths, own)):
                for length in lengths.get(unit, ()):
                    name = " ".join(units[i : i + length])
                    if name in names:
                        found[name] = True
        return list(found)

    def _share_out(self, occurring: int, draws: random.Random) -> tuple[int, int]:
        """How many places of the list true hotwords get, and distractors."""
        true = others = 0
        while true < max(occurring, 1) and true + others < self.config.max_words:
            if draws.random() < self.config.distractor_rate:
                others += 1
            else:
                true += 1
        if not occurring:
            return 0, true + others if self.config.distractor_rate else 0
        return true, others

    def _distractors(
        self, count: int, occurring: Mapping[str, str], own: Mapping[str, str], draws: random.Random
    ) -> list[str]:
        """Words that are not in the utterance, the sample's own first: somebody chose them for it."""
        absent = [word for name, word in own.items() if name not in occurring]
        words = draws.sample(absent, min(count, len(absent)))
        left, taken = count - len(words), occurring.keys() | own.keys()
        candidates = (
            draws.sample(self._names, min(left + len(taken), len(self._names))) if left else []
        )
        return words + [self.phrases[name] for name in candidates if name not in taken][:left]


def _read_phrases(path: str, forbidden: str) -> dict[str, str]:
    """One word or phrase a line: its units joined by spaces -> as it is written; of two that differ in case or spacing the first."""
    phrases: dict[str, str] = {}
    for number, line in enumerate(read_text(path, "data.hotwords.file").splitlines(), 1):
        if forbidden in line:
            raise UserError(
                f"data.hotwords.file={path!r}, line {number}: {line!r} holds the audio token {forbidden!r}: take it out"
            )
        if name := _name(line):
            phrases.setdefault(name, line.strip())
    if not phrases:
        raise UserError(
            f"data.hotwords.file={path!r} holds no word: write one word or phrase a line"
        )
    return phrases


def _lengths_by_first(names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """First unit of a phrase -> in how many units such phrases are written."""
    lengths: dict[str, tuple[int, ...]] = {}
    for name in names:
        first, length = name.partition(" ")[0], name.count(" ") + 1
        if length not in lengths.get(first, ()):
            lengths[first] = (*lengths.get(first, ()), length)
    return lengths


def _name(phrase: str) -> str:
    return " ".join(_units(phrase))


class _Spacing(dict[int, str]):
    """For str.translate: spaces around what is a unit by itself, a sign or a character of an unspaced script; filled as characters come."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        sign = unicodedata.category(char)[0] in "PS" and char != "'"
        self[code] = f" {char} " if sign or UNSPACED.match(char) else char
        return self[code]


_SPACING = _Spacing()


def _units(text: str) -> list[str]:
    """Words, characters of unspaced scripts, and signs, without case: hotwords begin and end between units."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    return (APART.sub(" ' ", text) if "'" in text else text).translate(_SPACING).split()
