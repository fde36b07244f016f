"""What Zipformer does in training only: schedules, gradient corrections and random masks.

Yao et al., "Zipformer: A faster and better encoder for automatic speech recognition" (ICLR 2024),
sections 3.4 and 3.5 and appendix A. Every draw comes from torch's generators, so that activation
checkpointing and a resumed run repeat it. No draw removes a parameter from the graph, because ZeRO
waits for the gradients of all parameters on every rank. No state is stored between steps.
"""

import itertools
import math
from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

BALANCER_PROBABILITY = ((0, 0.5), (8000, 0.125))
# The published probability is 0.025 to 0.25, depending on the module's last measurement. A resumed
# run would lack that state.
WHITEN_PROBABILITY = 0.1
LIMIT_PROBABILITY = 0.6
TINY = 1e-20  # avoids divisions by zero

# A constant, or (batch count, value) corners with straight lines between them.
Schedule = float | tuple[tuple[float, float], ...]


def value_at(schedule: Schedule, batch_count: int) -> float:
    """Return a schedule's value. It is constant before the first and after the last corner."""
    if not isinstance(schedule, tuple):
        return float(schedule)
    if batch_count <= schedule[0][0]:
        return float(schedule[0][1])
    for (begin, low), (end, high) in itertools.pairwise(schedule):
        if batch_count < end:
            return low + (high - low) * (batch_count - begin) / (end - begin)
    return float(schedule[-1][1])


class Scheduled(nn.Module):
    """A module with schedules.

    Attributes:
        batch_count: number of batches that the weights have been trained on. It is an int, because
            a bfloat16 buffer would stop at 4096. `ZipformerEncoder.set_batch_count` sets it.
    """

    batch_count: int = 0

    def now(self, schedule: Schedule) -> float:
        """Return a schedule's present value, or 0 outside of training."""
        return value_at(schedule, self.batch_count) if self.training else 0.0


def chance(probability: float) -> bool:
    """Return True with this probability. The CPU's generator is used, to not wait for a device."""
    return probability > 0 and torch.rand((), device="cpu").item() < probability


def keep_mask(x: Tensor, shape: tuple[int, ...], drop: float) -> Tensor:
    """Return a random mask with the dtype and device of `x`.

    Args:
        x: a tensor.
        shape: shape of the mask.
        drop: probability of a zero; the other elements are ones.
    """
    return (torch.rand(shape, device=x.device) >= drop).to(x.dtype)


def skip_sequences(x: Tensor, drop: float) -> Tensor:
    """Multiply each of the N sequences of `x` (N, T, C) by 0 with the probability `drop`."""
    if drop <= 0:
        return x
    return x * keep_mask(x, (len(x), 1, 1), drop)


def dropout_shared_over_time(x: Tensor, drop: float) -> Tensor:
    """Apply dropout to `x` (N, T, C) with one mask (N, 1, C) for all frames."""
    if drop <= 0:
        return x
    mask = keep_mask(x, (len(x), 1, x.shape[2]), drop)
    return x * mask / (1 - drop)


class Balancer(Scheduled):
    """Identity whose gradient moves each channel's statistics into their ranges.

    The statistics are the fraction of positive values and the mean absolute value. For a normal
    distribution, the fraction determines mean / deviation, and the mean absolute value is
    sqrt(2 / pi) times the root mean square. The gradient of the loss

        |distance of mean / deviation from its range| + |log distance of the root mean square|

    is added in proportion to the size of the incoming gradient.
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
        """Build a balancer.

        Args:
            channel_dim: dimension of the channels.
            min_positive: minimum fraction of positive values.
            max_positive: maximum fraction of positive values.
            min_abs: minimum mean absolute value.
            max_abs: maximum mean absolute value.
            grad_scale: size of the added gradient relative to the incoming one.
            probability: how often the balancer is active.
        """
        super().__init__()
        self.channel_dim = channel_dim
        self.grad_scale = grad_scale
        self.probability = probability
        self.positive = (min_positive, max_positive)
        self.absolute = (min_abs, max_abs)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, of any shape."""
        if not chance(self.now(self.probability)):
            return x
        means = tuple(_mean_of_fraction(self.now(fraction)) for fraction in self.positive)
        sizes = tuple(self.now(limit) * math.sqrt(math.pi / 2) for limit in self.absolute)
        return _Balance.apply(x, self.channel_dim, means, sizes, self.grad_scale)


