"""The modules of a Zipformer layer.

Yao et al., "Zipformer: A faster and better encoder for automatic speech recognition" (ICLR 2024).
Tensors are (N, T, C). Swoosh, BiasNorm, positions and softmax are computed in float32 and cast
back, because bfloat16 is too coarse for them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

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

# Score of a frame that is not attended to. It is finite, so that a row in which all frames are
# masked does not result in NaN.
MASKED = -1000.0
SWOOSH_L = (4.0, 0.035)  # shift, offset
SWOOSH_R = (1.0, 0.313261687)
SWOOSH_SLOPE = 0.08

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
    """log(1 + exp(x - shift)) - 0.08 x - offset.

    Only x is saved for the backward pass, not its float32 copies.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        shift: float,
        offset: float,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.shift = shift
        y = F.softplus(x.float() - shift).sub_(offset)
        return y.sub_(x.float(), alpha=SWOOSH_SLOPE).to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        (grad,) = grads
        slope = torch.sigmoid(x.float() - ctx.shift).sub_(SWOOSH_SLOPE)
        return (grad.float() * slope).to(grad.dtype), None, None


def swoosh_l(x: Tensor) -> Tensor:
    """Apply SwooshL, the activation of modules that a layer may bypass."""
    return _Swoosh.apply(x, *SWOOSH_L)


def swoosh_r(x: Tensor) -> Tensor:
    """Apply SwooshR, the activation of convolutions."""
    return _Swoosh.apply(x, *SWOOSH_R)


class SwooshR(nn.Module):
    """SwooshR as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply `swoosh_r`."""
        return swoosh_r(x)


def scaled_linear(
    inputs: int,
    outputs: int,
    *,
    scale: float,
    bias: bool = True,
) -> nn.Linear:
    """Return a linear layer that starts small.

    Args:
        inputs: width of the input.
        outputs: width of the output.
        scale: factor of PyTorch's initial weights. The bias is drawn from +-0.1 scale.
        bias: whether there is a bias.
    """
    linear = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        linear.weight.mul_(scale)
        if bias:
            linear.bias.uniform_(-0.1 * scale, 0.1 * scale)
    return linear


class BiasNorm(Scheduled):
    """x * mean((x - b)^2)^(-1/2) * exp(log_scale), with the mean over the channels.

    b is not subtracted from x, so that the length of x still has information.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.randn(width) * 1e-4)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (..., C)."""
        log_scale = self.log_scale
        if self.training:
            log_scale = limit_value(log_scale, -1.5, 1.5)
        difference = x.float() - self.bias.float()
        mean_square = difference.square().mean(-1, keepdim=True)
        scale = mean_square.rsqrt() * log_scale.float().exp()
        return (x.float() * scale).to(x.dtype)


class Bypass(Scheduled):
    """before + (after - before) * scale, by channel.

    `skip` is the fraction of sequences whose output is `before`.
    """

    def __init__(self, width: int, skip: Schedule = 0.0) -> None:
        super().__init__()
        self.skip = skip
        self.bypass_scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Combine the input and the output (N, T, C) of the bypassed modules."""
        scale = self.bypass_scale
        if self.training:
            scale = limit_value(scale, self.now(BYPASS_LOW), 1.0)
        return before + skip_sequences((after - before) * scale, self.now(self.skip))


class Downsample(nn.Module):
    """Weighted sum of each group of `rate` frames. The last frame fills up the last group."""

    def __init__(self, rate: int) -> None:
        super().__init__()
        self.rate = rate
        self.bias = nn.Parameter(torch.zeros(rate))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, T, C) to (N, ceil(T / rate), C)."""
        missing = -x.shape[1] % self.rate
        if missing:
            last = x[:, -1:]
            x = torch.cat([x, last.expand(-1, missing, -1)], 1)
        weights = self.bias.float().softmax(0).to(x.dtype)
        groups = x.unflatten(1, (-1, self.rate))
        return (groups * weights[:, None]).sum(2)


