"""Warm start of a projector: read training speech, and apply the fit of models/projector_fit.py."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from asrllm import distributed
from asrllm.audio.reader import Reader, Sample, SampleError
from asrllm.collator.batch import pad_waves
from asrllm.data.corpora import Corpus
from asrllm.data.plan import Item
from asrllm.defaults import RATE, WHISPER_WINDOW
from asrllm.errors import UserError
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.partitioning import gathered
from asrllm.models.projector_fit import (
    TOP,
    AffineMap,
    AlignmentScore,
    Regression,
    SpeechBatch,
    flat_alignment,
    nearest_tokens,
    normalize_frames,
    realign,
    set_affine,
    target_text,
)
from asrllm.progress import ProgressBar, waiting
from asrllm.text_files import JsonObject
from asrllm.training.data import TrainingData

logger = logging.getLogger(__name__)
SHARDS = 32  # about as many are read in total, because remote shards are downloaded whole
WINDOW = 256  # utterances in the order of the shards that are sorted by length
HELD_OUT_EVERY = 10  # one of this many utterances measures the quality
ENCODED_SECONDS = 120.0  # audio that is encoded at a time, padding included
MAX_STACKED_WIDTH = 16384  # width of a stacked frame, for which a matrix of 2 GB is factorized
LOWER_RATE = "Lower model.audio_encoder_projector_ds_rate, or use model.projector_init=random."
MAX_ITERATIONS = 8
MOVED = 0.01  # ratio of moved frames below which the alignments no longer change the fit


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """The result of a warm start.

    Attributes:
        scores: scores of each iteration.
        utterances: number of utterances used on all ranks.
        unreadable: number of utterances that could not be read.
        short: number of utterances with fewer stacked frames than tokens, or without a token.
        tokens: number of different tokens that occur.
    """

    scores: tuple[AlignmentScore, ...]
    utterances: int
    unreadable: int
    short: int
    tokens: int

    def as_json(self) -> JsonObject:
        """Return the numbers for a checkpoint's manifest."""
        return asdict(self)


def warm_start(
    model: AsrLlmModel, data: TrainingData, *, hours: float, device: torch.device
) -> WarmStart:
    """Start a model's projector with the best affine map from training speech to embeddings.

    All ranks call it. The result is the same on all of them, and does not depend on random numbers.

    Args:
        model: the model with its pretrained parts. Its encoder must not be partitioned yet. Its
            projector is changed in place, and its `warm_start` is set.
        data: the run's data.
        hours: hours of speech to read on all ranks together.
        device: where to compute.

    Raises:
        UserError: no utterance can be used, or too many frames are stacked.
    """
    width = model.audio_encoder.output_dim * model.projector.rate
    if width > MAX_STACKED_WIDTH:
        raise UserError(
            "model.projector_init=aligned supports stacked frames of at most "
            f"{MAX_STACKED_WIDTH} numbers, but these have {width}. {LOWER_RATE}"
        )
    model.audio_encoder.to(device).eval()
    model.projector.to(device)
    reader = Reader(data.corpora, limits=data.limits, cache=data.cache, normalize=data.normalize)
    speech = SpeechEncoder(model, reader, device)
    items = choose_utterances(data.corpora, hours)
    batches = speech.encode(items)
    utterances, fitted, unreadable, short = sum_counts(
        device,
        sum(len(batch.counts) for batch in batches),
        sum(len(batch.counts) for batch in batches if not batch.held_out),
        speech.unreadable,
        speech.short,
    )
    if not fitted:
        raise UserError(
            f"model.projector_init=aligned found no usable utterance among {len(items)} of the "
            f"training data: {unreadable} cannot be read, and {short} have no text token or more "
            f"text tokens than audio tokens. {LOWER_RATE}"
        )
    vocabulary = number_tokens(batches)
    embeddings = embeddings_of(model, vocabulary).to(device)
    fit, scores = alternate(batches, embeddings, width=width)
    set_affine(model.projector.mlp, fit, embeddings.mean(0))
    result = WarmStart(
        scores=tuple(scores),
        utterances=utterances,
        unreadable=unreadable,
        short=short,
        tokens=len(vocabulary),
    )
    model.warm_start = result.as_json()
    return result


def describe_warm_start(result: WarmStart) -> str:
    """Return lines that say how much speech a warm start used, and how good its fit is."""
    lines = [
        f"warm start: projector fitted to {result.utterances} utterances with {result.tokens} "
        f"different tokens ({result.short} too short, {result.unreadable} unreadable)"
    ]
    for number, score in enumerate(result.scores, 1):
        quality = "no utterance is held out"
        if score.top1 is not None and score.top5 is not None:
            quality = (
                f"the nearest token is correct for {100 * score.top1:.1f} % of the held-out "
                f"frames, one of the {TOP} nearest for {100 * score.top5:.1f} %"
            )
        moved = f"{100 * score.moved:.1f} % of all frames changed their token"
        lines.append(f"  iteration {number}: {quality}; {moved}")
    return "\n".join(lines)


