"""What Zipformer does in training alone: schedules, gradients that keep activations in range, random masks.

Yao et al., "Zipformer: A faster and better encoder for automatic speech recognition" (ICLR 2024), sections 3.4 and 3.5 and appendix A.
Every draw comes from torch's generators, so that activation checkpointing and a resumed run repeat it, and none leaves a parameter out
of the graph, because ZeRO waits for the gradients of all of them on every rank. Nothing here keeps state from one step to the next.
"""

import itertools
import math
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

BALANCER_PROBABILITY = ((0, 0.5), (8000, 0.125))
WHITEN_PROBABILITY = 0.1  # of the published 0.025 to 0.25, which follows what the module saw last: state that a resumed run would lack
LIMIT_PROBABILITY = 0.6

Schedule = (
    float | tuple[tuple[float, float], ...]
)  # a constant, or (batch count, value) corners with straight lines between them


def value_at(schedule: Schedule, batch_count: int) -> float:
    """The schedule's value; before its first and after its last corner it is level."""
    if not isinstance(schedule, tuple):
        return float(schedule)
    if batch_count <= schedule[0][0]:
        return float(schedule[0][1])
    for (begin, low), (end, high) in itertools.pairwise(schedule):
        if batch_count < end:
            return low + (high - low) * (batch_count - begin) / (end - begin)
    return float(schedule[-1][1])


class Scheduled(nn.Module):
    """A module with schedules. batch_count: batches that the weights have been trained on, an int (a bfloat16 buffer would stick at 4096),
    set on all of them by ZipformerEncoder.set_batch_count."""

    batch_count: int = 0

    def now(self, schedule: Schedule) -> float:
        """The schedule's value; 0 outside training."""
        return value_at(schedule, self.batch_count) if self.training else 0.0


def chance(probability: float) -> bool:
    """A draw from the processor's generator: no device is waited for."""
    return probability > 0 and torch.rand((), device="cpu").item() < probability


def keep_mask(x: Tensor, shape: tuple[int, ...], drop: float) -> Tensor:
    """`shape` of ones and, with the probability `drop`, zeros; like x in dtype and device."""
    return (torch.rand(shape, device=x.device) >= drop).to(x.dtype)


def skip_sequences(x: Tensor, drop: float) -> Tensor:
    """x (N, T, C) with some of the N multiplied by 0."""
    return x * keep_mask(x, (len(x), 1, 1), drop) if drop > 0 else x


def dropout_shared_over_time(x: Tensor, drop: float) -> Tensor:
    """Dropout on x (N, T, C) with one mask (N, 1, C) for all frames."""
    return x * keep_mask(x, (len(x), 1, x.shape[2]), drop) / (1 - drop) if drop > 0 else x


class Balancer(Scheduled):
    """Identity whose gradient pushes each channel's share of positive values and mean absolute value into their ranges.

    For a normal distribution the share fixes mean / deviation, and the mean absolute value is sqrt(2 / pi) of the root mean square; the
    loss |distance of mean / deviation| + |log distance of the root mean square| adds its gradient, in proportion to the size of the
    gradient that comes. channel_dim: which dimension the channels are. The limits may be schedules.
    """

    def __init__(
        self,
        channel_dim: int = -1,
        *,
        min_positive: Schedule = 0.05,
        max_positive: Schedule = 0.95,
        min_abs: Schedule = 0.2,
        max_abs: Schedule = 100.0,
        grad_scale: float = 0.04,
        probability: Schedule = BALANCER_PROBABILITY,
    ) -> None:
        super().__init__()
        self.channel_dim, self.grad_scale, self.probability = channel_dim, grad_scale, probability
        self.positive, self.absolute = (min_positive, max_positive), (min_abs, max_abs)

    def forward(self, x: Tensor) -> Tensor:
        if not chance(self.now(self.probability)):
            return x
        means = tuple(_mean_of_share(self.now(share)) for share in self.positive)
        sizes = tuple(self.now(limit) * math.sqrt(math.pi / 2) for limit in self.absolute)
        return _Balance.apply(x, self.channel_dim, means, sizes, self.grad_scale)


