"""Attention over a packed row: each utterance attends to itself alone, by the fastest kernel that is there.

sdpa    one torch call for each utterance; everywhere, and the choice on the CPU
flash   flash_attn's kernel for rows of several lengths; CUDA, float16 or bfloat16
varlen  the same kernel inside torch; CUDA, float16 or bfloat16, no soft cap, no dropout
flex    torch's flex_attention with a block mask, compiled; CUDA, no dropout; on the CPU for tests alone
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from asrllm.errors import UserError, nearest

PACKED = "asrllm_packed"
HALF = (torch.float16, torch.bfloat16)
# scores of an utterance that are held whole, at most: for halves on the CPU that takes half of the fused kernel's time; they are rounded
# to halves, as in transformers' eager attention, which the fused kernel's are not
MOST_SCORES = 1 << 22
_facts = WeakTensorKeyDictionary()  # cu_seqlens -> what was worked out from it


class Options(NamedTuple):
    """What attention is to compute; see packed()."""

    causal: bool
    longest: int
    scale: float
    dropout: float
    window: int | None
    softcap: float | None


def packed(
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
    """query (1, heads, T, d), key and value (1, kv heads, T, d), cu_seqlens (N + 1,) -> (1, T, heads, d).

    longest: the longest utterance's length. window: a token attends to itself and to window - 1 tokens before (causal attention alone).
    softcap: scores become softcap * tanh(scores / softcap). cu_seqlens is never to be changed in place: what follows from it is kept.
    Raises UserError where the backend cannot run here.
    """
    assert window is None or causal
    longest = max(row_lengths(cu_seqlens)) if longest is None else longest
    window = None if window is None or window >= longest else window
    options = Options(
        causal,
        longest,
        query.shape[-1] ** -0.5 if scale is None else scale,
        dropout,
        window,
        softcap,
    )
    if backend == "auto":
        backend = choose(query, value, options)
    elif reason := why_not(backend, query, value, options):
        raise UserError(
            f"the attention backend {backend!r} cannot run here ({reason}): set it to 'auto' or 'sdpa'"
        )
    return BACKENDS[backend](query, key, value, cu_seqlens, options)


def row_lengths(cu_seqlens: Tensor) -> list[int]:
    """Read once for a row and not in every layer: on a GPU each reading waits for it."""
    return _once(cu_seqlens, "lengths", lambda: cu_seqlens.diff().tolist())


def _once(cu_seqlens: Tensor, what: Any, make: Callable[[], Any]) -> Any:
    facts = _facts.setdefault(cu_seqlens, {})
    if what not in facts:
        facts[what] = make()
    return facts[what]


# --- the choice ---


def choose(query: Tensor, value: Tensor, options: Options) -> str:
    if not query.is_cuda:
        return "sdpa"
    # flex is no choice for float32: its kernel may round to TF32, and per-utterance calls are exact
    names = ("flash", "varlen", "flex") if query.dtype in HALF else ()
    return next((name for name in names if not why_not(name, query, value, options)), "sdpa")


def why_not(backend: str, query: Tensor, value: Tensor, options: Options) -> str:
    """Why the backend cannot compute this; "" where it can."""
    if reason := missing(backend):
        return reason
    if backend in ("flash", "varlen"):
        if not query.is_cuda or query.dtype not in HALF:
            return f"it takes float16 or bfloat16 on CUDA, not {str(query.dtype).removeprefix('torch.')} on {query.device.type}"
        if query.shape[-1] != value.shape[-1] or query.shape[-1] > 256 or query.shape[-1] % 8:
            return f"it takes heads of at most 256 channels, a multiple of 8, not {query.shape[-1]}"
    if (
        backend == "flex"
        and not query.is_cuda
        and torch.is_grad_enabled()
        and (query.requires_grad or value.requires_grad)
    ):
        return "it has no backward pass on the CPU"
    if backend == "flex" and query.is_cuda and query.shape[-1] < 16:
        return f"it takes heads of 16 channels or more, not {query.shape[-1]}"
    if backend == "varlen" and options.softcap is not None:
        return "it has no soft cap of attention scores"
    if backend in ("varlen", "flex") and options.dropout:
        return "it has no dropout of attention"
    return ""


def backends() -> dict[str, str]:
    """Each backend's name -> "" if it works here, else why not."""
    return {name: missing(name) for name in BACKENDS}


