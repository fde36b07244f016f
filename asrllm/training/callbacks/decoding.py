"""Greedy decoding of a part of the validation sets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from asrllm import distributed
from asrllm.audio.reader import Sample
from asrllm.data.text import word_errors
from asrllm.defaults import MAX_TOKENS_PER_SECOND, REPETITION_GUARD
from asrllm.progress import ProgressBar
from asrllm.training.subset import PADDING_KEY, DecodingSubset
from asrllm.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class ValidationSample:
    """A decoded utterance.

    Attributes:
        key: key of the utterance.
        corpus: name of the validation set.
        reference: normalized reference.
        hypothesis: normalized hypothesis.
        errors: word errors between the two.
    """

    key: str
    corpus: str
    reference: str
    hypothesis: str
    errors: int


class ValidationInterrupted(Exception):  # noqa: N818 - not an error
    """Raised to stop a validation, because the rest of the run's time is needed to save."""


class Decoder:
    """Decodes a part of each validation set, split over the ranks.

    All ranks generate equally often: under ZeRO-3 each needs the others for every layer, and
    transformers keeps them in step within a call.
    """

    def __init__(
        self, subsets: Mapping[str, DecodingSubset], normalize: Callable[[str], str]
    ) -> None:
        """Create a decoder.

        Args:
            subsets: utterances to decode, by validation set.
            normalize: normalizes a hypothesis. References are normalized already.
        """
        self.subsets = subsets
        self.normalize = normalize

    def decode(self, trainer: Trainer, corpus: str) -> list[ValidationSample]:
        """Decode one validation set and return the utterances of all ranks, on every rank.

        Raises:
            ValidationInterrupted: a rank received a signal.
        """
        decoded: list[ValidationSample] = []
        subset = self.subsets[corpus]
        rank, ranks = distributed.rank(), distributed.world_size()
        total = subset.num_batches(ranks)
        with ProgressBar(f"decoding {corpus}", total, enabled=rank == 0, brief=True) as bar:
            for batch in subset.batches(rank, ranks):
                keys = [sample.key for sample, _ in batch]
                trainer.watchdog.beat(f"decoding {corpus}", keys)
                if trainer.sync_preemption():
                    raise ValidationInterrupted
                texts = self._transcribe(trainer, batch)
                for (sample, _), text in zip(batch, texts, strict=True):
                    if sample.key != PADDING_KEY:
                        decoded.append(scored(sample, corpus, text))
                bar.advance()
        samples = []
        for of_rank in distributed.gather_objects(decoded):
            samples += of_rank
        return samples

    def _transcribe(self, trainer: Trainer, batch: Sequence[tuple[Sample, str]]) -> list[str]:
        """Return the normalized hypotheses of (utterance, prompt) pairs."""
        model = trainer.engine.module
        messages = [model.processor.renderer.user_messages(prompt) for _, prompt in batch]
        texts = model.generate(
            [sample.wave for sample, _ in batch],
            messages,
            max_tokens_per_second=MAX_TOKENS_PER_SECOND,
            repetition_guard=REPETITION_GUARD,
        )
        return [self.normalize(text) for text in texts]


def scored(sample: Sample, corpus: str, hypothesis: str) -> ValidationSample:
    """Return a decoded utterance with its word errors."""
    return ValidationSample(
        key=sample.key,
        corpus=corpus,
        reference=sample.text,
        hypothesis=hypothesis,
        errors=word_errors(sample.text, hypothesis),
    )


def word_error_rate(decoded: Sequence[ValidationSample]) -> float | None:
    """Return the word error rate in percent, or None if the references have no words."""
    words = sum(len(sample.reference.split()) for sample in decoded)
    if not words:
        return None
    return 100 * sum(sample.errors for sample in decoded) / words
