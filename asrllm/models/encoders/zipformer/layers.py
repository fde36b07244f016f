"""The parts of a Zipformer layer (Yao et al., "Zipformer: A faster and better encoder for automatic speech recognition", ICLR 2024).

Tensors are (N, T, C). Whatever bfloat16 is too coarse for (Swoosh, BiasNorm, positions, softmax) is computed in float32 and cast back.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asrllm.models.encoders.zipformer.training import (
    Balancer,
    Schedule,
    Scheduled,
    Whiten,
    chance,
    dropout_shared_over_time,
    limit_value,
    skip_sequences,
)

MASKED = (
    -1000.0
)  # score of a frame that is not attended to: finite, so that a row without any frame gives no NaN
SWOOSH_L, SWOOSH_R = (4.0, 0.035), (1.0, 0.313261687)  # shift, offset

DROPOUT: Schedule = ((0, 0.3), (20000, 0.1))
POSITION_DROPOUT = 0.15
POSITION_SKIP: Schedule = ((0, 0.5), (4000, 0.0))
ATTENTION_SKIP: Schedule = ((0, 0.2), (4000, 0.05), (16000, 0.0))
CONV_SKIP = ATTENTION_SKIP
FEED_FORWARD_SKIP: Schedule = ((0, 0.1), (4000, 0.01), (50000, 0.0))
CONSTANT_ATTENTION: Schedule = ((0, 0.25), (4000, 0.025))
BYPASS_LOW: Schedule = ((0, 0.9), (20000, 0.2))
WHITENING = ((0, 7.5), (20000, 15.0))


class _Swoosh(torch.autograd.Function):
    """log(1 + exp(x - shift)) - 0.08 x - offset. Keeps x alone for the backward pass, not its float32 copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: float, offset: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.shift = shift
        return F.softplus(x.float() - shift).sub_(offset).sub_(x.float(), alpha=0.08).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (grad,) = ctx.saved_tensors, grads
        return (
            (grad.float() * torch.sigmoid(x.float() - ctx.shift).sub_(0.08)).to(grad.dtype),
            None,
            None,
        )


def swoosh_l(x: Tensor) -> Tensor:
    return _Swoosh.apply(x, *SWOOSH_L)


def swoosh_r(x: Tensor) -> Tensor:
    return _Swoosh.apply(x, *SWOOSH_R)


