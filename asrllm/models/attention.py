"""Attention over a packed row, by the fastest kernel available.

Each utterance attends only to itself. The backends are:

sdpa    one torch call per utterance, or for several of similar length in float16 or bfloat16 on the
        CPU; works everywhere, and is the choice on the CPU
flash   flash_attn's kernel for sequences of different lengths; CUDA, float16 or bfloat16
varlen  the same kernel in torch; CUDA, float16 or bfloat16, without soft cap and dropout
"""

import functools
import inspect
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from asrllm.errors import UserError, nearest

PACKED = "asrllm_packed"
HALF = (torch.float16, torch.bfloat16)
# Largest number of scores that are computed without a fused kernel, for float16 and bfloat16 on the
# CPU. That takes half of the fused kernel's time, and a tenth for the single queries of decoding.
# The scores are rounded to the input's dtype, as in transformers' eager attention; the fused
# kernel's are not.
MAX_UNFUSED_SCORES = 1 << 22
# For these, utterances of similar length are computed together, up to a number of scores that stays
# in a core's cache. This takes 40 % of the time of one after the other (43 tokens each, EPYC).
MAX_GROUPED_SCORES = 1 << 19
MAX_LENGTH_RATIO = 1.25  # of the longest to the shortest utterance of a group
# Keys are padded to a multiple of this, because torch's softmax is three times as fast for whole
# vectors.
VECTOR = 32
# Values derived from each cu_seqlens.
_derived = WeakTensorKeyDictionary()


class AttentionOptions(NamedTuple):
    """What attention computes. The fields are arguments of `varlen_attention`."""

    causal: bool
    longest: int
    scale: float
    dropout: float
    window: int | None
    softcap: float | None


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool,
    longest: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute the attention of packed utterances.

    Args:
        query: (1, heads, T, d).
        key: (1, kv heads, T, d).
        value: (1, kv heads, T, d).
        cu_seqlens: boundaries of the N utterances in the row (N + 1,). It must never be changed in
            place, because values derived from it are cached.
        causal: whether a token attends only to itself and to those before it.
        longest: length of the longest utterance; by default it is read from `cu_seqlens`.
        scale: factor of the scores; by default d ** -0.5.
        dropout: dropout of the attention weights.
        window: a token attends to itself and to the window - 1 tokens before it. Needs `causal`.
        softcap: scores become softcap * tanh(scores / softcap).
        backend: a name in BACKENDS, or "auto" for the fastest one.

    Returns:
        (1, T, heads, d).

    Raises:
        UserError: the backend cannot run here.
    """
    assert window is None or causal
    if longest is None:
        longest = max(row_lengths(cu_seqlens))
    if scale is None:
        scale = query.shape[-1] ** -0.5
    # A window that covers every utterance changes nothing, and the fastest kernels have none.
    if window is not None and window >= longest:
        window = None
    options = AttentionOptions(causal, longest, scale, dropout, window, softcap)
    if backend == "auto":
        backend = choose_backend(query, value, options)
    else:
        reason = unsupported_reason(backend, query, value, options)
        if reason:
            raise UserError(
                f"the attention backend {backend!r} cannot run here: {reason}. Use 'auto' or "
                "'sdpa'."
            )
    return BACKENDS[backend](query, key, value, cu_seqlens, options)


def row_lengths(cu_seqlens: Tensor) -> list[int]:
    """Return the lengths of the utterances in a row.

    They are read once per row and not in every layer, because reading them waits for the GPU.
    """
    return _cached(cu_seqlens, "lengths", lambda: cu_seqlens.diff().tolist())


def _cached(cu_seqlens: Tensor, name: Hashable, make: Callable[[], Any]) -> Any:
    values = _derived.setdefault(cu_seqlens, {})
    if name not in values:
        values[name] = make()
    return values[name]


# --- choice of the backend ---


def choose_backend(query: Tensor, value: Tensor, options: AttentionOptions) -> str:
    """Return the name of the fastest backend that can compute this."""
    if not query.is_cuda or query.dtype not in HALF:
        return "sdpa"
    for name in ("flash", "varlen"):
        if not unsupported_reason(name, query, value, options):
            return name
    return "sdpa"


def unsupported_reason(
    backend: str,
    query: Tensor,
    value: Tensor,
    options: AttentionOptions,
) -> str:
    """Return why a backend cannot compute this, or "" if it can."""
    reason = unavailable_reason(backend)
    if reason:
        return reason
    if backend in ("flash", "varlen"):
        reason = _kernel_limits(query, value)
        if reason:
            return reason
    if backend == "varlen" and options.softcap is not None:
        return "it does not support a soft cap of the scores"
    if backend == "varlen" and options.dropout:
        return "it does not support dropout"
    return ""


def _kernel_limits(query: Tensor, value: Tensor) -> str:
    dtype = str(query.dtype).removeprefix("torch.")
    width = query.shape[-1]
    if not query.is_cuda or query.dtype not in HALF:
        return f"it needs float16 or bfloat16 on CUDA, not {dtype} on {query.device.type}"
    # limits of FlashAttention-2, which both kernels are
    if width != value.shape[-1] or width > 256 or width % 8:
        return f"it needs heads of at most 256 channels, a multiple of 8, not {width}"
    return ""


def backends() -> dict[str, str]:
    """Return, for each backend's name, "" if it works on this machine, or else why not."""
    return {name: unavailable_reason(name) for name in BACKENDS}


