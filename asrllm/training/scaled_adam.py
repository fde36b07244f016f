"""ScaledAdam (Yao et al. 2023, "Zipformer"; by Povey, from icefall) on DeepSpeed's partitions.

Steps are proportional to a weight's root mean square (RMS), the scale of every weight is learned as
well, and gradients are clipped at a multiple of their median norm over the last steps. Quantities
of a whole weight are summed over its pieces on all ranks; the rest is elementwise. As in icefall,
each parameter group clips for itself.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import Tensor

from asrllm import distributed
from asrllm.errors import UserError
from asrllm.training.checkpoint.partitions import full_shape, parameter_names, partitions
from asrllm.training.checkpoint.zero_files import SHARED

# Steps at which the clipping threshold is first set. Norms change quickly at the start, so the
# threshold is twice as high there.
EARLY_STEPS = (10, 20, 40)
MAX_SCALE_STEP = 0.1  # largest relative change of a weight's scale in one update

Group = dict[str, Any]  # one group of torch.optim.Optimizer.param_groups
State = dict[str, Any]  # one vector's state, and in the group's first vector that of the group


class Piece(NamedTuple):
    """Part of a weight in one of this rank's vectors.

    Attributes:
        number: index of the weight in its group.
        begin: first element in the vector.
        end: element after the last one.
    """

    number: int
    begin: int
    end: int


class Layout(NamedTuple):
    """Layout of a parameter group.

    Attributes:
        numel: (weights,), number of elements of each weight.
        pieces: pieces in each of the group's vectors.
    """

    numel: Tensor
    pieces: list[list[Piece]]


class PieceState(NamedTuple):
    """A piece of a weight and its state, all (elements,).

    Attributes:
        number: index of the weight in its group.
        weight: float32 values.
        grad: gradient.
        delta: previous step, as momentum.
        exp_avg_sq: running average of the squared gradient.
    """

    number: int
    weight: Tensor
    grad: Tensor
    delta: Tensor
    exp_avg_sq: Tensor


class ScaledAdam(torch.optim.Optimizer):
    """ScaledAdam on partitions.

    `bind` sets which weights are in the vectors. Before that, a step only allocates its state and
    changes no weight: DeepSpeed does such a step when it starts.
    """

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
        """Create the optimizer. The names and defaults are icefall's.

        Args:
            params: parameters or parameter groups.
            lr: learning rate.
            betas: decay rates of the momentum and of the squared gradient.
            clipping_scale: multiple of the median norm at which gradients are clipped.
            clipping_update_period: steps over which the median is taken.
            scalar_lr_scale: factor on the learning rate of scalars and of scales.
            scalar_max: largest absolute value of a scalar.
            param_min_rms: smallest RMS of a weight that is not a scalar.
            param_max_rms: largest RMS of a weight that is not a scalar.
            size_update_period: steps between two updates of the weights' scales.
            eps: added to denominators.
        """
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
        self.layouts: dict[Tensor, Layout] = {}  # the first vector of a group: its layout
        self.device = torch.device("cpu")
        self.partitioned = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Do one step for every group. `closure` is not used."""
        # ZeRO passes one group at a time, with the others empty or absent
        for group in self.param_groups:
            for vector in group["params"]:
                state = self.state[vector]
                if "delta" not in state:
                    state["delta"] = torch.zeros_like(vector)
                    state["exp_avg_sq"] = torch.zeros_like(vector)
            if group["params"] and self.layouts:
                self._step_group(group, self.layouts[group["params"][0]])

    def _step_group(self, group: Group, layout: Layout) -> None:
        pieces = list(self._pieces(group, layout))
        is_scalar = layout.numel == 1
        state = self.state[group["params"][0]]
        if "shared_step" not in state:
            state.update(self._initial_state(group, layout, pieces))
        step = state["shared_step"]
        period = group["size_update_period"]
        rms = state["shared_rms"]
        grad_squares = self._sums(layout, [(piece, piece.grad, piece.grad) for piece in pieces])
        products = self._sums(layout, [(piece, piece.weight, piece.grad) for piece in pieces])
        scale = torch.where(is_scalar, group["scalar_lr_scale"], rms)
        # Like the steps, the clipped norm is relative to the sizes of the weights.
        clip = _clip(group, state, grad_squares * scale.square())
        state["shared_scale_grads"][step % period] = clip * products
        scale_steps = torch.zeros_like(rms)
        if step % period == period - 1:
            rms.copy_(self._rms(layout, pieces))
            scale_steps = _scale_steps(group, state).masked_fill(is_scalar, 0.0)
        min_rms = group["param_min_rms"]
        scale = torch.where(is_scalar, group["scalar_lr_scale"], rms.clamp(min=min_rms))
        lrs = scale * -group["lr"]
        _update_group(
            group, pieces, step, clip, lrs.tolist(), scale_steps.tolist(), is_scalar.tolist()
        )
        state["shared_step"] = step + 1

    def _pieces(self, group: Group, layout: Layout) -> Iterator[PieceState]:
        """Yield all pieces of weights in this rank's vectors of a group."""
        for vector, pieces in zip(group["params"], layout.pieces, strict=True):
            state = self.state[vector]
            grad = vector.grad
            if grad is None:
                grad = torch.zeros_like(vector)
            flat_grad = grad.contiguous().view(-1)
            for number, begin, end in pieces:
                yield PieceState(
                    number,
                    weight=vector.view(-1)[begin:end],
                    grad=flat_grad[begin:end],
                    delta=state["delta"].view(-1)[begin:end],
                    exp_avg_sq=state["exp_avg_sq"].view(-1)[begin:end],
                )

    def _initial_state(self, group: Group, layout: Layout, pieces: list[PieceState]) -> State:
        """Return the state of a group's whole weights.

        It is the same on all ranks and in the model's order, so that it fits any number of ranks.
        """
        rms = self._rms(layout, pieces)
        return {
            f"{SHARED}step": 0,
            f"{SHARED}rms": rms,
            f"{SHARED}scale_exp_avg_sq": torch.zeros_like(rms),
            f"{SHARED}scale_grads": rms.new_zeros(group["size_update_period"], len(rms)),
            f"{SHARED}norms": rms.new_zeros(group["clipping_update_period"]),
            f"{SHARED}threshold": rms.new_full((1,), torch.inf),
        }

    def _rms(self, layout: Layout, pieces: list[PieceState]) -> Tensor:
        """Return the RMS of each weight, (weights,)."""
        squares = self._sums(layout, [(piece, piece.weight, piece.weight) for piece in pieces])
        return (squares / layout.numel).sqrt()

    def _sums(self, layout: Layout, factors: Sequence[tuple[PieceState, Tensor, Tensor]]) -> Tensor:
        """Return the sum of elementwise products of each weight over all ranks.

        Args:
            layout: layout of the group.
            factors: (piece, one, other) with two (elements,) factors for every piece.

        Returns:
            (weights,) in float32, summed in float64.
        """
        device = layout.numel.device
        # In float64 the sum hardly depends on how the ranks divide a weight.
        total = torch.zeros(len(layout.numel), dtype=torch.float64, device=device)
        for piece, one, other in factors:
            total[piece.number] += (one * other).sum(dtype=torch.float64)
        if self.partitioned:
            total = distributed.sum_over_ranks(total.to(self.device))
        return total.to(device, torch.float32)


