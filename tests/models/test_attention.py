"""Attention backends against a dense mask in float64, and LLMs against transformers' attention."""

import copy
import itertools

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asrllm.errors import UserError
from asrllm.models import attention
from asrllm.models.attention import (
    backends,
    register_packed_attention,
    row_lengths,
    varlen_attention,
)

LENGTHS = [7, 1, 30, 12, 1]
CASES = [
    {"causal": True},
    {"causal": False},
    {"causal": True, "window": 5},
    {"causal": True, "window": 1},
    {"causal": True, "softcap": 2.0},
    {"causal": True, "softcap": 2.0, "window": 5, "scale": 0.3},
    {"causal": False, "softcap": 2.0, "scale": 0.5},
]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def row(lengths, heads=(4, 2), width=16, dtype=torch.float32, device="cpu", seed=0):
    """Return query, key and value (1, heads, T, width), a gradient of the output, and cu_seqlens.

    The tensors are transposed, as after a projection.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, sum(lengths), h, width) for h in (heads[0], heads[1], heads[1], heads[0])]
    *tensors, grad = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    return [x.transpose(1, 2).requires_grad_() for x in tensors], grad, cu_seqlens


def dense(query, key, value, cu_seqlens, *, causal, scale=None, window=None, softcap=None):
    """Compute the definition of attention, with a mask (T, T)."""
    total, groups = query.shape[2], query.shape[1] // key.shape[1]
    at = torch.arange(total, device=query.device)
    utterance = torch.searchsorted(cu_seqlens[1:].long(), at, right=True)
    mask = utterance[:, None] == utterance
    if causal:
        mask &= at[:, None] >= at
    if window is not None:
        mask &= at[:, None] - at < window
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def check(inputs, grad, cu_seqlens, backend, tolerance, **options):
    output = varlen_attention(*inputs, cu_seqlens, backend=backend, **options)
    grads = torch.autograd.grad(output, inputs, grad)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = dense(*exact, cu_seqlens, **options)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())
    assert output.dtype == inputs[0].dtype
    for mine, theirs in zip((output, *grads), (expected, *expected_grads), strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine.double(), theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("options", CASES, ids=str)
def test_outputs_and_gradients_match_a_dense_mask(options):
    check(*row(LENGTHS), "sdpa", 1e-5, **options)
    check(*row(LENGTHS, heads=(3, 3)), "sdpa", 1e-5, **options)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_bfloat16_on_the_cpu_with_and_without_the_fused_kernel(monkeypatch, options):
    check(*row(LENGTHS, dtype=torch.bfloat16), "sdpa", 4e-2, **options)
    monkeypatch.setattr(attention, "MAX_UNFUSED_SCORES", 0)
    check(*row(LENGTHS, dtype=torch.bfloat16), "sdpa", 4e-2, **options)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("backend", ["flash", "varlen", "sdpa"])
def test_outputs_and_gradients_on_a_gpu_in_bfloat16(backend, options):
    inputs, grad, cu_seqlens = row(
        [70, 1, 300, 129, 1], heads=(8, 2), width=64, dtype=torch.bfloat16, device="cuda"
    )
    given = attention.AttentionOptions(
        True, 300, 1.0, 0.0, options.get("window"), options.get("softcap")
    )
    if reason := attention.unsupported_reason(backend, inputs[0], inputs[2], given):
        pytest.skip(reason)
    check(inputs, grad, cu_seqlens, backend, 4e-2, **options)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("options", CASES, ids=str)
def test_float32_on_a_gpu_is_exact_by_default(options):
    check(*row(LENGTHS, device="cuda"), "auto", 1e-4, **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_utterances_do_not_attend_to_each_other(options, dtype):
    inputs, _, cu_seqlens = row(LENGTHS, dtype=dtype)
    others = [x.detach().clone() for x in inputs]
    for x in others:
        x[:, :, 8:38] += 3.0  # the third utterance
    with torch.no_grad():
        one, two = (
            varlen_attention(*x, cu_seqlens, backend="sdpa", **options) for x in (inputs, others)
        )
    assert torch.equal(one[:, :8], two[:, :8])
    assert torch.equal(one[:, 38:], two[:, 38:])
    assert not torch.equal(one[:, 8:38], two[:, 8:38])


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.elements = max(
            [
                self.elements,
                *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)),
            ]
        )
        return result


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_no_tensor_of_the_squared_row_length_is_built(options, dtype, monkeypatch):
    monkeypatch.setattr(attention, "MAX_GROUPED_SCORES", 100_000)
    lengths = [40] * 50
    inputs, grad, cu_seqlens = row(lengths, dtype=dtype)
    with Largest() as largest:
        torch.autograd.grad(
            varlen_attention(*inputs, cu_seqlens, backend="sdpa", **options), inputs, grad
        )
    assert inputs[0].numel() <= largest.elements < sum(lengths) ** 2 / 20


def test_dropout_keeps_the_mean():
    inputs, _, cu_seqlens = row([200])
    with torch.no_grad():
        value = torch.ones_like(inputs[2])
        for softcap in (None, 5.0):
            output = varlen_attention(
                *inputs[:2], value, cu_seqlens, causal=False, dropout=0.5, softcap=softcap
            )
            assert output.std() > 0.01
            torch.testing.assert_close(output.mean(), torch.tensor(1.0), atol=0.05, rtol=0)


def test_lengths_are_read_once_per_row(monkeypatch):
    inputs, _, cu_seqlens = row(LENGTHS)
    assert row_lengths(cu_seqlens) is row_lengths(cu_seqlens)
    kept = len(attention._derived)
    varlen_attention(*inputs, cu_seqlens, causal=True)
    assert len(attention._derived) == kept
    del cu_seqlens
    assert len(attention._derived) == kept - 1


def test_unavailable_backend_is_rejected():
    inputs, _, cu_seqlens = row(LENGTHS)
    for backend in ("flash", "varlen"):
        with pytest.raises(
            UserError,
            match=rf"'{backend}' .*CUDA",
        ):
            varlen_attention(*inputs, cu_seqlens, causal=True, backend=backend)
    with pytest.raises(UserError, match=r"'flahs' .*'flash'"):
        varlen_attention(*inputs, cu_seqlens, causal=True, backend="flahs")


def test_backends_reports_what_works_here():
    found = backends()
    assert list(found) == ["sdpa", "flash", "varlen"]
    assert found["sdpa"] == ""
    if not torch.cuda.is_available():
        assert found["flash"] == found["varlen"] == "there is no CUDA device"


# --- whole LLMs ---

SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
}
HEADS = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
KINDS = ["sliding_attention", "full_attention"]
LLMS = {
    "qwen2": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {
        "sliding_window": 4,
        "layer_types": KINDS,
        "attn_logit_softcapping": 1.0,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": {"sliding_window": 4, "layer_types": KINDS, "query_pre_attn_scalar": 8},
}


def llms(kind):
    """Return an LLM with packed attention, and one with eager attention and the same weights."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZE, **HEADS, **LLMS[kind])
    config.initializer_range = 0.5
    mine = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=register_packed_attention()
    ).eval()
    theirs = transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation="eager"
    ).eval()
    theirs.load_state_dict(mine.state_dict())
    assert (mine.config._attn_implementation, theirs.config._attn_implementation) == (
        "asrllm_packed",
        "eager",
    )
    return mine, theirs


