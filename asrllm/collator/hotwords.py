"""Hotwords: a list in the prompt of words that may occur in the utterance."""

import hashlib
import random
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from pydantic import Field

from asrllm.data.scripts import JOINED
from asrllm.defaults import HOTWORDS_TEMPLATE
from asrllm.errors import UserError
from asrllm.schema import Ratio, RatioBelowOne, component
from asrllm.text_files import read_text

PLACE = "{words}"
# An apostrophe within a word belongs to it ("don't"), except in "'s": McDonald's names McDonald.
APART = re.compile(r"(?<!\w)'|'(?!\w)|'(?=s\b)")


@component
class HotwordConfig:
    """A list in the prompt with words of the utterance and other words."""

    file: str | None = None
    """one word or phrase per line; samples may have their own as "hotwords" in their JSON"""
    prob: Ratio = 0.0
    """ratio of utterances with a list"""
    max_words: int = Field(default=20, ge=1, le=10_000)
    """longest list"""
    distractor_rate: RatioBelowOne = 0.5
    """ratio of words in the list that are not in the utterance"""
    template: str = HOTWORDS_TEMPLATE
    """text of the list, which is appended to the prompt"""

    def __post_init__(self) -> None:
        if self.template.count(PLACE) != 1:
            raise UserError(
                f"data.hotwords.template={self.template!r} does not contain {PLACE} exactly once. "
                f"Write {PLACE} where the list goes."
            )


def filled(template: str, words: Sequence[str]) -> str:
    """Return the template with a list of words, or "" without words."""
    return template.replace(PLACE, ", ".join(words)) if words else ""


def with_context(prompt: str, context: str) -> str:
    """Return a prompt with a filled template, in training as in decoding."""
    return f"{prompt} {context}".rstrip()


class Hotwords:
    """Draws the list of hotwords of each utterance."""

    def __init__(self, config: HotwordConfig, *, seed: int, forbidden: str) -> None:
        """
        Args:
            config: file, probability, sizes and template.
            seed: seed of the draws.
            forbidden: the audio token, which no hotword may contain.

        Raises:
            UserError: the template or the file contains the audio token, or the file has no word.
        """
        if forbidden in config.template:
            raise UserError(
                f"data.hotwords.template={config.template!r} contains the audio token "
                f"{forbidden!r}. Remove it."
            )
        self.config = config
        self.seed = seed
        self.forbidden = forbidden
        self.phrases = _read_phrases(config.file, forbidden) if config.file else {}
        self._names = list(self.phrases)
        self._lengths = _lengths_by_first(self._names)

    def context(self, text: str, *, key: str, pass_index: int, own: Sequence[str] = ()) -> str:
        """Return the filled template, or "" if the draw gives this utterance no list.

        A hotword is true if it occurs in the transcript as whole words in any case. Each place in
        the list goes to a distractor with the probability `distractor_rate`, else to the next true
        hotword, until there are no more true hotwords or places. An utterance without a true
        hotword gets as many distractors as one with a single true hotword.

        Args:
            text: the transcript.
            key: key of the utterance. The draws depend on (seed, pass_index, key) only.
            pass_index: earlier passes over the corpus.
            own: hotwords of the sample, which join those of the file.
        """
        identity = f"{self.seed}/{pass_index}/hotwords/{key}".encode()
        digest = hashlib.blake2b(identity, digest_size=8).digest()
        draws = random.Random(int.from_bytes(digest, "little"))
        if draws.random() >= self.config.prob:
            return ""
        own_phrases = self._own_phrases(own)
        occurring = {}
        for name in self._occurring(text, own_phrases):
            occurring[name] = own_phrases.get(name) or self.phrases[name]
        true, others = self._draw_sizes(len(occurring), draws)
        words = draws.sample(list(occurring.values()), true)
        words += self._distractors(others, occurring, own_phrases, draws)
        draws.shuffle(words)  # else their places would reveal the true ones
        return filled(self.config.template, words)

    def _own_phrases(self, own: Sequence[str]) -> dict[str, str]:
        """Return the sample's own hotwords by their names."""
        phrases = {}
        for word in own:
            word = word.replace(self.forbidden, "").strip()
            name = _name(word)
            if name:
                phrases[name] = word
        return phrases

    def _occurring(self, text: str, own: dict[str, str]) -> list[str]:
        """Return the names of the phrases in the text, in its order."""
        units = _units(text)
        own_lengths = _lengths_by_first(own)
        found = {}
        for i, unit in enumerate(units):
            for lengths, names in ((self._lengths, self.phrases), (own_lengths, own)):
                for length in lengths.get(unit, ()):
                    name = " ".join(units[i : i + length])
                    if name in names:
                        found[name] = True
        return list(found)

    def _draw_sizes(self, occurring: int, draws: random.Random) -> tuple[int, int]:
        """Return how many true hotwords and how many distractors the list has."""
        true = 0
        others = 0
        while true < max(occurring, 1) and true + others < self.config.max_words:
            if draws.random() < self.config.distractor_rate:
                others += 1
            else:
                true += 1
        if occurring:
            return true, others
        return 0, true + others if self.config.distractor_rate else 0

    def _distractors(
        self, count: int, occurring: Mapping[str, str], own: Mapping[str, str], draws: random.Random
    ) -> list[str]:
        """Return words that do not occur, first the sample's own, which were chosen for it."""
        absent = [word for name, word in own.items() if name not in occurring]
        words = draws.sample(absent, min(count, len(absent)))
        left = count - len(words)
        if not left:
            return words
        taken = occurring.keys() | own.keys()
        candidates = draws.sample(self._names, min(left + len(taken), len(self._names)))
        others = [self.phrases[name] for name in candidates if name not in taken]
        return words + others[:left]


