"""Language-model head and cross-entropy on supervised positions alone, chunk by chunk: no tensor of (all tokens x vocabulary) is built.

Each chunk's logits are turned into its loss and at once into the gradients with respect to the hidden states (and to the head, if that
is trained), so that they need not be kept or computed again for the backward pass (the way of Liger Kernel, Hsu et al., 2024).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from asrllm.errors import UserError

LOGITS = 1 << 26  # of a chunk, at most: 256 MB in float32


class HeadOptions(NamedTuple):
    """What stands between the head's product and the softmax: logits = cap(scale * hidden @ weight.T); and label smoothing."""

    scale: float = 1.0
    softcap: float | None = None
    label_smoothing: float = 0.0


class SupervisedLoss(nn.Module):
    """A module of its own, without parameters, so that ZeRO-3 gathers the head's weights for as long as they are used."""

    def forward(
        self, hidden: Tensor, head: nn.Linear, targets: Tensor, options: HeadOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden (S, width), targets (S,) -> (loss summed over S in nats, targets that are the most probable token), float32 scalars, and
        each target's loss (S,), without a gradient."""
        weight, bias = head.weight, head.bias
        if (
            not torch.is_grad_enabled()
        ):  # a function does not see that no gradient is wanted of a trained head
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        return _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, options)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: HeadOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants = ctx.needs_input_grad
        grads = [
            torch.empty_like(hidden) if wants[0] else None,
            *(_zeros(p) if wants[i] else None for i, p in ((1, weight), (2, bias))),
        ]
        loss, correct = (
            hidden.new_zeros((), dtype=torch.float32),
            hidden.new_zeros((), dtype=torch.float32),
        )
        losses = hidden.new_zeros(len(hidden), dtype=torch.float32)
        size = max(1, LOGITS // len(weight))
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logits = nn.functional.linear(hidden[rows], weight, bias).float()
            part, losses[rows], hits, grad = _chunk(
                logits, targets[rows], options, backward=any(wants)
            )
            loss, correct = loss + part, correct + hits
            if grad is not None:
                _accumulate(grads, grad.to(hidden.dtype), hidden[rows], weight, rows)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(correct, losses)
        return loss, correct, losses

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (
            *(None if grad is None else grad * outer[0] for grad in ctx.saved_tensors),
            None,
            None,
        )


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter)


def _accumulate(
    grads: list[Tensor | None], grad: Tensor, hidden: Tensor, weight: Tensor, rows: slice
) -> None:
    """grad (rows, vocabulary): the loss's with respect to the head's product."""
    of_hidden, of_weight, of_bias = grads
    if of_hidden is not None:
        torch.mm(grad, weight, out=of_hidden[rows])
    if of_weight is not None:
        of_weight.addmm_(grad.T, hidden)
    if of_bias is not None:
        of_bias += grad.sum(0)


def _chunk(
    logits: Tensor, targets: Tensor, options: HeadOptions, *, backward: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(loss, of each row, correct, gradient of the loss with respect to the given logits) of some rows; the logits' memory is used up."""
    scale, softcap, smoothing = options
    if scale != 1:
        logits *= scale
    if softcap:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    normaliser = logits.logsumexp(1)
    picked = logits.gather(1, targets[:, None]).squeeze(1)
    losses = normaliser - picked
    loss = losses.sum()
    if smoothing:  # the target distribution is (1 - smoothing) one-hot + smoothing uniform
        spread = normaliser - logits.mean(1)
        loss = (1 - smoothing) * loss + smoothing * spread.sum()
        losses = torch.lerp(losses, spread, smoothing)
    correct = (logits.argmax(1) == targets).sum().float()
    if not backward:
        return loss, losses, correct, None
    slope = 1 - (logits / softcap).square() if softcap else None
    grad = logits.sub_(normaliser[:, None]).exp_()
    if smoothing:
        grad -= smoothing / logits.shape[1]
    grad.scatter_add_(1, targets[:, None], grad.new_full((len(targets), 1), smoothing - 1))
    if slope is not None:
        grad *= slope
    return loss, losses, correct, grad.mul_(scale) if scale != 1 else grad


def head_of(llm: Any, label_smoothing: float = 0.0) -> tuple[nn.Linear, HeadOptions]:
    """The head of a transformers causal LLM and what its family does with the logits.

    Raises UserError for adapters on the head, and for a family whose scale of the logits is not known here.
    """
    head, config = llm.get_output_embeddings(), llm.config.get_text_config()
    if type(head) is not nn.Linear:
        raise UserError(
            "the adapters' target_modules name the LLM's head, which the loss takes as it is: leave it out of them"
        )
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
                f"the LLM is a {config.model_type!r} model with {name}={value}, which the loss does not know: take another LLM"
            )
    return head, HeadOptions(
        scale, getattr(config, "final_logit_softcapping", None), label_smoothing
    )
