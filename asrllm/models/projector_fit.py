"""Warm start of a projector in closed form: ridge regression onto the LLM's token embeddings.

With random weights, a projector needs most of its first steps until the LLM responds to the audio.
Here the tokens of a transcript are spread evenly over the utterance's stacked frames (a flat start,
as in the training of hidden Markov models). Then two steps alternate: a regression from the frames
to the embeddings of their tokens, and a Viterbi search for the best monotonic alignment under it.

The sums that the regression needs add up over ranks, so the data may be distributed.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

RIDGE = 300.0  # added to the diagonal of the standardized frames' X'X
APOSTROPHE = re.compile("[’ʼ]")
TOP = 5  # the second accuracy counts frames whose token is among this many nearest ones


@dataclass(kw_only=True)
class SpeechBatch:
    """Utterances with their stacked frames and tokens.

    Tokens are numbered by their place in a table of the embeddings that occur.

    Attributes:
        frames: normalized stacked frames of all utterances (M, D), float16.
        counts: number of stacked frames of each utterance (N,).
        tokens: (N, U), padded with 0.
        token_counts: number of tokens of each utterance (N,), at most `counts`.
        alignment: token of each frame (M,).
        held_out: whether the batch measures the quality instead of entering the regression.
    """

    frames: Tensor
    counts: Tensor
    tokens: Tensor
    token_counts: Tensor
    alignment: Tensor
    held_out: bool


@dataclass(frozen=True, kw_only=True)
class AffineMap:
    """The map x -> weight x + bias from normalized stacked frames to token embeddings.

    Attributes:
        weight: (E, D).
        bias: (E,).
        mean: mean of the map's outputs over the data (E,).
        covariance: covariance of the map's outputs over the data (E, E).
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    covariance: Tensor

    def __call__(self, frames: Tensor) -> Tensor:
        """Map (M, D) to (M, E)."""
        return frames @ self.weight.T + self.bias


@dataclass(frozen=True, kw_only=True)
class AlignmentScore:
    """How well a map names the tokens of frames.

    Attributes:
        top1: ratio of the held-out frames whose nearest embedding is that of their token, or None
            if there are none.
        top5: ratio of the held-out frames whose token is among the five nearest ones, or None.
        moved: ratio of all frames whose token was changed by the last alignment.
    """

    top1: float | None
    top5: float | None
    moved: float


def target_text(text: str) -> str:
    """Return a transcript in lower case after one space, with no punctuation except apostrophes.

    The tokens of such a text are those of common words in most tokenizers.
    """
    text = APOSTROPHE.sub("'", text.lower())
    letters: list[str] = []
    for letter in text:
        is_word = letter == "'" or unicodedata.category(letter)[0] not in "PSZC"
        letters.append(letter if is_word else " ")
    words = [word.strip("'") for word in "".join(letters).split()]
    return " " + " ".join(word for word in words if word)


