"""Zipformer in training: schedules, random masks, gradient corrections, and ZeRO."""

import copy
import random

import pytest
import torch

from asrllm.models.encoders.zipformer import layers as layers
from asrllm.models.encoders.zipformer.configuration import ZipformerConfig
from asrllm.models.encoders.zipformer.modeling import ZipformerEncoder, layer_skip
from asrllm.models.encoders.zipformer.training import (
    WHITEN_PROBABILITY,
    Balancer,
    Whiten,
    distance_from_white,
    limit_value,
    skip_sequences,
    value_at,
)
from asrllm.testing import TINY_ZIPFORMER
from tests.models.encoders.test_zipformer import features


def training(**changes):
    torch.manual_seed(0)
    return ZipformerEncoder(ZipformerConfig(**TINY_ZIPFORMER | changes)).train()


def gradients(encoder, seed, x, lengths):
    """Return the output and the gradients by parameter of a training step."""
    encoder.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    out, _ = encoder(x, lengths)
    out.float().square().mean().backward()
    return out.detach(), {name: p.grad for name, p in encoder.named_parameters()}


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (layers.DROPOUT, {0: 0.3, 4000: 0.26, 100_000: 0.1}),
        (layers.POSITION_SKIP, {0: 0.5, 2000: 0.25, 4000: 0.0, 100_000: 0.0}),
        (layers.ATTENTION_SKIP, {0: 0.2, 4000: 0.05, 10_000: 0.025, 100_000: 0.0}),
        (layers.CONV_SKIP, {0: 0.2, 4000: 0.05, 100_000: 0.0}),
        (layers.FEED_FORWARD_SKIP, {0: 0.1, 4000: 0.01, 100_000: 0.0}),
        (layers.CONSTANT_ATTENTION, {0: 0.25, 4000: 0.025, 100_000: 0.025}),
        (layers.BYPASS_LOW, {0: 0.9, 4000: 0.76, 100_000: 0.2}),
        (0.7, {0: 0.7, 100_000: 0.7}),
    ],
)
def test_schedules_are_piecewise_linear(schedule, values):
    for count, value in values.items():
        assert value_at(schedule, count) == pytest.approx(value)


def test_layers_cease_to_be_skipped_one_after_the_other():
    first, last = layer_skip(0, 0.5, 6, 1), layer_skip(5.5, 6, 6, 4)
    assert [value_at(first, n) for n in (0, 4000, 100_000)] == pytest.approx([0.5, 0.035, 0.035])
    assert [value_at(last, n) for n in (0, 3600, 4000, 100_000)] == pytest.approx(
        [0.5, 0.5, 0.07, 0.07]
    )
    encoder = training()
    for stack, rate in zip(encoder.encoder.encoders, (1, 2), strict=True):
        for layer in getattr(stack, "encoder", stack).layers:
            assert value_at(layer.bypass.skip, 100_000) == pytest.approx(0.035 * rate**0.5)


def test_batch_count_is_an_int_that_bfloat16_cannot_round():
    encoder = training().bfloat16()
    encoder.set_batch_count(4097)
    encoder = copy.deepcopy(encoder)
    assert {m.batch_count for m in encoder.modules() if hasattr(m, "batch_count")} == {4097}
    assert not list(encoder.buffers())


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("count", [0, 4000, 100_000])
def test_every_parameter_has_a_gradient_in_every_step(count, causal):
    """A parameter that is used on one rank and not on another would make ZeRO hang."""
    chunks = {"chunk_size": [8, 16, -1], "left_context_frames": [16, 32, -1]} if causal else {}
    encoder = training(causal=causal, **chunks)
    encoder.set_batch_count(count)
    x, lengths = features(60, 41)
    for seed in range(12):
        _, grads = gradients(encoder, seed, x, lengths)
        assert all(grad is not None and grad.isfinite().all() for grad in grads.values())


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_activation_checkpointing_does_not_change_the_gradients(recompute):
    """Skips do not depend on Python's generator, which checkpointing does not restore."""
    encoder = training()
    x, lengths = features(60, 41)
    for count in (0, 100_000):
        encoder.set_batch_count(count)
        for seed in range(6):
            random.seed(seed)
            plain, expected = gradients(encoder, seed, x, lengths)
            again = copy.deepcopy(encoder)
            if recompute:
                again.gradient_checkpointing_enable()
            random.seed(seed + 1)
            out, grads = gradients(again, seed, x, lengths)
            assert torch.equal(out, plain)
            assert all(torch.equal(grads[name], expected[name]) for name in expected)