def _median(ordered: Tensor) -> Tensor:
    """Return the median of sorted norms: element 2 * (n // 4) of n, as in icefall."""
    return ordered[min(len(ordered) - 1, len(ordered) // 4 * 2)]


def _clip(group: Group, state: State, squares: Tensor) -> float:
    """Return the factor that clips the gradients at a multiple of their median norm.

    Args:
        group: the parameter group.
        state: state of the group.
        squares: (weights,), squared norm of each weight's gradient times its scale.
    """
    step = state["shared_step"]
    norms = state["shared_norms"]
    threshold = state["shared_threshold"]
    # As in icefall, the first step is not clipped.
    if step == 0:
        return 1.0
    norm = squares.sum().sqrt()
    period = len(norms)
    norms[step % period] = norm
    if step in EARLY_STEPS and step < period:
        # The norms of later steps are still 0, so the last ones are those of the steps so far.
        median = _median(norms.sort().values[-step:])
        threshold.fill_(group["clipping_scale"] * median * 2)
    elif step % period == 0:
        median = _median(norms.sort().values)
        threshold.fill_(group["clipping_scale"] * median)
    return min(1.0, (threshold / (norm + 1e-20)).item())


def _scale_steps(group: Group, state: State) -> Tensor:
    """Return the relative change of each weight's scale, (weights,).

    This is Adam on the scale, once in `size_update_period` steps.
    """
    grads = state["shared_scale_grads"]
    squares = state["shared_scale_exp_avg_sq"]
    rms = state["shared_rms"]
    period = len(grads)
    # One update follows `period` steps, so the decay is that of `period` steps.
    beta2 = group["betas"][1] ** period
    squares.mul_(beta2).add_(grads.square().mean(dim=0), alpha=1 - beta2)
    updates = (state["shared_step"] + 1) // period
    correction = (1 - beta2**updates) ** 0.5
    lr = -group["lr"] * group["scalar_lr_scale"] * correction
    change = lr * grads.sum(dim=0) / (squares.sqrt() + group["eps"])
    # as in icefall, which leaves the scale of such a small weight alone
    change = change.masked_fill(rms < group["param_min_rms"], 0.0)
    change = change.clamp(-MAX_SCALE_STEP, MAX_SCALE_STEP)
    return torch.minimum(change, (group["param_max_rms"] - rms) / rms)


def _update_group(
    group: Group,
    pieces: list[PieceState],
    step: int,
    clip: float,
    lrs: list[float],
    scale_steps: list[float],
    is_scalar: list[bool],
) -> None:
    """Do the elementwise part of a step.

    Args:
        group: the parameter group.
        pieces: pieces of weights.
        step: number of earlier steps.
        clip: factor on the gradients.
        lrs: signed learning rate of each weight.
        scale_steps: relative change of each weight's scale.
        is_scalar: whether each weight has one element.
    """
    beta1, beta2 = group["betas"]
    correction = 1 - beta2 ** (step + 1)
    for number, weight, grad, delta, squares in pieces:
        grad = grad * clip
        squares.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        # icefall leaves out the bias correction once it is below 1 %.
        corrected = squares / correction if correction < 0.99 else squares
        change = lrs[number] * grad / (corrected.sqrt() + group["eps"])
        if scale_steps[number]:
            change += weight * scale_steps[number]
        weight.add_(delta.mul_(beta1).add_(change, alpha=1 - beta1))
        if is_scalar[number]:
            weight.clamp_(-group["scalar_max"], group["scalar_max"])


def bind(optimizer: ScaledAdam, engine: deepspeed.DeepSpeedEngine) -> None:
    """Set which weights are in the optimizer's vectors on this rank.

    Raises:
        UserError: DeepSpeed has split a parameter group, which this optimizer steps as a whole.
    """
    groups = parameter_names(engine)
    if len(groups) != len(optimizer.param_groups):
        raise UserError(
            "trainer.optimizer.name=scaled_adam needs undivided parameter groups. "
            "Raise zero_optimization.sub_group_size in the DeepSpeed JSON."
        )
    numels = {}
    for name, parameter in engine.module.named_parameters():
        numels[name] = torch.Size(full_shape(parameter)).numel()
    optimizer.device = engine.device
    optimizer.partitioned = engine.zero_optimization_stage() > 0
    remaining = list(partitions(engine))
    for names in groups:
        # with ZeRO a group has one vector, without it one vector per weight
        count = 1 if optimizer.partitioned else len(names)
        vectors = remaining[:count]
        remaining = remaining[count:]
        index = {name: i for i, name in enumerate(names)}
        pieces = []
        for _, slices in vectors:
            of_rank = []
            for part in slices:
                end = part.offset + part.numel
                of_rank.append(Piece(index[part.name], part.offset, end))
            pieces.append(of_rank)
        first = vectors[0][0]
        numel = torch.tensor([numels[name] for name in names], device=first.device)
        optimizer.layouts[first] = Layout(numel, pieces)