@functools.cache
def unavailable_reason(backend: str) -> str:
    """Return what a backend lacks on this machine, or "" if nothing."""
    if backend not in BACKENDS:
        hint = nearest(backend, ["auto", *BACKENDS])
        raise UserError(f"the attention backend {backend!r} is unknown. {hint}")
    if backend in ("flash", "varlen"):
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        # FlashAttention-2 has no kernels for older GPUs.
        if torch.version.cuda and torch.cuda.get_device_capability() < (8, 0):
            return "the GPU is older than Ampere"
    try:
        return _missing_import(backend)
    except ImportError as error:  # also if a package was built for another version of torch
        return str(error)


def _missing_import(backend: str) -> str:
    """Import what a backend needs.

    Returns:
        What torch lacks for it, or "".

    Raises:
        ImportError: a package is not installed.
    """
    if backend == "flash":
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    if backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        # The first versions of varlen_attn lack these arguments.
        needed = {"window_size", "enable_gqa", "scale"}
        if not needed <= inspect.signature(varlen_attn).parameters.keys():
            return f"torch {torch.__version__} has it without windows or grouped heads"
    return ""


# --- the backends ---


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, options: AttentionOptions
) -> Tensor:
    lengths = row_lengths(cu_seqlens)
    if query.is_cuda and query.shape[1] != key.shape[1]:
        # in float32 only torch's unfused kernel supports grouped heads
        groups = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(groups, 1)
        value = value.repeat_interleave(groups, 1)
    if query.device.type == "cpu" and query.dtype in HALF:
        return _grouped(query, key, value, cu_seqlens, options)
    queries = query.split(lengths, 2)
    keys = key.split(lengths, 2)
    values = value.split(lengths, 2)
    parts = zip(queries, keys, values, strict=True)
    outputs = [_one_utterance(q, k, v, options) for q, k, v in parts]
    return torch.cat(outputs, 1)


class UtteranceGroup(NamedTuple):
    """Utterances of a row whose attention is computed together.

    Attributes:
        tokens: positions of their tokens in the row (N, S). Padding on the right has that of the
            last token.
        lengths: number of tokens of each (N,). Columns beyond the largest are for keys only.
    """

    tokens: Tensor
    lengths: Tensor

    def take(self, row: Tensor, columns: int) -> Tensor:
        """Return the first columns of the utterances (N, heads, columns, d).

        Args:
            row: (1, heads, T, d).
            columns: how many.
        """
        tokens = self.tokens[:, :columns]
        part = row[0].transpose(0, 1).index_select(0, tokens.flatten())
        return part.unflatten(0, tokens.shape).transpose(1, 2)

    def bias(self, queries: int, like: Tensor, options: AttentionOptions) -> Tensor:
        """Return a bias of the scores that hides padded keys (N, 1, 1, S), or causal (Q, S)."""
        keys = self.tokens.shape[1]
        if options.causal:
            return causal_bias(keys, options.window, like)[:queries]
        is_padding = torch.arange(keys) >= self.lengths[:, None]
        bias = torch.zeros(is_padding.shape, dtype=like.dtype)
        return bias.masked_fill(is_padding, torch.finfo(like.dtype).min)[:, None, None]


def _grouped(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, options: AttentionOptions
) -> Tensor:
    """Compute the attention of utterances of similar length together."""
    heads = query.shape[1]
    groups, places = _cached(
        cu_seqlens, heads, lambda: _make_groups(row_lengths(cu_seqlens), heads)
    )
    outputs: list[Tensor] = []
    for group in groups:
        length = int(group.lengths.max())
        keys = group.tokens.shape[1]
        q = group.take(query, length)
        if len(group.lengths) == 1:
            output = _one_utterance(q, group.take(key, length), group.take(value, length), options)
        else:
            output = eager_attention(
                q,
                group.take(key, keys),
                group.take(value, keys),
                group.bias(length, query, options),
                options.scale,
                options.dropout,
                options.softcap,
            )
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs).index_select(0, places)[None]