def flat_alignment(tokens: Tensor, frames: int) -> Tensor:
    """Spread tokens (U,) evenly over frames, of which there are at least U."""
    return tokens[torch.arange(frames) * len(tokens) // frames]


class Regression:
    """Ridge regression from frames to embeddings, with sums over all ranks in float64."""

    def __init__(
        self,
        batches: Iterable[SpeechBatch],
        embeddings: Tensor,
        *,
        width: int,
        sum_over_ranks: Callable[[Tensor], Tensor],
    ) -> None:
        """Sum X'X once, because only the targets change between the iterations.

        Args:
            batches: batches of this rank.
            embeddings: embeddings of the tokens that occur on any rank (V, E), float32 on the
                device to compute on.
            width: width D of the frames.
            sum_over_ranks: sums a tensor over all ranks in place.
        """
        self.batches = [batch for batch in batches if not batch.held_out]
        self.embeddings = embeddings
        self.sum_over_ranks = sum_over_ranks
        count = self._zeros(1)
        total = self._zeros(width)
        for batch in self.batches:
            count += len(batch.frames)
            total += batch.frames.to(total.device).sum(0, dtype=torch.float64)
        self.count = sum_over_ranks(count)
        self.mean = sum_over_ranks(total) / count
        products = self._zeros(width, width)
        for frames, _ in self._centered_frames():
            products += (frames.T @ frames).double()
        self.covariance = sum_over_ranks(products) / count
        deviation = self.covariance.diagonal().sqrt()
        # The noise of a constant element must not be divided by a deviation of almost zero.
        self.deviation = torch.where(deviation > 1e-6 * deviation.max(), deviation, 1.0)
        products = self.covariance * count / torch.outer(self.deviation, self.deviation)
        products.diagonal().add_(RIDGE)
        self.factor = torch.linalg.cholesky(products)

    def fit(self) -> AffineMap:
        """Return the map to the embeddings of the tokens to which the frames are aligned."""
        products = self._zeros(len(self.mean), self.embeddings.shape[1])
        total = self._zeros(self.embeddings.shape[1])
        for frames, alignment in self._centered_frames():
            targets = self.embeddings[alignment]
            products += (frames.T @ targets).double()
            total += targets.sum(0, dtype=torch.float64)
        mean = self.sum_over_ranks(total) / self.count
        products = self.sum_over_ranks(products)
        solution = torch.cholesky_solve(products / self.deviation[:, None], self.factor)
        weight = (solution / self.deviation[:, None]).T
        return AffineMap(
            weight=weight.float(),
            bias=(mean - weight @ self.mean).float(),
            mean=mean.float(),
            covariance=(weight @ self.covariance @ weight.T).float(),
        )

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self.embeddings.device)

    def _centered_frames(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield frames minus their mean (M, D) in float32, and their tokens (M,), on the device."""
        device = self.embeddings.device
        for batch in self.batches:
            yield (batch.frames.to(device) - self.mean).float(), batch.alignment.to(device)


def realign(batch: SpeechBatch, fit: AffineMap, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Find the best alignment of a batch under a map.

    Args:
        batch: the batch, which is not changed.
        fit: the map.
        embeddings: embeddings of the tokens that occur (V, E), on the device to compute on.

    Returns:
        The map's outputs (M, E), and the token of each frame (M,) on the CPU.
    """
    outputs = fit(batch.frames.to(embeddings.device).float())
    counts = batch.counts.tolist()
    padded = nn.utils.rnn.pad_sequence(list(outputs.split(counts)), batch_first=True)
    targets = embeddings[batch.tokens.to(embeddings.device)]  # (N, U, E)
    # the squared distance without the term that is equal for all tokens
    costs = targets.square().sum(-1)[:, None] - 2 * padded @ targets.transpose(1, 2)
    places = viterbi(costs, batch.counts, batch.token_counts).cpu()
    aligned = batch.tokens.gather(1, places)
    rows = [row[:count] for row, count in zip(aligned, counts, strict=True)]
    return outputs, torch.cat(rows)


def viterbi(costs: Tensor, frames: Tensor, tokens: Tensor) -> Tensor:
    """Find the monotonic alignments with the least cost, in which each token has a frame.

    Args:
        costs: cost of aligning each frame with each token (N, T, U).
        frames: number of frames of each utterance (N,).
        tokens: number of tokens of each utterance (N,), at most its frames.

    Returns:
        The token's place for each frame (N, T); 0 after the last frame.
    """
    size, length, width = costs.shape
    frames = frames.to(costs.device)
    never = torch.full((size, 1), torch.inf, device=costs.device)
    scores = never.expand(size, width).clone()
    scores[:, 0] = costs[:, 0, 0]
    advances = torch.zeros(length, size, width, dtype=torch.bool, device=costs.device)
    for t in range(1, length):
        before = torch.cat([never, scores[:, :-1]], 1)
        advances[t] = before < scores
        scores = torch.minimum(before, scores) + costs[:, t]
    places = torch.zeros(size, length, dtype=torch.long, device=costs.device)
    place = tokens.to(costs.device) - 1
    for t in range(length - 1, -1, -1):
        in_utterance = t < frames
        places[:, t] = torch.where(in_utterance, place, 0)
        advanced = advances[t].gather(1, place[:, None])[:, 0]
        place = place - (advanced & in_utterance).long()
    return places


def nearest_tokens(outputs: Tensor, embeddings: Tensor) -> Tensor:
    """Return the TOP tokens (M, TOP) whose embeddings (V, E) are nearest to the outputs (M, E)."""
    distances = embeddings.square().sum(1) - 2 * outputs @ embeddings.T
    return distances.topk(min(TOP, len(embeddings)), largest=False).indices


def set_affine(mlp: nn.Module, fit: AffineMap, center: Tensor) -> None:
    """Make a projector compute an affine map.

    With an output LayerNorm the map's outputs are scaled to the size of the embeddings.

    Args:
        mlp: a projector of linear1, ReLU or GELU, and linear2; changed in place. It may have
            norm_in, which is applied to the frames before they are given to the regression, and
            norm_out.
        fit: the map.
        center: the mean of the embeddings (E,).
    """
    linear1, linear2 = mlp.linear1, mlp.linear2
    assert isinstance(linear1, nn.Linear)
    assert isinstance(linear2, nn.Linear)
    set_linears(linear1, linear2, fit)
    if isinstance(norm := getattr(mlp, "norm_out", None), nn.LayerNorm):
        with torch.no_grad():
            linear2.bias.sub_(center.to(linear2.bias))
            norm.bias.copy_(center)


def set_linears(linear1: nn.Linear, linear2: nn.Linear, fit: AffineMap) -> None:
    """Make linear2(f(linear1(x))) an affine map, for f = ReLU or GELU.

    Both satisfy f(z) - f(-z) = z, so two hidden units represent one number exactly. With H hidden
    units these are the first H // 2 principal components of the outputs. Further units have their
    random input weights, and their output weights are zero.
    """
    size = min(linear1.out_features // 2, linear1.weight.shape[1], linear2.out_features)
    directions = torch.linalg.eigh(fit.covariance.double()).eigenvectors  # ascending
    components = directions[:, directions.shape[1] - size :].float()  # (E, size)
    weight = components.T @ fit.weight
    bias = components.T @ (fit.bias - fit.mean)
    with torch.no_grad():
        linear1.weight[: 2 * size] = torch.cat([weight, -weight]).to(linear1.weight)
        linear1.bias[: 2 * size] = torch.cat([bias, -bias]).to(linear1.bias)
        linear2.weight.zero_()
        linear2.weight[:, : 2 * size] = torch.cat([components, -components], 1).to(linear2.weight)
        linear2.bias.copy_(fit.mean)


def normalize_frames(mlp: nn.Module, stacked: Tensor) -> Tensor:
    """Return the input of a projector's first linear layer (M, D) for stacked frames (M, D)."""
    norm = getattr(mlp, "norm_in", None)
    return stacked if norm is None else norm(stacked)