def relative_positions(frames: int, width: int, device: torch.device) -> Tensor:
    """Return the encodings of the distances key - query = 1 - frames ... frames - 1.

    Distances are compressed by a logarithm and mapped to an angle below 90 degrees. The encodings
    are computed in every call: that costs little, works for any length, and a call in bfloat16
    cannot leave rounded encodings behind.

    Args:
        frames: number of frames.
        width: width of an encoding, even.
        device: device of the result.

    Returns:
        (2 frames - 1, width) float32.
    """
    x = torch.arange(1 - frames, frames, device=device, dtype=torch.float32)[:, None]
    c = math.sqrt(width)
    logarithms = (x.abs() + c).log() - math.log(c)
    compressed = c * x.sign() * logarithms
    frequencies = torch.arange(1, width // 2 + 1, device=device)
    angles = (compressed * (2 * math.pi / width)).atan() * frequencies
    pairs = torch.stack([angles.cos(), angles.sin()], 2)
    encodings = pairs.flatten(1)
    encodings[:, -1] = 1.0
    return encodings


class AttentionWeights(Scheduled):
    """Attention weights of all heads, computed once per layer.

    The scores are by content (query . key) and by position (position query . encoding of the
    distance).
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        query_head_dim: int,
        pos_head_dim: int,
        pos_dim: int,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.sizes = (heads * query_head_dim, heads * query_head_dim, heads * pos_head_dim)
        # Scores are not divided by sqrt(query_head_dim). The projection starts smaller instead.
        self.in_proj = scaled_linear(width, sum(self.sizes), scale=query_head_dim**-0.25)
        self.linear_pos = scaled_linear(pos_dim, heads * pos_head_dim, scale=0.05, bias=False)
        self.whiten_keys = Whiten(3.0, groups=heads, grad_scale=0.025)
        self.balance_keys = Balancer(
            min_positive=0.4, max_positive=0.6, min_abs=0.0, max_abs=100.0, probability=0.025
        )

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Compute the attention weights.

        They are in the dtype of x: in float32 those of 8 x 30 s would take 273 MiB per layer. The
        softmax itself is computed in float32.

        Args:
            x: (N, T, C).
            positions: encodings of the distances (2T - 1, pos_dim).
            mask: true where a key is not attended to (N, 1, 1 or T, T).

        Returns:
            (N, heads, T, T).
        """
        query, key, position = self.in_proj(x).split(self.sizes, 2)
        key = self.whiten_keys(self.balance_keys(key))
        if self.training:
            position = position * float(not chance(self.now(POSITION_SKIP)))
        query, key, position = (split_heads(x, self.heads) for x in (query, key, position))
        distances = self.linear_pos(positions).unflatten(1, (self.heads, -1))
        distances = distances.permute(1, 2, 0)  # (heads, pos_head_dim, 2T - 1)
        scores = query @ key.transpose(2, 3)
        scores += by_key(position @ distances)
        return scores.masked_fill_(mask, MASKED).softmax(3)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Map (N, T, C) to (N, heads, T, C / heads)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def by_key(scores: Tensor) -> Tensor:
    """Map scores by distance, key - query, to scores by key.

    Args:
        scores: (N, heads, T, 2T - 1).

    Returns:
        (N, heads, T, T), a view in which row q is shifted left by T - 1 - q.
    """
    n, heads, frames, distances = scores.shape
    scores = scores.contiguous()
    strides = (heads * frames * distances, frames * distances, distances - 1, 1)
    return scores.as_strided(
        (n, heads, frames, frames), strides, scores.storage_offset() + frames - 1
    )


class SelfAttention(nn.Module):
    """Attention with given weights."""

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        value_head_dim: int,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, heads * value_head_dim)
        self.out_proj = scaled_linear(heads * value_head_dim, width, scale=0.05)
        self.whiten = Whiten(WHITENING)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Map x (N, T, C) to the same shape, with weights (N, heads, T, T)."""
        values = split_heads(self.in_proj(x), self.heads)
        output = (weights @ values).transpose(1, 2).flatten(2)
        return self.whiten(self.out_proj(output))


class NonlinAttention(nn.Module):
    """Attention with the weights of one head, between two gates."""

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
        self.whiten_in = Whiten(5.0)
        self.whiten_out = Whiten(5.0)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Map x (N, T, C) to the same shape, with weights (N, T, T)."""
        gate_in, x, gate_out = self.in_proj(x).chunk(3, 2)
        x = self.whiten_in(x) * self.balancer(gate_in).tanh()
        return self.whiten_out(self.out_proj((weights @ x) * gate_out))


class FeedForward(Scheduled):
    """Linear, SwooshL, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, hidden)
        self.out_proj = scaled_linear(hidden, width, scale=0.1)
        self.balancer = Balancer(min_positive=0.3, max_positive=1.0, min_abs=0.75, max_abs=5.0)
        self.whiten = Whiten(WHITENING)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, T, C) to the same shape."""
        hidden = swoosh_l(self.balancer(self.in_proj(x)))
        hidden = dropout_shared_over_time(hidden, self.now(DROPOUT))
        return self.whiten(self.out_proj(hidden))