@pytest.mark.parametrize("kind", LLMS)
def test_packed_row_matches_transformers_eager_attention_on_each_utterance(kind):
    mine, theirs = llms(kind)
    utterances = [torch.randint(1, 64, (1, n)) for n in (9, 1, 17, 3)]
    positions = torch.cat([torch.arange(x.shape[1]) for x in utterances])[None]
    cu_seqlens = torch.tensor([0, 9, 10, 27, 30])
    row = torch.cat(utterances, 1)
    outputs = mine(
        row, position_ids=positions, use_cache=False, cu_seq_lens_q=cu_seqlens, max_length_q=17
    ).logits
    expected = torch.cat([theirs(x, use_cache=False).logits for x in utterances], 1)
    torch.testing.assert_close(outputs, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.05
    weights = [[p for p in llm.parameters() if p.requires_grad] for llm in (mine, theirs)]
    grads = [
        torch.autograd.grad(x.square().mean(), w)
        for x, w in zip((outputs, expected), weights, strict=True)
    ]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", LLMS)
def test_padded_decoding_matches_transformers(kind):
    mine, theirs = llms(kind)
    ids = torch.randint(1, 64, (3, 11))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    mask[1, :2] = 0
    options = {
        "do_sample": False,
        "max_new_tokens": 8,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    for chosen, given in ((ids, mask), (ids[2:], mask[2:]), (ids[2:], None)):
        one, two = (
            torch.stack(llm.generate(chosen, attention_mask=given, **options).logits)
            for llm in (mine, theirs)
        )
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
        positions = None if given is None else (given.cumsum(1) - 1).clamp(min=0)
        one, two = (
            llm(chosen, attention_mask=given, position_ids=positions, use_cache=False).logits
            for llm in (mine, theirs)
        )
        true = torch.ones_like(chosen, dtype=torch.bool) if given is None else given.bool()
        torch.testing.assert_close(one[true], two[true], atol=1e-4, rtol=1e-4)


def test_llm_config_chooses_the_backend():
    mine, _ = llms("qwen2")
    mine.config.asrllm_attention = "flash"
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"'flash' .*CUDA"):
            mine(
                torch.ones(1, 4, dtype=torch.long),
                cu_seq_lens_q=torch.tensor([0, 4]),
                use_cache=False,
            )
