"""The items of a live session: stretches of speech with their texts."""

import itertools
import re
import uuid
from dataclasses import dataclass, field

from asrllm.data.scripts import EAST_ASIAN
from asrllm.data.text import join_texts

WORD = re.compile(rf"\s*(?:[{EAST_ASIAN}]|[^\s{EAST_ASIAN}]+)")


@dataclass(kw_only=True)
class SpeechItem:
    """A stretch of speech, which ends at a pause or when the client commits it.

    Attributes:
        id: its name in events.
        has_started: whether the client knows that its speech has started.
        is_discarded: whether the client has cleared it.
        texts: texts of its complete segments.
        hypothesis: the last partial text of the open segment.
        sent: the text that was sent in deltas.
        samples: samples of the complete segments.
        error: why a segment was not transcribed.
    """

    id: str = field(default_factory=lambda: f"item_{uuid.uuid4().hex}")
    has_started: bool = False
    is_discarded: bool = False
    texts: list[str] = field(default_factory=list)
    hypothesis: str = ""
    sent: str = ""
    samples: int = 0
    error: BaseException | None = None

    @property
    def text(self) -> str:
        """The text of the complete segments."""
        return join_texts(self.texts)

    def delta(self, stable: str = "") -> str:
        """Return the text that was not sent yet.

        It is empty if the text does not continue what was sent, which cannot be taken back. The
        event at the end of the item has the whole text.

        Args:
            stable: text of the open segment that will probably not change.
        """
        text = join_texts([*self.texts, stable])
        if not text.startswith(self.sent):
            return ""
        delta = text.removeprefix(self.sent)
        self.sent = text
        return delta


def agreed_text(before: str, now: str) -> str:
    """Return the words on which two successive partial texts agree, without the last word.

    More speech mostly changes the end of a text (Liu et al., "Low-Latency Sequence-to-Sequence
    Speech Recognition and Translation by Partial Hypothesis Selection", 2020), and the last word
    may be incomplete.
    """
    pairs = zip(WORD.findall(before), WORD.findall(now)[:-1], strict=False)
    agreed = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
    return "".join(word for _, word in agreed)