def _mean_of_share(positive: float) -> float:
    """mean / deviation of a normal distribution with that share of positive values."""
    if not 0 < positive < 1:
        return -math.inf if positive <= 0 else math.inf
    return NormalDist().inv_cdf(positive)


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        channel_dim: int,
        means: tuple[float, ...],
        sizes: tuple[float, ...],
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.options = channel_dim, means, sizes, scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (grad,) = ctx.saved_tensors, grads
        channel_dim, means, sizes, scale = ctx.options
        others = [i for i in range(x.dim()) if i != channel_dim % x.dim()]
        with torch.enable_grad():
            x = x.detach().float().requires_grad_()
            mean, square = x.mean(others, keepdim=True), x.square().mean(others, keepdim=True)
            ratio = mean / (square - mean.square()).clamp(min=1e-20).sqrt()
            size = square.clamp(min=1e-20).sqrt()
            loss = (ratio - ratio.clamp(*means)).abs() + (size.clamp(*sizes) / size).log().abs()
            (push,) = torch.autograd.grad(loss.sum(), x)
        push = push * (scale / push.square().mean(others, keepdim=True).sqrt().clamp(min=1e-20))
        return (grad.float() + grad.float().abs() * push).to(grad.dtype), None, None, None, None


class Whiten(Scheduled):
    """Identity whose gradient pushes the channels' covariance towards a multiple of 1, where it is further from it than `limit`.

    The measure is mean(eigenvalue^2) / mean(eigenvalue)^2 over the covariance of x (..., C) in each of `groups` groups of channels, at
    least 1. The push has grad_scale times the norm of the gradient that comes.
    """

    def __init__(self, limit: Schedule, *, groups: int = 1, grad_scale: float = 0.01) -> None:
        super().__init__()
        self.limit, self.groups, self.grad_scale = limit, groups, grad_scale

    def forward(self, x: Tensor) -> Tensor:
        if not chance(self.now(WHITEN_PROBABILITY)):
            return x
        return _Whiten.apply(x, self.groups, self.now(self.limit), self.grad_scale)


class _Whiten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, limit: float, scale: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.options = groups, limit, scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (grad,) = ctx.saved_tensors, grads
        groups, limit, scale = ctx.options
        with torch.enable_grad():
            x = x.detach().float().requires_grad_()
            measure = distance_from_white(x, groups)
            (push,) = torch.autograd.grad(measure, x)
        strength = (
            scale * grad.float().norm() / push.norm().clamp(min=1e-20) * (measure.detach() > limit)
        )
        return (grad.float() + push * strength).to(grad.dtype), None, None, None


def distance_from_white(x: Tensor, groups: int) -> Tensor:
    """x (..., C) -> scalar of at least 1: the mean of the squared eigenvalues of the groups' covariances over their squared mean."""
    x = x.flatten(0, -2).unflatten(1, (groups, -1)).transpose(0, 1)  # (groups, frames, C / groups)
    x = x - x.mean(1, keepdim=True)
    covariance = x.transpose(1, 2) @ x / x.shape[1]
    mean = covariance.diagonal(dim1=1, dim2=2).mean()
    return covariance.square().sum() / x.shape[2] / groups / (mean.square() + 1e-20)


def limit_value(parameter: Tensor, low: float, high: float) -> Tensor:
    """The parameter itself; the gradient of elements outside [low, high] is turned round, most times, where it would lead further out."""
    return _Limit.apply(parameter, low, high) if chance(LIMIT_PROBABILITY) else parameter


class _Limit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(
            x < low, x > high
        )  # not x: ZeRO-3 takes it away before the backward pass
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (below, above), (grad,) = ctx.saved_tensors, grads
        wrong = (below & (grad > 0)) | (above & (grad < 0))
        return torch.where(wrong, -grad, grad), None, None


class ScaleGradient(nn.Module):
    """Identity whose gradient is multiplied by `factor` in training."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return _Scale.apply(x, self.factor) if self.training else x


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.factor, None