@functools.cache
def missing(backend: str) -> str:
    """What the backend lacks on this machine, whatever it is to compute; "" where nothing."""
    if backend not in BACKENDS:
        raise UserError(
            f"the attention backend {backend!r} is unknown: {nearest(backend, ['auto', *BACKENDS])}"
        )
    cuda = torch.cuda.is_available()
    if backend in ("flash", "varlen"):
        if not cuda:
            return "no CUDA device"
        if torch.version.cuda and torch.cuda.get_device_capability() < (8, 0):
            return "the GPU is older than Ampere"
    try:
        if backend == "flash":
            from flash_attn import flash_attn_varlen_func  # noqa: F401
        if backend == "varlen":
            from torch.nn.attention.varlen import varlen_attn

            if (
                not {"window_size", "enable_gqa", "scale"}
                <= inspect.signature(varlen_attn).parameters.keys()
            ):
                return f"torch {torch.__version__} has it without windows or grouped heads"
        if backend == "flex":
            from torch.nn.attention.flex_attention import flex_attention  # noqa: F401

            if cuda:
                import triton  # noqa: F401
    except ImportError as error:  # also of a package built for another torch
        return str(error)
    return ""


# --- the backends ---


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, options: Options
) -> Tensor:
    lengths = row_lengths(cu_seqlens)
    if (
        query.is_cuda and query.shape[1] != key.shape[1]
    ):  # in float32 only torch's unfused kernel knows grouped heads
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    parts = zip(
        query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True
    )
    return torch.cat([_one_utterance(q, k, v, options) for q, k, v in parts], 1)