def _make_groups(lengths: Sequence[int], heads: int) -> tuple[list[UtteranceGroup], Tensor]:
    """Divide the utterances of a row into groups of similar length.

    Returns:
        The groups, and the place of each token of the row among the tokens of all groups.
    """
    members: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        scores = heads * lengths[i] ** 2
        if (
            not members
            or lengths[i] > MAX_LENGTH_RATIO * lengths[members[-1][0]]
            or (len(members[-1]) + 1) * scores > MAX_GROUPED_SCORES
        ):
            members.append([])
        members[-1].append(i)
    all_lengths = torch.tensor(lengths)
    starts = all_lengths.cumsum(0) - all_lengths
    groups: list[UtteranceGroup] = []
    places = torch.empty(int(all_lengths.sum()), dtype=torch.long)
    begin = 0
    for member in members:
        own = all_lengths[member]
        longest = int(own.max())
        columns = torch.arange(math.ceil(longest / VECTOR) * VECTOR)
        tokens = starts[member, None] + columns.minimum(own[:, None] - 1)
        is_token = columns[:longest] < own[:, None]
        places[tokens[:, :longest][is_token]] = begin + is_token.flatten().nonzero()[:, 0]
        begin += is_token.numel()
        groups.append(UtteranceGroup(tokens, own))
    return groups, places


def _one_utterance(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
    """Map query (1, heads, L, d), key and value (1, kv heads, L, d) to (1, L, heads, d)."""
    heads, length = query.shape[1:3]
    if query.is_meta:
        return _MetaAttention.apply(query, key, value).transpose(1, 2)
    window = options.window
    if window is not None and window >= length:
        window = None
    if options.softcap is not None or _is_faster_unfused(query, key):
        bias = causal_bias(length, window, query) if options.causal else None
        return eager_attention(
            query, key, value, bias, options.scale, options.dropout, options.softcap
        )
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if window is None else causal_bias(length, window, query),
        is_causal=options.causal and window is None,
        dropout_p=options.dropout,
        scale=options.scale,
        enable_gqa=heads != key.shape[1],
    )
    return output.transpose(1, 2)


def _is_faster_unfused(query: Tensor, key: Tensor) -> bool:
    """Return whether `eager_attention` takes less time than the fused kernel.

    Args:
        query: (N, heads, Q, d).
        key: (N, kv heads, S, d).
    """
    if query.device.type != "cpu" or query.dtype not in HALF:
        return False
    return query.shape[:3].numel() * key.shape[2] <= MAX_UNFUSED_SCORES


class _MetaAttention(torch.autograd.Function):
    """Attention on the meta device: the shapes, and what a fused kernel saves for backward.

    torch's own implementation chooses a kernel that saves all scores.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        output = query.new_empty(*query.shape[:3], value.shape[3])
        logsumexp = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        return output


def causal_bias(length: int, window: int | None, like: Tensor) -> Tensor:
    """Return a bias of the scores: 0 where a query attends to a key, else the lowest number.

    Args:
        length: number of queries and of keys.
        window: a query attends to itself and to the window - 1 keys before it; None for all.
        like: a tensor of the dtype and device of the result.

    Returns:
        (length, length), one row per query.
    """
    # The lowest number, as in transformers: with -inf a row without any key would become NaN.
    lowest = torch.full(
        (length, length),
        torch.finfo(like.dtype).min,
        dtype=like.dtype,
        device=like.device,
    )
    if window is None:
        return lowest.triu(1)
    # The triangles do not overlap, so the sum does not overflow to -inf.
    return lowest.triu(1) + lowest.tril(-window)


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Compute attention without a fused kernel, by transformers' eager formula.

    The products are in the input's dtype and the softmax is in float32, which torch does inside for
    float16 and bfloat16.

    Args:
        query: (B, heads, Q, d).
        key: (B, kv heads, S, d).
        value: (B, kv heads, S, d).
        bias: added to the scores; (B, 1, Q, S) or (Q, S).
        scale: factor of the scores.
        dropout: dropout of the attention weights.
        softcap: scores become softcap * tanh(scores / softcap).

    Returns:
        (B, Q, heads, d).
    """
    groups = query.shape[1] // key.shape[1]
    # The queries of a group are rows of one product with their key, so no key is copied.
    rows = (query * scale).unflatten(1, (-1, groups)).flatten(2, 3)
    scores = rows @ key.transpose(-1, -2)
    scores = scores.unflatten(2, (groups, -1))  # (B, kv heads, groups, Q, S)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if bias is not None:
        scores = scores + (bias if bias.dim() == 2 else bias.unsqueeze(2))
    weights = scores.softmax(-1)
    if dropout:
        weights = F.dropout(weights, dropout)
    output = weights.flatten(2, 3) @ value
    return output.unflatten(2, (groups, -1)).flatten(1, 2).transpose(1, 2)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, options: AttentionOptions
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    cu_seqlens = _cached(cu_seqlens, "int32", lambda: cu_seqlens.int())
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, d)
    output = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        options.longest,
        options.longest,
        dropout_p=options.dropout,
        softmax_scale=options.scale,
        causal=options.causal,
        # keys to the left and to the right of the query; -1 admits all of them
        window_size=(-1, -1) if options.window is None else (options.window - 1, 0),
        softcap=options.softcap or 0.0,
    )
    return output[None]


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, options: AttentionOptions
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cu_seqlens = _cached(cu_seqlens, "int32", lambda: cu_seqlens.int())
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, d)
    # keys to the left of the query; -1 admits all of them
    before = -1 if options.window is None else options.window - 1
    output = varlen_attn(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        options.longest,
        options.longest,
        scale=options.scale,
        window_size=(before, 0 if options.causal else -1),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output[None]


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, AttentionOptions], Tensor]] = {
    "sdpa": _sdpa,
    "flash": _flash,
    "varlen": _varlen,
}


