"""The closed-form initialization of a projector agrees with exhaustive and public solvers."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from asrllm.models.projector_fit import (
    RIDGE,
    Regression,
    flat_alignment,
    nearest_tokens,
    realign,
    set_affine,
    target_text,
    viterbi,
)
from asrllm.models.projectors import PROJECTORS
from asrllm.training.warm_start import alternate, speech_batch

WIDTH = 24
SIZE = 10


def paths(frames, tokens):
    """Return every monotonic alignment in which each token has a frame."""
    for cuts in itertools.combinations(range(1, frames), tokens - 1):
        lengths = np.diff([0, *cuts, frames])
        yield np.repeat(np.arange(tokens), lengths)


def test_viterbi_finds_the_cheapest_of_all_alignments():
    random = torch.Generator().manual_seed(0)
    frames = torch.tensor([7, 5, 1, 4, 6])
    tokens = torch.tensor([3, 5, 1, 1, 2])
    costs = torch.randn(5, 7, 5, generator=random)
    found = viterbi(costs, frames, tokens)
    for row, count, length in zip(range(5), frames.tolist(), tokens.tolist(), strict=True):
        every = list(paths(count, length))
        sums = [float(costs[row, torch.arange(count), torch.tensor(path)].sum()) for path in every]
        assert found[row, :count].tolist() == every[int(np.argmin(sums))].tolist()
        assert not found[row, count:].any()


def made_speech(utterances=60, *, noise=0.1, seed=0):
    """Return embeddings (V, SIZE) and batches whose frames are a linear map of them, with noise."""
    random = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(30, SIZE, generator=random)
    mixing = torch.randn(SIZE, WIDTH, generator=random)
    batches, truth = [], []
    for held_out in (False, True):
        frames, tokens, aligned = [], [], []
        for _ in range(utterances):
            ids = torch.randint(1, 30, (6,), generator=random)
            durations = torch.randint(1, 5, (6,), generator=random)
            token_of_frame = ids.repeat_interleave(durations)
            clean = embeddings[token_of_frame] @ mixing
            frames.append(clean + noise * torch.randn(clean.shape, generator=random) + 3)
            tokens.append(ids)
            aligned.append(token_of_frame)
        batches.append(speech_batch(frames, tokens, held_out=held_out))
        truth.append(torch.cat(aligned))
    return embeddings, batches, truth


def test_regression_matches_least_squares_of_numpy():
    embeddings, batches, _ = made_speech()
    regression = Regression(batches, embeddings, width=WIDTH, sum_over_ranks=lambda sums: sums)
    fit = regression.fit()
    x = batches[0].frames.double().numpy()
    y = embeddings[batches[0].alignment].double().numpy()
    standard = (x - x.mean(0)) / x.std(0)
    rows = np.concatenate([standard, np.sqrt(RIDGE) * np.eye(WIDTH)])
    targets = np.concatenate([y - y.mean(0), np.zeros((WIDTH, SIZE))])
    solution, *_ = np.linalg.lstsq(rows, targets, rcond=None)
    np.testing.assert_allclose(
        fit(torch.tensor(x).float()), standard @ solution + y.mean(0), atol=1e-4
    )
    outputs = fit(batches[0].frames.float())
    torch.testing.assert_close(outputs.mean(0), fit.mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        torch.cov(outputs.T, correction=0), fit.covariance, atol=1e-4, rtol=1e-3
    )


def test_constant_input_has_no_weight():
    embeddings, batches, _ = made_speech()
    for batch in batches:
        batch.frames[:, 3] = 7.0
    fit = Regression(batches, embeddings, width=WIDTH, sum_over_ranks=lambda sums: sums).fit()
    assert torch.isfinite(fit.weight).all()
    assert fit.weight[:, 3].abs().max() < 1e-6


def test_alternation_recovers_the_tokens_of_frames(monkeypatch):
    monkeypatch.setattr("asrllm.distributed.sum_over_ranks", lambda sums: sums)  # there is one
    embeddings, batches, truth = made_speech(noise=1.5)
    flat = (batches[1].alignment == truth[1]).float().mean()
    _, scores = alternate(batches, embeddings, width=WIDTH)
    assert flat < 0.7
    assert (batches[1].alignment == truth[1]).float().mean() > 0.95
    assert scores[0].top1 < scores[-1].top1 > 0.9
    assert scores[-1].top5 >= scores[-1].top1
    assert scores[-1].moved < 0.01


def fitted_projector(kind, hidden):
    torch.manual_seed(0)
    mlp = PROJECTORS[kind](WIDTH, SIZE, 1, hidden)
    embeddings, batches, _ = made_speech()
    fit = Regression(batches, embeddings, width=WIDTH, sum_over_ranks=lambda sums: sums).fit()
    center = embeddings.mean(0)
    set_affine(mlp, fit, center)
    return mlp, fit, batches[0].frames.float(), center


def test_wide_mlp_computes_the_map():
    mlp, fit, frames, _ = fitted_projector("mlp", 2 * SIZE + 7)
    torch.testing.assert_close(mlp(frames), fit(frames), atol=1e-4, rtol=1e-4)
    unused = mlp.linear1.weight[2 * SIZE :]
    assert unused.std() > 0.01  # they can still learn
    mlp(frames).square().sum().backward()
    assert mlp.linear2.weight.grad[:, 2 * SIZE :].abs().max() > 0


def test_normed_projector_computes_the_normalized_map():
    mlp, fit, frames, center = fitted_projector("normed", 2 * SIZE)
    mlp.norm_in = nn.Identity()
    expected = nn.functional.layer_norm(fit(frames) - center, (SIZE,))
    torch.testing.assert_close(
        mlp(frames), expected * mlp.norm_out.weight + center, atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("size", [1, 4])
def test_narrow_projector_computes_the_principal_components(size):
    mlp, fit, frames, _ = fitted_projector("mlp", 2 * size)
    lost = (mlp(frames) - fit(frames)).square().sum(1).mean()
    discarded = torch.linalg.eigvalsh(fit.covariance)[:-size].sum()
    torch.testing.assert_close(lost, discarded, atol=1e-3, rtol=1e-2)


def test_frames_keep_their_tokens_in_the_order_of_the_text():
    embeddings, batches, _ = made_speech(8)
    fit = Regression(batches, embeddings, width=WIDTH, sum_over_ranks=lambda sums: sums).fit()
    outputs, alignment = realign(batches[0], fit, embeddings)
    assert outputs.shape == (len(batches[0].frames), SIZE)
    for row, ids in zip(
        alignment.split(batches[0].counts.tolist()), batches[0].tokens, strict=True
    ):
        assert torch.unique_consecutive(row).tolist() == torch.unique_consecutive(ids).tolist()
        assert len(row) >= len(ids)


def test_flat_alignment_gives_every_token_a_frame():
    for tokens, frames in ((1, 1), (3, 3), (3, 7), (5, 9), (4, 400)):
        alignment = flat_alignment(torch.arange(tokens), frames).tolist()
        assert sorted(set(alignment)) == list(range(tokens))
        assert alignment == sorted(alignment)
        counts = np.bincount(alignment)
        assert counts.max() - counts.min() <= 1


def test_nearest_tokens_are_sorted_by_distance():
    embeddings = torch.tensor([[0.0], [1.0], [3.0], [8.0]])
    assert nearest_tokens(torch.tensor([[0.9]]), embeddings).tolist() == [[1, 0, 2, 3]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World!", " hello world"),
        ("  TWO\nlines ", " two lines"),
        ("It’s 5 o'clock: 'Come'.", " it's 5 o'clock come"),
        ("你好，世界。", " 你好 世界"),
        ("naïve Straße", " naïve straße"),
        ("...", " "),
        ("", " "),
    ],
)
def test_target_text_is_lower_case_without_punctuation(text, expected):
    assert target_text(text) == expected
