"""ScaledAdam (Yao et al. 2023, "Zipformer"; Povey's, of icefall) on DeepSpeed's partitions.

Steps are in proportion to a weight's root mean square, the scale of every weight is learned besides, and gradients are clipped at
a multiple of their median norm over the last steps. What concerns a whole weight is summed over the pieces of it on all ranks; the rest is
elementwise. As in icefall, each parameter group clips for itself.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import Tensor

from asrllm import distributed
from asrllm.errors import UserError
from asrllm.training.checkpoint.partitions import full_shape, parameter_names, partitions
from asrllm.training.checkpoint.zero_files import SHARED

EARLY = (10, 20, 40)  # steps at which the clipping threshold is set for the first times


class Piece(NamedTuple):
    """The elements of weight `number` of its group that lie in one of this rank's vectors."""

    number: int
    begin: int
    end: int


class Layout(NamedTuple):
    """Of a group: numel of each weight, and the pieces in each of its vectors."""

    numel: Tensor
    pieces: list[list[Piece]]


class Held(NamedTuple):
    """A piece of a weight with what belongs to it."""

    number: int
    weight: Tensor
    grad: Tensor
    delta: Tensor
    exp_avg_sq: Tensor


class ScaledAdam(torch.optim.Optimizer):
    """`bind` tells it what lies where; before, a step makes room for its state and changes nothing."""

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 0.03,
        betas: tuple[float, float] = (0.9, 0.98),
        clipping_scale: float = 2.0,
        clipping_update_period: int = 100,
        scalar_lr_scale: float = 0.1,
        scalar_max: float = 10.0,
        param_min_rms: float = 1e-5,
        param_max_rms: float = 3.0,
        size_update_period: int = 4,
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "clipping_scale": clipping_scale,
            "clipping_update_period": clipping_update_period,
            "scalar_lr_scale": scalar_lr_scale,
            "scalar_max": scalar_max,
            "param_min_rms": param_min_rms,
            "param_max_rms": param_max_rms,
            "size_update_period": size_update_period,
            "eps": eps,
        }
        super().__init__(params, defaults)
        self.layouts: dict[Tensor, Layout] = {}  # by the first vector of a group
        self.device, self.spread = torch.device("cpu"), False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:  # ZeRO shows one at a time, with the others empty or absent
            for vector in group["params"]:
                if "delta" not in self.state[vector]:
                    self.state[vector].update(
                        delta=torch.zeros_like(vector), exp_avg_sq=torch.zeros_like(vector)
                    )
            if group["params"] and self.layouts:
                self._step_group(group, self.layouts[group["params"][0]])

    def _step_group(self, group: dict[str, Any], layout: Layout) -> None:
        held = list(self._held(group, layout))
        scalar, first = layout.numel == 1, self.state[group["params"][0]]
        if "shared_step" not in first:
            first.update(self._first_state(group, layout, held))
        step, period, rms = first["shared_step"], group["size_update_period"], first["shared_rms"]
        grad_squares = self._sums(layout, [(h, h.grad, h.grad) for h in held])
        products = self._sums(layout, [(h, h.weight, h.grad) for h in held])
        clip = _clip(
            group, first, grad_squares * torch.where(scalar, group["scalar_lr_scale"], rms).square()
        )
        first["shared_scale_grads"][step % period] = clip * products
        resize = torch.zeros_like(rms)
        if step % period == period - 1:
            rms.copy_(self._rms(layout, held))
            resize = _resize(group, first).masked_fill(scalar, 0.0)
        pace = (
            torch.where(scalar, group["scalar_lr_scale"], rms.clamp(min=group["param_min_rms"]))
            * -group["lr"]
        )
        _move(group, held, step, clip, pace.tolist(), resize.tolist(), scalar.tolist())
        first["shared_step"] = step + 1

    def _held(self, group: dict[str, Any], layout: Layout) -> Iterator[Held]:
        for vector, pieces in zip(group["params"], layout.pieces, strict=True):
            state, grad = (
                self.state[vector],
                torch.zeros_like(vector) if vector.grad is None else vector.grad,
            )
            for number, begin, end in pieces:
                yield Held(
                    number,
                    *(
                        t.view(-1)[begin:end]
                        for t in (vector, grad.contiguous(), state["delta"], state["exp_avg_sq"])
                    ),
                )

    def _first_state(
        self, group: dict[str, Any], layout: Layout, held: list[Held]
    ) -> dict[str, Any]:
        """What is kept of each weight of a group, the same on all ranks, in the order of the model: it fits any number of ranks."""
        rms = self._rms(layout, held)
        return {
            f"{SHARED}step": 0,
            f"{SHARED}rms": rms,
            f"{SHARED}scale_exp_avg_sq": torch.zeros_like(rms),
            f"{SHARED}scale_grads": rms.new_zeros(group["size_update_period"], len(rms)),
            f"{SHARED}norms": rms.new_zeros(group["clipping_update_period"]),
            f"{SHARED}threshold": rms.new_full((1,), torch.inf),
        }

    def _rms(self, layout: Layout, held: list[Held]) -> Tensor:
        return (self._sums(layout, [(h, h.weight, h.weight) for h in held]) / layout.numel).sqrt()

    def _sums(self, layout: Layout, factors: list[tuple[Held, Tensor, Tensor]]) -> Tensor:
        """Of each weight's products, over all ranks."""
        total = torch.zeros(len(layout.numel), dtype=torch.float64, device=layout.numel.device)
        for held, one, other in factors:
            total[held.number] += (one * other).sum(dtype=torch.float64)
        return (distributed.sum_over_ranks(total.to(self.device)) if self.spread else total).to(
            layout.numel.device, torch.float32
        )


