"""Language-model head and cross-entropy on supervised positions only, computed in chunks.

No tensor of (all tokens x vocabulary) is built. Each chunk's logits are turned into its loss and at
once into the gradients of the hidden states (and of the head, if it is trained). They are neither
stored nor recomputed for the backward pass, as in Liger Kernel (Hsu et al., 2024).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from transformers import PreTrainedConfig, PreTrainedModel

from asrllm.errors import UserError
from asrllm.models.cpu_linear import CpuLinear

MAX_CHUNK_LOGITS = 1 << 26  # maximum number of logits in a chunk: 256 MB in float32


class HeadOptions(NamedTuple):
    """What happens between the head's product and the loss.

    Attributes:
        scale: factor of the logits, scale * hidden @ weight.T.
        softcap: maximum size of the scaled logits, which become softcap * tanh(logits / softcap).
        label_smoothing: part of the target probability that is spread evenly over the vocabulary.
    """

    scale: float = 1.0
    softcap: float | None = None
    label_smoothing: float = 0.0


class SupervisedLoss(nn.Module):
    """Cross-entropy of the head's predictions.

    It is a module without parameters, so that ZeRO-3 gathers the head's weights for as long as they
    are used.
    """

    def forward(
        self, hidden: Tensor, head: nn.Linear, targets: Tensor, options: HeadOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the loss.

        Args:
            hidden: hidden states at the supervised positions (S, width).
            head: the LLM's head.
            targets: token ids (S,).
            options: what the LLM's family does with the logits.

        Returns:
            The summed loss in nats and the number of correct predictions, both float32 scalars, and
            each target's loss (S,), which has no gradient.
        """
        weight = head.weight
        bias = head.bias
        if not torch.is_grad_enabled():
            # an autograd function cannot see that a trained head needs no gradient
            weight = weight.detach()
            bias = None if bias is None else bias.detach()
        return _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, options)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: HeadOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grads = _Gradients(
            hidden=torch.empty_like(hidden) if needs_hidden else None,
            weight=torch.zeros_like(weight) if needs_weight else None,
            bias=torch.zeros_like(bias) if needs_bias else None,
        )
        loss = hidden.new_zeros((), dtype=torch.float32)
        correct = hidden.new_zeros((), dtype=torch.float32)
        losses = hidden.new_zeros(len(hidden), dtype=torch.float32)
        size = max(1, MAX_CHUNK_LOGITS // len(weight))
        backward = any(ctx.needs_input_grad)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logits = nn.functional.linear(hidden[rows], weight, bias).float()
            part, losses[rows], hits, grad = _chunk(logits, targets[rows], options, backward)
            loss = loss + part
            correct = correct + hits
            if grad is not None:
                # in the dtype in which autograd would pass the gradient through the head
                _accumulate(grads, grad.to(hidden.dtype), hidden[rows], weight, rows)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(correct, losses)
        return loss, correct, losses

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: FunctionCtx, *outer: Tensor
    ) -> tuple[Tensor | None, ...]:
        # The loss is the only output with a gradient.
        scaled = [None if grad is None else grad * outer[0] for grad in ctx.saved_tensors]
        return (*scaled, None, None)


class _Gradients(NamedTuple):
    """Gradients of the loss; None if not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def _accumulate(
    grads: _Gradients,
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    rows: slice,
) -> None:
    """Add a chunk to the gradients.

    Args:
        grads: gradients of all chunks; changed in place.
        grad: gradient of the head's product (rows, vocabulary).
        hidden: hidden states of the chunk (rows, width).
        weight: the head's weight (vocabulary, width).
        rows: where the chunk is.
    """
    if grads.hidden is not None:
        torch.mm(grad, weight, out=grads.hidden[rows])
    if grads.weight is not None:
        grads.weight.addmm_(grad.T, hidden)
    if grads.bias is not None:
        grads.bias.add_(grad.sum(0))


def _chunk(
    logits: Tensor, targets: Tensor, options: HeadOptions, backward: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute the loss of a chunk. The memory of the logits is reused.

    Args:
        logits: products of the head (rows, vocabulary), float32.
        targets: token ids (rows,).
        options: what happens to the logits.
        backward: whether to compute the gradient.

    Returns:
        The summed loss, each row's loss, the number of correct predictions, and the gradient of
        `logits` or None.
    """
    scale, softcap, smoothing = options
    if scale != 1:
        logits *= scale
    if softcap:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    normalizer = logits.logsumexp(1)
    picked = logits.gather(1, targets[:, None]).squeeze(1)
    losses = normalizer - picked
    loss = losses.sum()
    if smoothing:  # the target distribution is (1 - smoothing) one-hot + smoothing uniform
        uniform_losses = normalizer - logits.mean(1)
        loss = (1 - smoothing) * loss + smoothing * uniform_losses.sum()
        losses = torch.lerp(losses, uniform_losses, smoothing)
    correct = (logits.argmax(1) == targets).sum().float()
    if not backward:
        return loss, losses, correct, None
    slope: Tensor | None = None
    if softcap:
        # derivative of the soft cap, from the capped logits before they are overwritten
        slope = 1 - (logits / softcap).square()
    # The gradient is softmax - (1 - smoothing) * one-hot - smoothing / vocabulary.
    grad = logits.sub_(normalizer[:, None]).exp_()
    if smoothing:
        grad -= smoothing / logits.shape[1]
    at_target = grad.new_full((len(targets), 1), smoothing - 1)
    grad.scatter_add_(1, targets[:, None], at_target)
    if slope is not None:
        grad *= slope
    if scale != 1:
        grad = grad.mul_(scale)
    return loss, losses, correct, grad


def head_of(llm: PreTrainedModel, label_smoothing: float = 0.0) -> tuple[nn.Linear, HeadOptions]:
    """Return the head of a causal LLM, and what its family does with the logits.

    Args:
        llm: the transformers model.
        label_smoothing: label smoothing of the loss.

    Raises:
        UserError: the head has adapters, or the loss does not know how the family scales logits.
    """
    head = llm.get_output_embeddings()
    config = llm.config.get_text_config()
    if type(head) not in (nn.Linear, CpuLinear):
        raise UserError(
            "the adapters' target_modules include the LLM's head, which the loss does not support. "
            "Leave it out of target_modules."
        )
    softcap = getattr(config, "final_logit_softcapping", None)
    return head, HeadOptions(_logit_scale(config), softcap, label_smoothing)


def _logit_scale(config: PreTrainedConfig) -> float:
    scale = 1.0
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is None or value == 1:
            continue
        if config.model_type.startswith("cohere") and name == "logit_scale":
            scale *= value
        elif config.model_type.startswith("granite") and name == "logits_scaling":
            scale /= value
        else:
            raise UserError(
                f"{config.model_type!r} models have {name}={value}, which the loss does not "
                "support. Choose another LLM."
            )
    return scale
