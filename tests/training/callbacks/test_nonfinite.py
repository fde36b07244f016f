"""Skipping steps that are not finite, and stopping after too many in a row."""

from types import SimpleNamespace

import pytest
import torch

from asrllm.errors import UserError
from asrllm.training.callbacks.nonfinite import NonFiniteGuard, skip_nonfinite
from asrllm.training.trainer import StepSums


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_plain_optimizer_skips_gradients_that_are_not_finite(bad):
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


def test_zero_optimizers_also_check_in_bf16():
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


def assert_reported(capsys, step: int, what: str, keys: str) -> None:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"step {step} ")
    assert what in line
    assert line.endswith(f"rank 0: {keys}")


def test_too_many_skipped_steps_in_a_row_raise_an_error_with_the_keys(capsys):
    guard = NonFiniteGuard(max_steps=2)
    run_guard(guard, 1, skipped=True, bad=["a", "b"])
    assert_reported(capsys, 1, "loss", "a b")
    run_guard(guard, 2, skipped=False, bad=[])
    run_guard(guard, 3, skipped=True, bad=[])
    assert_reported(capsys, 3, "gradient", "a b c")
    with pytest.raises(
        UserError, match=r"loss .* 2 steps .*trainer\.max_nonfinite_steps=2.* step 4, .* c\."
    ):
        run_guard(guard, 4, skipped=True, bad=["c"])


def test_steps_that_fp16_loss_scaling_skips_do_not_count(capsys):
    guard = NonFiniteGuard(max_steps=2)
    for step in range(5):
        run_guard(guard, step, skipped=True, bad=[], precision="fp16")
    assert capsys.readouterr().err == ""
    run_guard(guard, 5, skipped=True, bad=["a"], precision="fp16")
    with pytest.raises(UserError):
        run_guard(guard, 6, skipped=True, bad=["a"], precision="fp16")