class SwooshR(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return swoosh_r(x)


def scaled_linear(inputs: int, outputs: int, *, scale: float, bias: bool = True) -> nn.Linear:
    """A linear layer that starts small: PyTorch's weights times `scale`, bias in +-0.1 scale."""
    linear = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        linear.weight.mul_(scale)
        if bias:
            linear.bias.uniform_(-0.1 * scale, 0.1 * scale)
    return linear


class BiasNorm(Scheduled):
    """x * mean((x - b)^2)^(-1/2) * exp(log_scale) over the channels; b is not taken away from x, so its length can say something."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.randn(width) * 1e-4)

    def forward(self, x: Tensor) -> Tensor:
        log_scale = limit_value(self.log_scale, -1.5, 1.5) if self.training else self.log_scale
        scale = (x.float() - self.bias.float()).square().mean(
            -1, keepdim=True
        ).rsqrt() * log_scale.float().exp()
        return (x.float() * scale).to(x.dtype)


class Bypass(Scheduled):
    """before + (after - before) * scale, by channel. skip: the share of sequences that keep `before` alone."""

    def __init__(self, width: int, skip: Schedule = 0.0) -> None:
        super().__init__()
        self.skip = skip
        self.bypass_scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        scale = self.bypass_scale
        if self.training:
            scale = limit_value(scale, self.now(BYPASS_LOW), 1.0)
        return before + skip_sequences((after - before) * scale, self.now(self.skip))


class Downsample(nn.Module):
    """Groups of `rate` frames to their weighted sum; what the last group lacks is the last frame again."""

    def __init__(self, rate: int) -> None:
        super().__init__()
        self.rate = rate
        self.bias = nn.Parameter(torch.zeros(rate))

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) -> (N, ceil(T / rate), C)"""
        if missing := -x.shape[1] % self.rate:
            x = torch.cat([x, x[:, -1:].expand(-1, missing, -1)], 1)
        weights = self.bias.float().softmax(0).to(x.dtype)
        return (x.unflatten(1, (-1, self.rate)) * weights[:, None]).sum(2)


def relative_positions(frames: int, width: int, device: torch.device) -> Tensor:
    """(2 frames - 1, width) float32, the encodings of key - query = 1 - frames ... frames - 1.

    Distances are squeezed by a logarithm and bent onto an angle below 90 degrees. Made anew at each call: it costs little, takes any
    length, and no call in bfloat16 can leave a rounded one behind.
    """
    x = torch.arange(1 - frames, frames, device=device, dtype=torch.float32)[:, None]
    c = math.sqrt(width)
    squeezed = c * x.sign() * ((x.abs() + c).log() - math.log(c))
    angle = (squeezed * (2 * math.pi / width)).atan() * torch.arange(
        1, width // 2 + 1, device=device
    )
    encodings = torch.stack([angle.cos(), angle.sin()], 2).flatten(1)
    encodings[:, -1] = 1.0
    return encodings


class AttentionWeights(Scheduled):
    """The attention of all heads, computed once a layer: content (query . key) and position (its own query . encoding of the distance)."""

    def __init__(
        self, width: int, *, heads: int, query_head_dim: int, pos_head_dim: int, pos_dim: int
    ) -> None:
        super().__init__()
        self.heads, self.sizes = (
            heads,
            (heads * query_head_dim, heads * query_head_dim, heads * pos_head_dim),
        )
        # scores are not divided by sqrt(query_head_dim): the projection starts that much smaller instead
        self.in_proj = scaled_linear(width, sum(self.sizes), scale=query_head_dim**-0.25)
        self.linear_pos = scaled_linear(pos_dim, heads * pos_head_dim, scale=0.05, bias=False)
        self.whiten_keys = Whiten(3.0, groups=heads, grad_scale=0.025)
        self.balance_keys = Balancer(
            min_positive=0.4, max_positive=0.6, min_abs=0.0, max_abs=100.0, probability=0.025
        )

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """x (N, T, C), positions (2T - 1, pos_dim), mask (N, 1, 1 or T, T), true where not attended to -> (N, heads, T, T)

        The weights are in x's dtype: in float32 those of 8 x 30 s would take 273 MiB a layer. Softmax itself computes in float32.
        """
        query, key, position = self.in_proj(x).split(self.sizes, 2)
        key = self.whiten_keys(self.balance_keys(key))
        if self.training:
            position = position * float(not chance(self.now(POSITION_SKIP)))
        query, key, position = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (query, key, position)
        )
        distances = (
            self.linear_pos(positions).unflatten(1, (self.heads, -1)).permute(1, 2, 0)
        )  # (heads, pos_head_dim, 2T - 1)
        scores = query @ key.transpose(2, 3)
        scores += by_distance(position @ distances)
        return scores.masked_fill_(mask, MASKED).softmax(3)


def by_distance(scores: Tensor) -> Tensor:
    """(N, heads, T, 2T - 1) by key - query -> (N, heads, T, T) by key: row q shifted left by T - 1 - q, as a view."""
    n, heads, frames, distances = scores.shape
    scores = scores.contiguous()
    strides = (heads * frames * distances, frames * distances, distances - 1, 1)
    return scores.as_strided(
        (n, heads, frames, frames), strides, scores.storage_offset() + frames - 1
    )