def _one_utterance(query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
    """query (1, heads, L, d), key and value (1, kv heads, L, d) -> (1, L, heads, d)"""
    heads, length = query.shape[1:3]
    if query.is_meta:
        return _Shapes.apply(query, key, value).transpose(1, 2)
    window = options.window if options.window is not None and options.window < length else None
    small_half = (
        not query.is_cuda and query.dtype in HALF and heads * length * length <= MOST_SCORES
    )
    if options.softcap is not None or small_half:
        bias = causal_bias(length, window, query) if options.causal else None
        return explicit(query, key, value, bias, options.scale, options.dropout, options.softcap)
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


class _Shapes(torch.autograd.Function):
    """On the meta device: the shapes, and what a fused kernel keeps for its backward pass; torch's own takes one that keeps all scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:3], value.shape[3])
        ctx.save_for_backward(
            query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32)
        )
        return output


def causal_bias(length: int, window: int | None, like: Tensor) -> Tensor:
    """(length, length): 0 where a query (row) attends to a key, the lowest number elsewhere."""
    lowest = torch.full(
        (length, length), torch.finfo(like.dtype).min, dtype=like.dtype, device=like.device
    )
    return lowest.triu(1) if window is None else lowest.triu(1) + lowest.tril(-window)


def explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """query (B, heads, Q, d), key and value (B, kv heads, S, d), bias as (B, 1, Q, S) -> (B, Q, heads, d).

    Transformers' eager formula: products in the input's dtype, the softmax in float32 (which torch does inside for halves).
    """
    groups = query.shape[1] // key.shape[1]
    scores = (query * scale).unflatten(1, (-1, groups)) @ key.unsqueeze(2).transpose(
        -1, -2
    )  # (B, kv heads, groups, Q, S)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if bias is not None:
        scores = scores + (bias if bias.dim() == 2 else bias.unsqueeze(2))
    shares = scores.softmax(-1)
    shares = F.dropout(shares, dropout) if dropout else shares
    return (shares @ value.unsqueeze(2)).flatten(1, 2).transpose(1, 2)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, options: Options
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    cu_seqlens = _once(cu_seqlens, "int32", lambda: cu_seqlens.int())
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
        window_size=(-1, -1) if options.window is None else (options.window - 1, 0),
        softcap=options.softcap or 0.0,
    )
    return output[None]


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, options: Options
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cu_seqlens = _once(cu_seqlens, "int32", lambda: cu_seqlens.int())
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, d)
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


def _flex(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, options: Options
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    attend = _compiled_flex()
    if (
        not query.is_cuda
    ):  # for tests: not compiled, and it refuses parameters even where no gradient is asked for
        attend, query, key, value = flex_attention, query.detach(), key.detach(), value.detach()
    kind = ("flex", options.causal, options.window)
    output = attend(
        query,
        key,
        value,
        score_mod=None if options.softcap is None else _capped(options.softcap),
        block_mask=_once(cu_seqlens, kind, lambda: _block_mask(cu_seqlens, query, options)),
        scale=options.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@functools.cache  # one function for each value: another would be compiled anew
def _capped(softcap: float) -> Callable[..., Tensor]:
    return lambda score, b, h, q, k: softcap * torch.tanh(score / softcap)


def _block_mask(cu_seqlens: Tensor, query: Tensor, options: Options) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    total, causal, window = query.shape[2], options.causal, options.window
    numbers = torch.arange(len(cu_seqlens) - 1, device=query.device)
    utterance = numbers.repeat_interleave(cu_seqlens.diff().to(query.device), output_size=total)

    def attends(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = utterance[q] == utterance[k]
        if causal:
            allowed = allowed & (k <= q)
        return allowed if window is None else allowed & (q - k < window)

    # compiled, it never holds the (T, T) mask from which the blocks are found
    return create_block_mask(
        attends, None, None, total, total, device=query.device, _compile=query.is_cuda
    )


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Options], Tensor]] = {
    "sdpa": _sdpa,
    "flash": _flash,
    "varlen": _varlen,
    "flex": _flex,
}


# --- transformers' side ---


def register_packed_attention() -> str:
    """Make the attention known to transformers; its name is what `attn_implementation` takes."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, _mask_of_padded)
    return PACKED


@torch.compiler.disable  # it reads how long utterances are, and calls kernels of its own
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
    """packed() as transformers calls it; the backend is `asrllm_attention` of the LLM's config, "auto" where that has none.

    Without cu_seq_lens_q (decoding, query (N, heads, Q, d)) it is transformers' own attention with the mask given.
    """
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise UserError(
                f"{type(module).__name__} gives {name!r} to its attention, which packed rows cannot have: take another LLM"
            )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if cu_seq_lens_q is None:
        return _padded(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling,
            dropout,
            sliding_window,
            softcap,
            causal,
        ), None
    output = packed(
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
        backend=getattr(getattr(module, "config", None), "asrllm_attention", None) or "auto",
    )
    return output, None


def _padded(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
    causal: bool,
) -> Tensor:
    """query (N, heads, Q, d), key and value (N, kv heads, S, d), mask (N, 1, Q, S) bool or to be added -> (N, Q, heads, d)

    Without a mask the row is one utterance whose keys are all there, so that Q == S, or a token that attends to all (Q == 1).
    """
    length = query.shape[2]
    narrow = window is not None and window < length
    if mask is None and causal and length > 1 and (narrow or softcap is not None):
        mask = causal_bias(length, window if narrow else None, query)[None, None]
    if softcap is None:
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scale, is_causal=causal
        )[0]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(
            ~mask, torch.finfo(query.dtype).min
        )
    return explicit(
        query,
        key,
        value,
        mask,
        query.shape[-1] ** -0.5 if scale is None else scale,
        dropout,
        softcap,
    )


def _mask_of_padded(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """No mask for one row without a cache, which may be a packed one: packed_attention knows its windows. The usual one otherwise."""
    if attention_mask is None and batch_size == 1 and q_length == kv_length:
        return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        **kwargs,
    )
