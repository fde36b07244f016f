import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from asrllm.models import loss
from asrllm.models.loss import HeadOptions, SupervisedLoss


def inputs(rows=7, width=12, vocabulary=50, bias=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype, requires_grad=True)
    head = nn.Linear(width, vocabulary, bias=bias, dtype=dtype)
    return hidden, head, torch.randint(0, vocabulary, (rows,), generator=generator)


def plain(hidden, head, targets, options):
    """Compute all logits, torch's cross-entropy and its gradients."""
    logits = head(hidden) * options.scale
    if options.softcap:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    value = F.cross_entropy(
        logits.float(), targets, reduction="sum", label_smoothing=options.label_smoothing
    )
    return value, (logits.argmax(-1) == targets).sum()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "options", [HeadOptions(), HeadOptions(0.3), HeadOptions(1.0, 2.0), HeadOptions(0.5, 3.0, 0.1)]
)
@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
def test_loss_and_gradients_match_the_unchunked_loss(monkeypatch, bias, options, rows_at_once):
    monkeypatch.setattr(loss, "MAX_CHUNK_LOGITS", rows_at_once * 50)
    hidden, head, targets = inputs(bias=bias)
    mine, correct, losses = SupervisedLoss()(hidden, head, targets, options)
    (3 * mine).backward()
    grads = [p.grad.clone() for p in (hidden, *head.parameters())]
    hidden.grad = None
    head.zero_grad()
    theirs, their_correct = plain(hidden, head, targets, options)
    (3 * theirs).backward()
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    assert correct == their_correct
    torch.testing.assert_close(losses.sum(), theirs, rtol=1e-6, atol=1e-6)
    assert not losses.requires_grad
    for grad, p in zip(grads, (hidden, *head.parameters()), strict=True):
        assert p.grad.abs().max() > 0.01
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-5)


def test_frozen_head_allocates_no_gradient():
    hidden, head, targets = inputs()
    head.requires_grad_(False)
    SupervisedLoss()(hidden, head, targets, HeadOptions())[0].backward()
    assert head.weight.grad is None
    assert hidden.grad.abs().max() > 0


def test_loss_without_gradients_and_without_targets(monkeypatch):
    hidden, head, targets = inputs()
    monkeypatch.setattr(torch, "zeros_like", None)  # no gradient of the head is allocated
    with torch.no_grad():
        value, *_ = SupervisedLoss()(hidden, head, targets, HeadOptions())
    monkeypatch.undo()
    torch.testing.assert_close(
        value, plain(hidden, head, targets, HeadOptions())[0], rtol=1e-6, atol=1e-6
    )
    nothing, correct, _ = SupervisedLoss()(hidden[:0], head, targets[:0], HeadOptions())
    nothing.backward()
    assert nothing == correct == 0
    assert hidden.grad.abs().max() == 0


def test_bfloat16_is_near_float32():
    hidden, head, targets = inputs(rows=200, width=64, dtype=torch.float32)
    whole, *_ = SupervisedLoss()(hidden, head, targets, HeadOptions())
    whole.backward()
    half = hidden.detach().bfloat16().requires_grad_()
    rough, *_ = SupervisedLoss()(half, head.bfloat16(), targets, HeadOptions())
    rough.backward()
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, whole, rtol=1e-3, atol=0)
    assert F.cosine_similarity(half.grad.float().flatten(), hidden.grad.flatten(), 0) > 0.999


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_is_larger_than_a_chunk_of_logits(monkeypatch):
    monkeypatch.setattr(loss, "MAX_CHUNK_LOGITS", 4 * 152_000)
    hidden, head, targets = inputs(rows=64, width=8, vocabulary=152_000, dtype=torch.float32)
    head.requires_grad_(False)
    with Largest() as largest:
        SupervisedLoss()(hidden, head, targets, HeadOptions())[0].backward()
    assert largest.elements == 8 * 152_000  # the head itself
    assert hidden.grad.abs().max() > 0