def choose_utterances(corpora: Sequence[Corpus], hours: float) -> list[Item]:
    """Choose utterances of at most `hours` hours, spread over the corpora by their hours.

    Those of a corpus are spread over some of its shards, at least one.

    Returns:
        The utterances in the order of the corpora and their shards.
    """
    total = sum(corpus.usable_hours for corpus in corpora)
    items: list[Item] = []
    for number, corpus in enumerate(corpora):
        rows = corpus.index.rows
        starts = corpus.index.starts
        ratio = corpus.usable_hours / total
        count = max(round(SHARDS * ratio), 1)
        shards = np.unique(np.linspace(0, len(starts) - 2, count).round().astype(int))
        passing = [
            starts[shard] + np.flatnonzero(corpus.passes(rows[starts[shard] : starts[shard + 1]]))
            for shard in shards.tolist()
        ]
        chosen = np.concatenate(passing)
        available = rows["samples"][chosen].sum(dtype=np.int64) / RATE / 3600
        wanted = hours * ratio
        if available > wanted:
            count = max(int(len(chosen) * wanted / available), 1)
            chosen = chosen[np.linspace(0, len(chosen) - 1, count).round().astype(int)]
        items += [Item(corpus=number, row=row) for row in chosen.tolist()]
    return items


class SpeechEncoder:
    """Reads utterances and encodes them as batches of stacked frames with their tokens."""

    def __init__(self, model: AsrLlmModel, reader: Reader, device: torch.device) -> None:
        """
        Args:
            model: its encoder and projector compute the frames.
            reader: reads the utterances, without augmentation.
            device: device of the encoder and the projector.
        """
        self.model = model
        self.reader = reader
        self.device = device
        self.unreadable = 0
        self.short = 0

    def encode(self, items: Sequence[Item]) -> list[SpeechBatch]:
        """Return the batches of this rank, with a flat alignment."""
        # Each rank reads neighbours, so that few nodes need the same shard.
        first, last = (
            len(items) * rank // distributed.world_size()
            for rank in (distributed.rank(), distributed.rank() + 1)
        )
        own: dict[bool, list[Item]] = {True: [], False: []}
        for number in range(first, last):
            # by the number over all ranks, so that the fit does not depend on the ranks
            held_out = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            own[held_out].append(items[number])
        batches: list[SpeechBatch] = []
        total = sum(map(len, own.values()))
        enabled = distributed.rank() == 0
        with ProgressBar("encoding speech for the projector", total, enabled=enabled) as bar:
            for held_out, chosen in own.items():
                for group in self._groups(chosen):
                    samples = self._read(group)
                    frames, tokens = self._encode(samples) if samples else ([], [])
                    if frames:
                        batches.append(speech_batch(frames, tokens, held_out=held_out))
                    bar.advance(len(group))
        return batches

    def _groups(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        """Group utterances of similar lengths, with at most ENCODED_SECONDS of padded audio.

        Only neighbours are grouped, so that shards are read one after the other.
        """
        shortest = int(WHISPER_WINDOW) * RATE if self.model.config.pad_to_30s else 0
        for start in range(0, len(items), WINDOW):
            lengths: dict[Item, int] = {}
            for item in items[start : start + WINDOW]:
                row = self.reader.corpora[item.corpus].index.rows[item.row]
                lengths[item] = max(int(row["samples"]), shortest)
            group: list[Item] = []
            for item in sorted(lengths, key=lambda item: lengths[item]):
                if group and (len(group) + 1) * lengths[item] > ENCODED_SECONDS * RATE:
                    yield group
                    group = []
                group.append(item)
            yield group

    def _read(self, items: Sequence[Item]) -> list[Sample]:
        samples: list[Sample] = []
        for item in items:
            try:
                samples.append(self.reader.read(item))
            except SampleError as error:
                self.unreadable += 1
                logger.warning("unreadable: %s", error)
        return samples

    @torch.no_grad()
    def _encode(self, samples: Sequence[Sample]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the stacked frames and the tokens of the utterances that can be used."""
        lengths = torch.tensor([len(sample.wave) for sample in samples])
        waves = torch.from_numpy(pad_waves([sample.wave for sample in samples]))
        encoder = self.model.audio_encoder
        features, feature_lengths = encoder.features(waves.to(self.device), lengths.to(self.device))
        frames, frame_lengths = encoder(features, feature_lengths)
        stacked, counts = self.model.projector.stack(frames, frame_lengths)
        normalized = normalize_frames(self.model.projector.mlp, stacked).half().cpu()
        parts = normalized.split(counts.tolist())
        chosen: list[Tensor] = []
        tokens: list[Tensor] = []
        for sample, part in zip(samples, parts, strict=True):
            ids = self._tokens(sample.text)
            if not torch.isfinite(part).all():
                self.unreadable += 1
                logger.warning("unreadable: %s has frames that are not finite", sample.key)
            elif 0 < len(ids) <= len(part):
                chosen.append(part)
                tokens.append(ids)
            else:
                self.short += 1
        return chosen, tokens

    def _tokens(self, text: str) -> Tensor:
        words = target_text(text)
        if not words.strip():
            return torch.empty(0, dtype=torch.long)
        tokenizer = self.model.require_processor().tokenizer
        return torch.tensor(tokenizer(words, add_special_tokens=False).input_ids)


def speech_batch(
    frames: Sequence[Tensor], tokens: Sequence[Tensor], *, held_out: bool
) -> SpeechBatch:
    """Return a batch with a flat alignment.

    Args:
        frames: stacked frames of each utterance (frames, D).
        tokens: tokens of each utterance (tokens,), at most as many as its frames.
        held_out: whether the batch measures the quality.
    """
    aligned = [flat_alignment(ids, len(part)) for ids, part in zip(tokens, frames, strict=True)]
    return SpeechBatch(
        frames=torch.cat([*frames]),
        counts=torch.tensor([len(part) for part in frames]),
        tokens=nn.utils.rnn.pad_sequence([*tokens], batch_first=True),
        token_counts=torch.tensor([len(ids) for ids in tokens]),
        alignment=torch.cat(aligned),
        held_out=held_out,
    )


def number_tokens(batches: Sequence[SpeechBatch]) -> list[int]:
    """Number the tokens of all ranks from 0, in place, and return the tokens in this order."""
    own = {0}  # the rows of batches are padded with 0
    for batch in batches:
        own |= set(batch.tokens.unique().tolist())
    vocabulary = sorted(set().union(*distributed.gather_objects(own)))
    table = torch.tensor(vocabulary)
    for batch in batches:
        batch.tokens = torch.searchsorted(table, batch.tokens)
        batch.alignment = torch.searchsorted(table, batch.alignment)
    return vocabulary


@torch.no_grad()
def embeddings_of(model: AsrLlmModel, tokens: Sequence[int]) -> Tensor:
    """Return the LLM's input embeddings of tokens (V, E) in float32."""
    table = model.llm.get_input_embeddings()
    with gathered(table.weight):
        # The module is called, because Gemma 3 scales the rows of its weight.
        return table(torch.tensor(tokens, device=table.weight.device)).float()


def alternate(
    batches: Sequence[SpeechBatch], embeddings: Tensor, *, width: int
) -> tuple[AffineMap, list[AlignmentScore]]:
    """Fit and realign in turn until the alignments change little.

    Args:
        batches: batches of this rank. Their alignments change in place.
        embeddings: embeddings of the tokens that occur (V, E), on the device to compute on.
        width: width of a stacked frame.

    Returns:
        The last fit, and the scores of each iteration.
    """
    with waiting("summing the statistics of the projector's fit"):
        regression = Regression(
            batches, embeddings, width=width, sum_over_ranks=distributed.sum_over_ranks
        )
    scores: list[AlignmentScore] = []
    enabled = distributed.rank() == 0
    with ProgressBar("fitting the projector", MAX_ITERATIONS, enabled=enabled, brief=True) as bar:
        for _ in range(MAX_ITERATIONS):
            fit = regression.fit()
            score = realign_all(batches, fit, embeddings)
            scores.append(score)
            note = ""
            if score.top1 is not None:
                note = f"correct for {100 * score.top1:.1f} % of the held-out frames"
            bar.advance(note=note)
            if score.moved < MOVED:
                break
    return fit, scores


def realign_all(
    batches: Sequence[SpeechBatch], fit: AffineMap, embeddings: Tensor
) -> AlignmentScore:
    """Realign the batches of all ranks in place, and measure the held-out ones."""
    counts = torch.zeros(5, dtype=torch.float64, device=embeddings.device)
    for batch in batches:
        outputs, alignment = realign(batch, fit, embeddings)
        counts[0] += len(alignment)
        counts[1] += (alignment != batch.alignment).sum()
        batch.alignment = alignment
        if batch.held_out:
            right = nearest_tokens(outputs, embeddings) == alignment.to(embeddings.device)[:, None]
            counts[2] += len(alignment)
            counts[3] += right[:, 0].sum()
            counts[4] += right.sum()
    frames, moved, held_out, first, among_first = distributed.sum_over_ranks(counts).tolist()
    return AlignmentScore(
        top1=first / held_out if held_out else None,
        top5=among_first / held_out if held_out else None,
        moved=moved / frames,
    )


def sum_counts(device: torch.device, *own: int) -> list[int]:
    """Return the sums over all ranks of some counts."""
    return distributed.sum_over_ranks(torch.tensor(own, device=device)).tolist()
