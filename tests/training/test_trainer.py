"""What a training step follows from."""

import pytest
import torch

from asrllm.training.trainer import seed_step


def drawn(*, seed=1, step=2, rank=0):
    seed_step(seed, step, rank)
    return torch.rand(4)


def test_a_step_draws_the_same_when_it_is_trained_again():
    assert torch.equal(drawn(), drawn())


@pytest.mark.parametrize("changed", [{"seed": 2}, {"step": 3}, {"rank": 1}])
def test_seeds_steps_and_ranks_have_dropout_of_their_own(changed):
    assert not torch.equal(drawn(), drawn(**changed))