def test_step_depends_only_on_the_seed():
    """No state is stored between steps, so that a resumed run repeats the uninterrupted one."""
    encoder = training()
    x, lengths = features(60, 41)
    _, expected = gradients(encoder, 5, x, lengths)
    for seed in range(3):
        gradients(encoder, seed, x, lengths)
    _, grads = gradients(encoder, 5, x, lengths)
    assert all(torch.equal(grads[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_training_in_bfloat16_gives_finite_gradients():
    encoder = training().bfloat16()
    x, lengths = features(60, 41)
    for seed in range(6):
        out, grads = gradients(encoder, seed, x, lengths)
        assert out.dtype == torch.bfloat16
        assert all(
            grad.dtype == torch.bfloat16 and grad.isfinite().all() for grad in grads.values()
        )


def test_evaluation_draws_no_random_numbers_and_has_plain_gradients():
    encoder = training().eval()
    x, lengths = features(60, 41)
    out, expected = gradients(encoder, 0, x, lengths)
    again, grads = gradients(encoder, 1, x, lengths)
    assert torch.equal(out, again)
    assert all(torch.equal(grads[name], expected[name]) for name in expected)
    name = "encoder.encoders.0.layers.0.norm.log_scale"
    parameter = encoder.get_parameter(name)
    change = 1e-2
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            parameter.add_(sign * change)
            losses.append(encoder(x, lengths)[0].square().mean().item())
            parameter.sub_(sign * change)
    assert (losses[0] - losses[1]) / (2 * change) == pytest.approx(expected[name].item(), rel=1e-2)


def test_channel_masks_are_drawn_by_sequence():
    encoder = training()
    x = torch.zeros(2000, 1, 16)
    first, second = (mask[:, 0] for mask in encoder.encoder._channel_masks(x))
    for mask, free in ((first, 8), (second, 16)):
        assert (mask[:, :free] == 1).all()
        half = (mask.shape[1] - free) // 2
        lower, upper = mask[:, free], mask[:, -1]
        assert (mask[:, free : free + half] == lower[:, None]).all()
        assert lower.mean() == pytest.approx(0.875, abs=0.04)
        assert upper.mean() == pytest.approx(0.875**2, abs=0.04)
        assert (upper <= lower).all()
    skipped = skip_sequences(torch.ones(2000, 3, 4), 0.2)
    assert set(skipped.unique().tolist()) == {0.0, 1.0}
    assert (skipped.amax((1, 2)) == skipped.amin((1, 2))).all()
    assert skipped.mean() == pytest.approx(0.8, abs=0.04)


def test_gradient_of_a_parameter_is_reversed_outside_of_its_limits():
    x = torch.tensor([-2.0, -2.0, 0.5, 2.0, 2.0], requires_grad=True)
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        x.grad = None
        y = limit_value(x, 0.0, 1.0)
        assert torch.equal(y, x)
        y.backward(torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0]))
        seen.add(tuple(x.grad.tolist()))
    assert seen == {(1.0, -1.0, 1.0, 1.0, -1.0), (-1.0, -1.0, 1.0, 1.0, 1.0)}


def descend(module, x, steps=200, lr=0.02):
    """Move x against the gradients that the module adds to a random one."""
    x = x.clone().requires_grad_()
    for _ in range(steps):
        y = module(x)
        assert torch.equal(y, x)
        (grad,) = torch.autograd.grad(y, x, torch.randn_like(x))
        with torch.no_grad():
            x -= lr * grad
    return x.detach()


def test_balancer_moves_channels_into_their_ranges():
    torch.manual_seed(0)
    x = torch.randn(400, 4) * torch.tensor([1.0, 1.0, 0.05, 8.0]) + torch.tensor(
        [3.0, 0.0, 0.0, 0.0]
    )
    balancer = Balancer(
        min_positive=0.3,
        max_positive=0.7,
        min_abs=0.3,
        max_abs=2.0,
        grad_scale=0.5,
        probability=1.0,
    )
    after = descend(balancer.train(), x)
    assert (after[:, 0] > 0).float().mean() < (x[:, 0] > 0).float().mean() - 0.05
    assert after[:, 2].abs().mean() > 2 * x[:, 2].abs().mean()
    assert after[:, 3].abs().mean() < x[:, 3].abs().mean() - 0.5
    assert (
        torch.equal(descend(balancer.eval(), x, steps=1), descend(torch.nn.Identity(), x, steps=1))
        is False
    )  # random gradients differ
    torch.manual_seed(3)
    plain = descend(balancer, x, steps=1)
    torch.manual_seed(3)
    assert torch.equal(plain, descend(torch.nn.Identity(), x, steps=1))


def test_balancer_does_not_change_gradients_within_the_ranges():
    torch.manual_seed(0)
    x, grad = torch.randn(500, 3, requires_grad=True), torch.randn(500, 3)
    balancer = Balancer(
        min_positive=0.3, max_positive=0.7, min_abs=0.3, max_abs=2.0, probability=1.0
    ).train()
    balancer(x).backward(grad)
    assert torch.equal(x.grad, grad)
    y = torch.randn(5, 3, 20, 2, requires_grad=True)  # channels elsewhere
    Balancer(1, min_abs=5.0, probability=1.0).train()(y).backward(torch.ones_like(y))
    assert (y.grad - 1).abs().sum((0, 2, 3)).min() > 0


def test_whiten_equalises_the_eigenvalues(monkeypatch):
    monkeypatch.setattr("asrllm.models.encoders.zipformer.training.WHITEN_PROBABILITY", 1.0)
    torch.manual_seed(0)
    x = torch.randn(300, 8) @ torch.diag(torch.tensor([4.0, 1, 1, 1, 1, 1, 1, 1]))
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))
    expected = eigenvalues.square().mean() / eigenvalues.mean() ** 2
    assert distance_from_white(x, 1).item() == pytest.approx(expected.item(), rel=1e-4)
    assert distance_from_white(torch.randn(50000, 8), 2).item() == pytest.approx(1, abs=0.01)
    after = descend(Whiten(2.0, grad_scale=1.0).train(), x)
    assert distance_from_white(after, 1) < distance_from_white(x, 1) - 0.5
    loose, grad = x.clone().requires_grad_(), torch.randn(300, 8)
    Whiten(50.0).train()(loose).backward(grad)
    torch.testing.assert_close(loose.grad, grad)
    assert WHITEN_PROBABILITY < 1