# --- registration with transformers ---


def register_packed_attention() -> str:
    """Register the attention with transformers, and return its name for `attn_implementation`."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, _padding_mask)
    return PACKED


@torch.compiler.disable  # it reads the lengths of utterances, and calls custom kernels
def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of an LLM's layer, as transformers calls it.

    With cu_seq_lens_q it is `varlen_attention`. Its backend is `asrllm_attention` in the LLM's
    configuration, or "auto" if that is not set. Without cu_seq_lens_q (decoding, query
    (N, heads, Q, d)) it is transformers' own attention with the given mask.

    Raises:
        UserError: the LLM uses a kind of attention that packed rows do not support.
    """
    # attention sinks of gpt-oss, and relative position biases of T5
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise UserError(
                f"{type(module).__name__} uses {name!r} in its attention, which packed rows do not "
                "support. Choose another LLM."
            )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if cu_seq_lens_q is None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        options = AttentionOptions(causal, query.shape[2], scale, dropout, sliding_window, softcap)
        return _padded_attention(module, query, key, value, attention_mask, scaling, options), None
    config = getattr(module, "config", None)
    output = varlen_attention(
        query,
        key,
        value,
        cu_seq_lens_q,
        causal=causal,
        longest=max_length_q,
        scale=scaling,
        dropout=dropout,
        window=sliding_window,
        softcap=softcap,
        backend=getattr(config, "asrllm_attention", None) or "auto",
    )
    return output, None


def _padded_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    options: AttentionOptions,
) -> Tensor:
    """Compute the attention of a padded batch.

    Args:
        module: the LLM's layer.
        query: (N, heads, Q, d).
        key: (N, kv heads, S, d).
        value: (N, kv heads, S, d).
        mask: (N, 1, Q, S), bool or added to the scores. Without a mask a row is one utterance with
            all of its keys (Q == S), or a token that attends to everything (Q == 1).
        scaling: factor of the scores as transformers passes it.
        options: what to compute. `longest` is Q.

    Returns:
        (N, Q, heads, d).
    """
    length = options.longest
    window = options.window
    if window is not None and window >= length:
        window = None
    is_unfused = options.softcap is not None or _is_faster_unfused(query, key)
    needs_bias = window is not None or is_unfused
    if mask is None and options.causal and length > 1 and needs_bias:
        mask = causal_bias(length, window, query)[None, None]
    if not is_unfused:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            mask,
            dropout=options.dropout,
            scaling=scaling,
            is_causal=options.causal,
        )[0]
    if mask is not None and mask.dtype == torch.bool:
        # `eager_attention` adds the mask to the scores.
        zeros = torch.zeros_like(mask, dtype=query.dtype)
        mask = zeros.masked_fill(~mask, torch.finfo(query.dtype).min)
    return eager_attention(query, key, value, mask, options.scale, options.dropout, options.softcap)


def _padding_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return transformers' usual mask, or None for one row without a cache.

    That row may be packed, and packed_attention knows its windows.
    """
    if attention_mask is None and batch_size == 1 and q_length == kv_length:
        return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        **kwargs,
    )