def _read_phrases(path: str, forbidden: str) -> dict[str, str]:
    """Read a file with one word or phrase per line.

    Returns:
        Each phrase as it is written, by its name. Of phrases that differ only in case or spacing,
        the first one counts.
    """
    phrases: dict[str, str] = {}
    for number, line in enumerate(read_text(path, "data.hotwords.file").splitlines(), 1):
        if forbidden in line:
            raise UserError(
                f"data.hotwords.file={path!r}, line {number}: {line!r} contains the audio token "
                f"{forbidden!r}. Remove it."
            )
        name = _name(line)
        if name:
            phrases.setdefault(name, line.strip())
    if not phrases:
        raise UserError(
            f"data.hotwords.file={path!r} has no word. Write one word or phrase per line."
        )
    return phrases


def _lengths_by_first(names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the lengths in units of the phrases that begin with each unit."""
    lengths: dict[str, tuple[int, ...]] = {}
    for name in names:
        first = name.partition(" ")[0]
        length = name.count(" ") + 1
        if length not in lengths.get(first, ()):
            lengths[first] = (*lengths.get(first, ()), length)
    return lengths


def _name(phrase: str) -> str:
    """Return the units of a phrase, joined by spaces."""
    return " ".join(_units(phrase))


class _Spacing(dict[int, str]):
    """A table for str.translate that puts spaces around signs and unspaced characters.

    It is filled as characters are met.
    """

    def __missing__(self, code: int) -> str:
        char = chr(code)
        is_sign = unicodedata.category(char)[0] in "PS" and char != "'"
        is_unit = is_sign or re.match(f"[{JOINED}]", char)
        self[code] = f" {char} " if is_unit else char
        return self[code]


_SPACING = _Spacing()


def _units(text: str) -> list[str]:
    """Split a text, in lower case, into words, characters of unspaced scripts, and signs.

    Hotwords begin and end at the boundary of a unit.
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    if "'" in text:
        text = APART.sub(" ' ", text)
    return text.translate(_SPACING).split()
