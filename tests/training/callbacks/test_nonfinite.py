"""A plain optimizer that skips; the guard's counting."""

from types import SimpleNamespace

import pytest
import torch

from asrllm.errors import UserError
from asrllm.training.callbacks.nonfinite import NonFiniteGuard, skip_nonfinite
from asrllm.training.trainer import StepSums


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_plain_optimizer_skips_what_is_not_finite(bad):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    skip_nonfinite(SimpleNamespace(optimizer=optimizer))
    weight.grad = torch.tensor([1.0, bad, 0.0])
    optimizer.step()
    assert optimizer.overflow
    assert torch.equal(weight.detach(), torch.ones(3))
    assert not optimizer.state
    weight.grad = torch.ones(3)
    optimizer.step()
    assert not optimizer.overflow
    assert (weight < 1).all()
    assert optimizer.state[weight]["step"] == 1


def test_zero_optimizers_are_made_to_check_in_bf16_too():
    optimizer = SimpleNamespace(overflow=False, check_grad_overflow=False)
    skip_nonfinite(SimpleNamespace(optimizer=optimizer))
    assert vars(optimizer) == {"overflow": False, "check_grad_overflow": True}


def run_guard(
    guard: NonFiniteGuard, step: int, *, skipped: bool, bad: list[str], precision: str = "bf16"
) -> None:
    trainer = SimpleNamespace(
        step=step, nonfinite_keys=bad, config=SimpleNamespace(precision=precision)
    )
    loaded = SimpleNamespace(
        micro_batches=[SimpleNamespace(keys=["a", "b"]), SimpleNamespace(keys=["c"])]
    )
    guard.after_step(trainer, loaded, StepSums(skipped=float(skipped)))


def test_so_many_in_a_row_are_an_error_that_names_the_utterances(capsys):
    guard = NonFiniteGuard(most=2)
    run_guard(guard, 1, skipped=True, bad=["a", "b"])
    assert capsys.readouterr().err == "step 1 is skipped, its loss is not finite; rank 0: a b\n"
    run_guard(guard, 2, skipped=False, bad=[])
    run_guard(guard, 3, skipped=True, bad=[])
    assert (
        capsys.readouterr().err == "step 3 is skipped, its gradient is not finite; rank 0: a b c\n"
    )
    with pytest.raises(
        UserError,
        match=r"the loss was not finite in 2 steps in a row \(trainer.max_nonfinite_steps\), the last, 4, with c:",
    ):
        run_guard(guard, 4, skipped=True, bad=["c"])


def test_fp16_may_look_for_its_scale(capsys):
    guard = NonFiniteGuard(most=2)
    for step in range(5):
        run_guard(guard, step, skipped=True, bad=[], precision="fp16")
    assert capsys.readouterr().err == ""
    run_guard(guard, 5, skipped=True, bad=["a"], precision="fp16")
    with pytest.raises(UserError):
        run_guard(guard, 6, skipped=True, bad=["a"], precision="fp16")