class ConvModule(nn.Module):
    """Gate, depthwise convolution over time, SwooshR."""

    def __init__(self, width: int, kernel: int, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.in_proj = nn.Linear(width, 2 * width)
        if causal:
            self.depthwise_conv = ChunkCausalConv(width, kernel)
        else:
            self.depthwise_conv = nn.Conv1d(width, width, kernel, groups=width, padding=kernel // 2)
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
        """Map x (N, T, C) to the same shape.

        Args:
            x: (N, T, C).
            padding: true after the end of an utterance (N, T).
            chunk: size of a causal encoder's chunks in frames, or -1 for everything.
            ends: the N true lengths; see ChunkCausalConv.
        """
        x, gate = self.in_proj(x).chunk(2, 2)
        x = x * self.balance_gate(gate).sigmoid()
        x = x.masked_fill(padding[..., None], 0).transpose(1, 2)
        options = (chunk, ends) if self.causal else ()
        x = self.depthwise_conv(x, *options)
        x = self.whiten(self.balance_conv(x).transpose(1, 2))
        return self.out_proj(swoosh_r(x))


class ChunkCausalConv(nn.Module):
    """A causal convolution with half the kernel, plus one within each chunk.

    The latter cannot see over the edges of its chunk, and is scaled near them.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.causal_conv = nn.Conv1d(width, width, (kernel + 1) // 2, groups=width)
        self.chunkwise_conv = nn.Conv1d(width, width, kernel, groups=width, padding=kernel // 2)
        # at the left and at the right edge
        self.chunkwise_conv_scale = nn.Parameter(torch.zeros(2, width, kernel))

    def forward(self, x: Tensor, chunk: int, ends: tuple[int, ...] | None) -> Tensor:
        """Map x (N, C, T) to the same shape.

        Args:
            x: (N, C, T).
            chunk: size of a chunk in frames, or -1 for everything.
            ends: the N true lengths. With them, the chunk of an utterance that is shorter than a
                chunk ends with the utterance.
        """
        frames = x.shape[2]
        if not 0 < chunk <= frames:
            chunk = frames
        causal = self.causal_conv(F.pad(x, (self.kernel // 2, 0)))
        padded = F.pad(x, (0, -frames % chunk))
        chunks = padded.unflatten(2, (-1, chunk)).transpose(1, 2)  # (N, chunks, C, chunk)
        within = self.chunkwise_conv(chunks.flatten(0, 1)).view(chunks.shape)
        within = within * self._edge_scales(chunk, ends)
        return causal + within.transpose(1, 2).flatten(2)[..., :frames]

    def _edge_scales(self, chunk: int, ends: tuple[int, ...] | None) -> Tensor:
        """Return scales (C, chunk), or (N, 1, C, chunk) with `ends`."""
        if ends is None:
            return self._edge_scale(chunk)
        lengths = [min(end, chunk) for end in ends]
        scales: dict[int, Tensor] = {}
        for length in set(lengths):
            scales[length] = F.pad(self._edge_scale(length), (0, chunk - length))
        return torch.stack([scales[length] for length in lengths])[:, None]

    def _edge_scale(self, chunk: int) -> Tensor:
        """Return scales (C, chunk).

        They are 1, plus the left edge's scale at the first `kernel` frames, plus the right edge's
        scale at the last ones.
        """
        left, right = self.chunkwise_conv_scale
        beyond = max(0, chunk - self.kernel)
        at_left = F.pad(left[:, :chunk], (0, beyond))
        at_right = F.pad(right[:, -chunk:], (beyond, 0))
        return 1 + at_left + at_right


class ZipformerLayer(Scheduled):
    """A Zipformer layer."""

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
    ) -> None:
        """Build a layer.

        Args:
            width: number of channels.
            heads: the arguments of AttentionWeights.
            value_head_dim: width of a head's values.
            hidden: width of the second feed-forward module.
            kernel: kernel size of the convolutions.
            causal: whether the convolutions are causal.
            skip: fraction of sequences that training passes by the layer.
        """
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
        """Map x (N, T, C) to the same shape.

        Args:
            x: (N, T, C).
            positions: as in AttentionWeights.
            mask: as in AttentionWeights.
            padding: as in ConvModule.
            chunk: as in ConvModule.
            ends: as in ConvModule.
        """
        before = x
        weights = self.self_attn_weights(x, positions, mask)
        first_head = weights[:, 0]
        if chance(self.now(CONSTANT_ATTENTION)):
            first_head = constant_where_allowed(first_head)
        attention = self.now(ATTENTION_SKIP)
        conv = self.now(CONV_SKIP)
        ff = self.now(FEED_FORWARD_SKIP)
        x = x + self.feed_forward1(x)
        gated = self.balance_nonlin(self.nonlin_attention(x, first_head))
        x = x + skip_sequences(gated, attention)
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
    """Replace attention weights (N, T, T) by equal weights for all keys whose weight is not 0."""
    allowed = (weights > 0).to(weights.dtype)
    return allowed / allowed.sum(2, keepdim=True)