class SelfAttention(nn.Module):
    def __init__(self, width: int, *, heads: int, value_head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, heads * value_head_dim)
        self.out_proj = scaled_linear(heads * value_head_dim, width, scale=0.05)
        self.whiten = Whiten(WHITENING)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x (N, T, C), weights (N, heads, T, T)"""
        values = self.in_proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        return self.whiten(self.out_proj((weights @ values).transpose(1, 2).flatten(2)))


class NonlinAttention(nn.Module):
    """Attention of one head between two gates."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 3 * width // 4
        self.in_proj = nn.Linear(width, 3 * hidden)
        self.out_proj = scaled_linear(hidden, width, scale=0.05)
        self.balancer = Balancer(
            min_positive=((0, 0.25), (20000, 0.05)),
            max_positive=((0, 0.75), (20000, 0.95)),
            min_abs=0.5,
            max_abs=5.0,
        )
        self.whiten_in, self.whiten_out = Whiten(5.0), Whiten(5.0)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x (N, T, C), weights (N, T, T)"""
        s, x, y = self.in_proj(x).chunk(3, 2)
        x = self.whiten_in(x) * self.balancer(s).tanh()
        return self.whiten_out(self.out_proj((weights @ x) * y))


class FeedForward(Scheduled):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, hidden)
        self.out_proj = scaled_linear(hidden, width, scale=0.1)
        self.balancer = Balancer(min_positive=0.3, max_positive=1.0, min_abs=0.75, max_abs=5.0)
        self.whiten = Whiten(WHITENING)

    def forward(self, x: Tensor) -> Tensor:
        hidden = dropout_shared_over_time(
            swoosh_l(self.balancer(self.in_proj(x))), self.now(DROPOUT)
        )
        return self.whiten(self.out_proj(hidden))


class ConvModule(nn.Module):
    """Gate, depthwise convolution over time, SwooshR."""

    def __init__(self, width: int, kernel: int, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.in_proj = nn.Linear(width, 2 * width)
        self.depthwise_conv = (
            ChunkCausalConv(width, kernel)
            if causal
            else nn.Conv1d(width, width, kernel, groups=width, padding=kernel // 2)
        )
        self.out_proj = scaled_linear(width, width, scale=0.05)
        self.balance_gate = Balancer(
            min_positive=((0, 0.05), (8000, 0.025)),
            max_positive=1.0,
            min_abs=1.5,
            max_abs=((0, 5.0), (8000, 10.0)),
        )
        self.balance_conv = Balancer(
            1,
            min_positive=((0, 0.1), (8000, 0.05)),
            max_positive=1.0,
            min_abs=((0, 0.2), (20000, 0.5)),
            max_abs=10.0,
        )
        self.whiten = Whiten(WHITENING)

    def forward(
        self, x: Tensor, padding: Tensor, chunk: int, ends: tuple[int, ...] | None
    ) -> Tensor:
        """x (N, T, C), padding (N, T) true behind an utterance's end, chunk: frames, -1 for all; ends: see ChunkCausalConv"""
        x, gate = self.in_proj(x).chunk(2, 2)
        x = (
            (x * self.balance_gate(gate).sigmoid())
            .masked_fill(padding[..., None], 0)
            .transpose(1, 2)
        )
        x = self.depthwise_conv(x, chunk, ends) if self.causal else self.depthwise_conv(x)
        return self.out_proj(swoosh_r(self.whiten(self.balance_conv(x).transpose(1, 2))))


