import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from asrllm.config import load_config
from asrllm.errors import UserError
from asrllm.models.build import describe_model
from asrllm.training.checkpoint.manifest import check_same_model
from asrllm.training.checkpoint.resume import resume_fingerprint
from asrllm.training.checkpoint.saver import CheckpointSaver, read_inherited, write_inherited
from asrllm.training.checkpoint.zero_files import read_zero_file, trusted_unpickling
from asrllm.training.run_config import TrainRun
from tests.checkpoints.made import write_checkpoint
from tests.models.asr_llm.test_modeling import make_config


class Reduced:
    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return getattr, self.arguments


def test_a_stage_is_read_as_every_python_pickles_it(tmp_path):
    """Python 3.11.0 to 3.11.3 write getattr(ZeroStageEnum, "weights")."""
    torch.save(
        {"old": Reduced(ZeroStageEnum, "weights"), "new": ZeroStageEnum.weights}, tmp_path / "x.pt"
    )
    with trusted_unpickling():
        assert torch.load(tmp_path / "x.pt") == {
            "old": ZeroStageEnum.weights,
            "new": ZeroStageEnum.weights,
        }
    assert read_zero_file(tmp_path / "x.pt") == {
        "old": ZeroStageEnum.weights,
        "new": ZeroStageEnum.weights,
    }


@pytest.mark.parametrize("arguments", [(LossScaler, "__init__"), (ZeroStageEnum, "__class__")])
def test_nothing_else_is_reached_that_way(tmp_path, arguments):
    torch.save({"x": Reduced(*arguments)}, tmp_path / "x.pt")
    with trusted_unpickling(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.pt")
    with pytest.raises(UserError, match="the checkpoint asks for"):
        read_zero_file(tmp_path / "x.pt")


def test_a_run_goes_on_wherever_its_base_models_are_named_from(world, tmp_path, monkeypatch):
    """Relative to another directory, as earlier versions kept it, or by a link: the weights are what counts."""
    config = load_config("train", world.overrides(tmp_path), TrainRun)
    data = SimpleNamespace(prompts=[], corpora=[])
    (tmp_path / "linked").symlink_to(world.llm)
    monkeypatch.chdir(world.root)
    descriptions = [
        describe_model(
            make_config(world, llm={"pretrained_model": str(path)}),
            pad_to_30s=False,
            prompts=("Transcribe.",),
        )
        for path in ("llm", world.llm, tmp_path / "linked")
    ]
    settings = [resume_fingerprint(config, processor, data) for processor in descriptions]
    checkpoint = write_checkpoint(tmp_path / "checkpoint-1", {"projector.a": torch.ones(1)})
    manifest = json.loads((checkpoint / "asrllm.json").read_text())
    bases = descriptions[0].config.base_models
    bases = {
        part: base | {"path": base["path"].removeprefix(f"{world.root}/")}
        for part, base in bases.items()
    }
    (checkpoint / "asrllm.json").write_text(
        json.dumps(manifest | {"base_models": bases, "settings": settings[0]})
    )
    for processor, now in zip(descriptions, settings, strict=True):
        assert (
            check_same_model(checkpoint, processor.config, json.loads(json.dumps(now)))[
                "base_models"
            ]
            == bases
        )


def test_inherited_weights_are_those_that_the_checkpoint_was_written_with(tmp_path):
    torch.save({"projector.a": torch.ones(2)}, tmp_path / "inherited_weights.pt")
    saver, checkpoint = (
        CheckpointSaver(tmp_path, background=False, keep=0),
        tmp_path / "checkpoint-1",
    )
    (saver.staging / "checkpoint-1").mkdir(parents=True)
    saver._publish(["checkpoint-1"], {"inherited": ["projector.a"]})
    manifest = json.loads((checkpoint / "asrllm.json").read_text())
    going_on = SimpleNamespace(
        inherited=("projector.a",), named_parameters=lambda: [("projector.a", torch.zeros(2))]
    )
    write_inherited(going_on, tmp_path, checkpoint)
    assert read_inherited(checkpoint, manifest)["projector.a"].load().tolist() == [1, 1]
    torch.save({"projector.a": torch.zeros(2)}, tmp_path / "inherited_weights.pt")
    with pytest.raises(UserError, match="is not the file that checkpoint-1 was written with"):
        read_inherited(checkpoint, manifest)
    del manifest["inherited_file"]  # of an earlier version
    assert read_inherited(checkpoint, manifest)["projector.a"].load().tolist() == [0, 0]


def test_inherited_weights_on_a_full_disk_are_one_sentence(tmp_path, monkeypatch):
    model = SimpleNamespace(
        inherited=("projector.a",), named_parameters=lambda: [("projector.a", torch.zeros(2))]
    )

    def full(state, path):
        path.write_bytes(b"a part")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        UserError, match=r"inherited_weights\.pt' was cut short .* make room on its disk"
    ):
        write_inherited(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