def _clip(group: dict[str, Any], state: dict[str, Any], squares: Tensor) -> float:
    """The factor on the gradients that holds their norm below a multiple of its median over the last steps."""
    step, norms, threshold = state["shared_step"], state["shared_norms"], state["shared_threshold"]
    if step == 0:
        return 1.0
    norm, period = squares.sum().sqrt(), len(norms)
    norms[step % period] = norm
    early = step in EARLY and step < period
    if step % period == 0 or early:
        ordered = norms.sort().values[-step:] if early else norms.sort().values
        median = ordered[min(len(ordered) - 1, len(ordered) // 4 * 2)]
        threshold.fill_(
            group["clipping_scale"] * median * (2 if early else 1)
        )  # norms change fast in the beginning
    return min(1.0, (threshold / (norm + 1e-20)).item())


def _resize(group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    """By which share each weight grows or shrinks as a whole: Adam on its scale, every `size_update_period` steps."""
    grads, squares, rms = (
        state["shared_scale_grads"],
        state["shared_scale_exp_avg_sq"],
        state["shared_rms"],
    )
    period = len(grads)
    beta2 = group["betas"][1] ** period
    squares.mul_(beta2).add_(grads.square().mean(dim=0), alpha=1 - beta2)
    correction = (1 - beta2 ** ((state["shared_step"] + 1) // period)) ** 0.5
    share = (
        -group["lr"]
        * group["scalar_lr_scale"]
        * correction
        * grads.sum(dim=0)
        / (squares.sqrt() + group["eps"])
    )
    share = share.masked_fill(rms < group["param_min_rms"], 0.0).clamp(-0.1, 0.1)
    return torch.minimum(share, (group["param_max_rms"] - rms) / rms)


def _move(
    group: dict[str, Any],
    held: list[Held],
    step: int,
    clip: float,
    pace: list[float],
    resize: list[float],
    scalar: list[bool],
) -> None:
    """The elementwise part. pace: learning rate of each weight; resize: its growth."""
    beta1, beta2 = group["betas"]
    correction = 1 - beta2 ** (step + 1)
    for number, weight, grad, delta, squares in held:
        grad = grad * clip
        squares.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        corrected = squares / correction if correction < 0.99 else squares
        update = pace[number] * grad / (corrected.sqrt() + group["eps"])
        if resize[number]:
            update += weight * resize[number]
        weight.add_(delta.mul_(beta1).add_(update, alpha=1 - beta1))
        if scalar[number]:
            weight.clamp_(-group["scalar_max"], group["scalar_max"])


def bind(optimizer: ScaledAdam, engine: deepspeed.DeepSpeedEngine) -> None:
    """Tell the optimizer which weights lie in its vectors, on this rank."""
    groups, numels = (
        parameter_names(engine),
        {name: torch.Size(full_shape(p)).numel() for name, p in engine.module.named_parameters()},
    )
    if len(groups) != len(optimizer.param_groups):
        raise UserError(
            "scaled_adam steps a parameter group as a whole: raise zero_optimization.sub_group_size in the DeepSpeed JSON"
        )
    optimizer.device, optimizer.spread = engine.device, engine.zero_optimization_stage() > 0
    held = list(partitions(engine))
    for names in groups:
        vectors, held = (
            (held[: len(names)], held[len(names) :])
            if not optimizer.spread
            else (held[:1], held[1:])
        )
        index = {name: i for i, name in enumerate(names)}
        pieces = [
            [Piece(index[s.name], s.offset, s.offset + s.numel) for s in segments]
            for _, segments in vectors
        ]
        first = vectors[0][0]
        optimizer.layouts[first] = Layout(
            torch.tensor([numels[name] for name in names], device=first.device), pieces
        )