def _mean_of_fraction(positive: float) -> float:
    """Return mean / deviation of a normal distribution with that fraction of positive values."""
    if positive <= 0:
        return -math.inf
    if positive >= 1:
        return math.inf
    return NormalDist().inv_cdf(positive)


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        channel_dim: int,
        means: tuple[float, ...],
        sizes: tuple[float, ...],
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.channel_dim = channel_dim
        ctx.means = means
        ctx.sizes = sizes
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        (grad,) = grads
        others = [i for i in range(x.dim()) if i != ctx.channel_dim % x.dim()]
        with torch.enable_grad():
            x = x.detach().float().requires_grad_()
            mean = x.mean(others, keepdim=True)
            square = x.square().mean(others, keepdim=True)
            variance = square - mean.square()
            ratio = mean / variance.clamp(min=TINY).sqrt()
            size = square.clamp(min=TINY).sqrt()
            ratio_loss = (ratio - ratio.clamp(*ctx.means)).abs()
            size_loss = (size.clamp(*ctx.sizes) / size).log().abs()
            (push,) = torch.autograd.grad((ratio_loss + size_loss).sum(), x)
        push_size = push.square().mean(others, keepdim=True).sqrt()
        push = push * (ctx.scale / push_size.clamp(min=TINY))
        balanced = grad.float() + grad.float().abs() * push
        return balanced.to(grad.dtype), None, None, None, None


class Whiten(Scheduled):
    """Identity whose gradient moves the channels' covariance towards a multiple of the identity.

    It acts where the distance is above `limit`. The distance is mean(eigenvalue^2) /
    mean(eigenvalue)^2 over the covariance of x (..., C), at least 1.
    """

    def __init__(
        self,
        limit: Schedule,
        *,
        groups: int = 1,
        grad_scale: float = 0.01,
    ) -> None:
        """Build the module.

        Args:
            limit: the largest accepted distance.
            groups: number of groups of channels with a covariance each.
            grad_scale: norm of the added gradient relative to the incoming one.
        """
        super().__init__()
        self.limit = limit
        self.groups = groups
        self.grad_scale = grad_scale

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` (..., C)."""
        if not chance(self.now(WHITEN_PROBABILITY)):
            return x
        return _Whiten.apply(x, self.groups, self.now(self.limit), self.grad_scale)


class _Whiten(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        groups: int,
        limit: float,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.groups = groups
        ctx.limit = limit
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        (grad,) = grads
        with torch.enable_grad():
            x = x.detach().float().requires_grad_()
            distance = distance_from_white(x, ctx.groups)
            (push,) = torch.autograd.grad(distance, x)
        is_active = distance.detach() > ctx.limit
        push_size = push.norm().clamp(min=TINY)
        strength = ctx.scale * grad.float().norm() / push_size * is_active
        whitened = grad.float() + push * strength
        return whitened.to(grad.dtype), None, None, None


def distance_from_white(x: Tensor, groups: int) -> Tensor:
    """Return how far the channels' covariance is from a multiple of the identity.

    Args:
        x: (..., C).
        groups: number of groups of channels with a covariance each.

    Returns:
        A scalar of at least 1: the mean of the squared eigenvalues of the groups' covariances,
        divided by the square of their mean.
    """
    frames = x.flatten(0, -2)
    x = frames.unflatten(1, (groups, -1)).transpose(0, 1)  # (groups, frames, C / groups)
    x = x - x.mean(1, keepdim=True)
    covariance = x.transpose(1, 2) @ x / x.shape[1]
    mean = covariance.diagonal(dim1=1, dim2=2).mean()
    mean_square = covariance.square().sum() / x.shape[2] / groups
    return mean_square / (mean.square() + TINY)


def limit_value(parameter: Tensor, low: float, high: float) -> Tensor:
    """Return the parameter, with a gradient that keeps it within limits.

    With LIMIT_PROBABILITY, the gradient of elements outside of [low, high] is reversed if it would
    move them further out.
    """
    if not chance(LIMIT_PROBABILITY):
        return parameter
    return _Limit.apply(parameter, low, high)


class _Limit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        low: float,
        high: float,
    ) -> Tensor:
        # not x itself, because ZeRO-3 releases it before the backward pass
        ctx.save_for_backward(x < low, x > high)
        return x.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        below, above = ctx.saved_tensors
        (grad,) = grads
        is_outward = (below & (grad > 0)) | (above & (grad < 0))
        return torch.where(is_outward, -grad, grad), None, None


class ScaleGradient(nn.Module):
    """Identity whose gradient is multiplied by `factor` in training."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, of any shape."""
        if not self.training:
            return x
        return _Scale.apply(x, self.factor)


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.factor, None
