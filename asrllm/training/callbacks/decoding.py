"""Greedy decoding of a part of the validation sets."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from asrllm import distributed
from asrllm.data.text import word_errors
from asrllm.defaults import MAX_TOKENS_PER_SECOND, REPETITION_GUARD
from asrllm.training.subset import SILENCE, Subset
from asrllm.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class ValidationSample:
    """errors: between the words of the two texts, both normalised."""

    key: str
    corpus: str
    reference: str
    hypothesis: str
    errors: int


class AskedToEnd(Exception):  # noqa: N818 - no error
    """The run's time is for saving."""


class Decoder:
    """All ranks decode their share of each set's subset. They generate equally often: under ZeRO-3 each needs the others for every layer,
    and transformers keeps them in step within a call."""

    def __init__(self, subsets: Mapping[str, Subset], normalize: Callable[[str], str]) -> None:
        self.subsets, self.normalize = subsets, normalize

    def decode(self, trainer: Trainer, corpus: str) -> list[ValidationSample]:
        """What all ranks have decoded, on every rank. Raises AskedToEnd."""
        model, mine = trainer.engine.module, []
        for batch in self.subsets[corpus].batches(distributed.rank(), distributed.world_size()):
            trainer.watchdog.beat(f"decoding {corpus}", [sample.key for sample, _ in batch])
            if trainer.agree_to_end():
                raise AskedToEnd
            messages = [model.processor.renderer.user_messages(prompt) for _, prompt in batch]
            limits = {
                "max_tokens_per_second": MAX_TOKENS_PER_SECOND,
                "repetition_guard": REPETITION_GUARD,
            }
            texts = map(
                self.normalize,
                model.generate([sample.wave for sample, _ in batch], messages, **limits),
            )
            mine += [
                ValidationSample(
                    key=s.key,
                    corpus=corpus,
                    reference=s.text,
                    hypothesis=text,
                    errors=word_errors(s.text, text),
                )
                for (s, _), text in zip(batch, texts, strict=True)
                if s.key != SILENCE
            ]
        return [decoded for rank in distributed.gather_objects(mine) for decoded in rank]


def word_error_rate(decoded: list[ValidationSample]) -> float | None:
    """Per cent of the references' words; None where there is none."""
    words = sum(len(d.reference.split()) for d in decoded)
    return 100 * sum(d.errors for d in decoded) / words if words else None
