import pickle

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from asrllm.errors import UserError
from asrllm.training.zero_files import read_zero_file, trusted_unpickling


class Reduced:
    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return getattr, self.arguments


def test_a_stage_is_read_as_every_python_pickles_it(tmp_path):
    """Python 3.11.0 to 3.11.3 write getattr(ZeroStageEnum, "weights")."""
    torch.save({"old": Reduced(ZeroStageEnum, "weights"), "new": ZeroStageEnum.weights}, tmp_path / "x.pt")
    with trusted_unpickling():
        assert torch.load(tmp_path / "x.pt") == {"old": ZeroStageEnum.weights, "new": ZeroStageEnum.weights}
    assert read_zero_file(tmp_path / "x.pt") == {"old": ZeroStageEnum.weights, "new": ZeroStageEnum.weights}


@pytest.mark.parametrize("arguments", [(LossScaler, "__init__"), (ZeroStageEnum, "__class__")])
def test_nothing_else_is_reached_that_way(tmp_path, arguments):
    torch.save({"x": Reduced(*arguments)}, tmp_path / "x.pt")
    with trusted_unpickling(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.pt")
    with pytest.raises(UserError, match="the checkpoint asks for"):
        read_zero_file(tmp_path / "x.pt")