class ChunkCausalConv(nn.Module):
    """A causal convolution of half the width, plus one within each chunk, scaled near the chunk's edges, which it cannot see over."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.causal_conv = nn.Conv1d(width, width, (kernel + 1) // 2, groups=width)
        self.chunkwise_conv = nn.Conv1d(width, width, kernel, groups=width, padding=kernel // 2)
        self.chunkwise_conv_scale = nn.Parameter(
            torch.zeros(2, width, kernel)
        )  # at the left and at the right edge

    def forward(self, x: Tensor, chunk: int, ends: tuple[int, ...] | None) -> Tensor:
        """x (N, C, T) -> the same shape. ends: the N true lengths, for the chunk of an utterance shorter than one to end with it."""
        frames = x.shape[2]
        chunk = frames if not 0 < chunk <= frames else chunk
        causal = self.causal_conv(F.pad(x, (self.kernel // 2, 0)))
        chunks = (
            F.pad(x, (0, -frames % chunk)).unflatten(2, (-1, chunk)).transpose(1, 2)
        )  # (N, chunks, C, chunk)
        within = self.chunkwise_conv(chunks.flatten(0, 1)).view(chunks.shape) * self._edge_scales(
            chunk, ends
        )
        return causal + within.transpose(1, 2).flatten(2)[..., :frames]

    def _edge_scales(self, chunk: int, ends: tuple[int, ...] | None) -> Tensor:
        """(C, chunk), or (N, 1, C, chunk) with `ends`."""
        if ends is None:
            return self._edge_scale(chunk)
        scales = {
            end: F.pad(self._edge_scale(end), (0, chunk - end))
            for end in {min(end, chunk) for end in ends}
        }
        return torch.stack([scales[min(end, chunk)] for end in ends])[:, None]

    def _edge_scale(self, chunk: int) -> Tensor:
        """(C, chunk): 1 + the left edge's scale at the first `kernel` frames + the right edge's at the last."""
        left, right = self.chunkwise_conv_scale
        beyond = max(0, chunk - self.kernel)
        return 1 + F.pad(left[:, :chunk], (0, beyond)) + F.pad(right[:, -chunk:], (beyond, 0))


class ZipformerLayer(Scheduled):
    """skip: the share of sequences that the layer leaves as they are."""

    def __init__(
        self,
        width: int,
        *,
        heads: dict[str, int],
        value_head_dim: int,
        hidden: int,
        kernel: int,
        causal: bool,
        skip: Schedule,
    ):
        super().__init__()
        self.self_attn_weights = AttentionWeights(width, **heads)
        self.self_attn1 = SelfAttention(width, heads=heads["heads"], value_head_dim=value_head_dim)
        self.self_attn2 = SelfAttention(width, heads=heads["heads"], value_head_dim=value_head_dim)
        self.feed_forward1 = FeedForward(width, hidden * 3 // 4)
        self.feed_forward2 = FeedForward(width, hidden)
        self.feed_forward3 = FeedForward(width, hidden * 5 // 4)
        self.nonlin_attention = NonlinAttention(width)
        self.conv_module1 = ConvModule(width, kernel, causal=causal)
        self.conv_module2 = ConvModule(width, kernel, causal=causal)
        self.norm = BiasNorm(width)
        self.bypass = Bypass(width, skip)
        self.bypass_mid = Bypass(width)
        self.balance_nonlin = Balancer(
            min_positive=0.3,
            max_positive=0.7,
            min_abs=((0, 0.004), (4000, 0.02)),
            max_abs=100.0,
            probability=0.05,
        )
        self.balance_ff2 = Balancer(
            min_positive=0.3,
            max_positive=0.7,
            min_abs=((0, 0.0), (4000, 0.1)),
            max_abs=2.0,
            probability=0.05,
        )
        self.balance_ff3 = Balancer(
            min_positive=0.3,
            max_positive=0.7,
            min_abs=((0, 0.0), (4000, 0.2)),
            max_abs=4.0,
            probability=0.05,
        )
        self.balance_sum = Balancer(min_positive=0.45, max_positive=0.55, min_abs=0.2, max_abs=4.0)
        self.balance_out = Balancer(min_positive=0.45, max_positive=0.55, min_abs=0.1, max_abs=4.0)
        self.whiten = Whiten(((0, 4.0), (20000, 8.0)))

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor,
        padding: Tensor,
        chunk: int = -1,
        ends: tuple[int, ...] | None = None,
    ) -> Tensor:
        """x (N, T, C); positions and mask as AttentionWeights, the others as ConvModule."""
        before = x
        weights = self.self_attn_weights(x, positions, mask)
        first = (
            constant_where_allowed(weights[:, 0])
            if chance(self.now(CONSTANT_ATTENTION))
            else weights[:, 0]
        )
        attention, conv, ff = (
            self.now(schedule) for schedule in (ATTENTION_SKIP, CONV_SKIP, FEED_FORWARD_SKIP)
        )
        x = x + self.feed_forward1(x)
        x = x + skip_sequences(self.balance_nonlin(self.nonlin_attention(x, first)), attention)
        x = x + skip_sequences(self.self_attn1(x, weights), attention)
        x = x + skip_sequences(self.conv_module1(x, padding, chunk, ends), conv)
        x = x + skip_sequences(self.balance_ff2(self.feed_forward2(x)), ff)
        x = self.bypass_mid(before, x)
        x = x + skip_sequences(self.self_attn2(x, weights), attention)
        x = x + skip_sequences(self.conv_module2(x, padding, chunk, ends), conv)
        x = x + skip_sequences(self.balance_ff3(self.feed_forward3(x)), ff)
        x = self.bypass(before, self.norm(self.balance_sum(x)))
        return self.whiten(self.balance_out(x))


def constant_where_allowed(weights: Tensor) -> Tensor:
    """(N, T, T) -> the same weight for every key that has one."""
    allowed = (weights > 0).to(weights.dtype)
    return allowed / allowed.sum(2, keepdim=True)
