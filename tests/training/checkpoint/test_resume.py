import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from asrllm.errors import UserError
from asrllm.models.build import build_processor
from asrllm.training.checkpoint.manifest import check_same_model, read_manifest
from asrllm.training.checkpoint.resume import resume_fingerprint
from asrllm.training.checkpoint.saver import CheckpointSaver, read_inherited, write_inherited
from asrllm.training.checkpoint.zero_files import load_file, restricted_unpickling
from asrllm.training.run_config import TrainRun
from tests.checkpoints.made import write_checkpoint
from tests.composing import load_config
from tests.models.asr_llm.test_modeling import make_config


class Reduced:
    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return getattr, self.arguments


def test_stage_is_read_from_the_pickles_of_every_python(tmp_path):
    """Python 3.11.0 to 3.11.3 pickle it as getattr(ZeroStageEnum, "weights")."""
    path = tmp_path / "x.pt"
    torch.save({"old": Reduced(ZeroStageEnum, "weights"), "new": ZeroStageEnum.weights}, path)
    expected = {"old": ZeroStageEnum.weights, "new": ZeroStageEnum.weights}
    with restricted_unpickling():
        assert torch.load(path) == expected
    assert load_file(path) == expected


@pytest.mark.parametrize("arguments", [(LossScaler, "__init__"), (ZeroStageEnum, "__class__")])
def test_other_uses_of_getattr_in_a_pickle_are_rejected(tmp_path, arguments):
    torch.save({"x": Reduced(*arguments)}, tmp_path / "x.pt")
    with restricted_unpickling(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.pt")
    with pytest.raises(UserError, match=repr(arguments[1])):
        load_file(tmp_path / "x.pt")


def test_run_resumes_with_other_paths_of_the_same_base_models(world, tmp_path, monkeypatch):
    """Only the weights count: the path may be relative, or a link."""
    config = load_config("train", world.overrides(tmp_path), TrainRun)
    data = SimpleNamespace(prompts=[], corpora=[])
    (tmp_path / "linked").symlink_to(world.llm)
    monkeypatch.chdir(world.root)
    descriptions = []
    for path in ("llm", world.llm, tmp_path / "linked"):
        model = make_config(world, llm={"pretrained_model": str(path)})
        descriptions.append(build_processor(model, pad_to_30s=False, prompts=("Transcribe.",)))
    settings = [resume_fingerprint(config, processor, data) for processor in descriptions]
    checkpoint = write_checkpoint(tmp_path / "checkpoint-1", {"projector.a": torch.ones(1)})
    manifest = json.loads((checkpoint / "asrllm.json").read_text())
    bases = {}
    for part, base in descriptions[0].config.base_models.items():
        bases[part] = base | {"path": base["path"].removeprefix(f"{world.root}/")}
    (checkpoint / "asrllm.json").write_text(
        json.dumps(manifest | {"base_models": bases, "settings": settings[0]})
    )
    for processor, now in zip(descriptions, settings, strict=True):
        same = json.loads(json.dumps(now))
        check_same_model(checkpoint, read_manifest(checkpoint), processor.config, same)
        other = same | {"seed": 7}
        with pytest.raises(UserError, match=r"checkpoint-1'.*seed=.*7"):
            check_same_model(checkpoint, read_manifest(checkpoint), processor.config, other)


def test_inherited_weights_must_be_those_of_the_checkpoint(tmp_path):
    torch.save({"projector.a": torch.ones(2)}, tmp_path / "inherited_weights.pt")
    saver = CheckpointSaver(tmp_path, background=False, keep=0)
    checkpoint = tmp_path / "checkpoint-1"
    (saver.staging / "checkpoint-1").mkdir(parents=True)
    saver._publish(["checkpoint-1"], {"inherited": ["projector.a"]})
    manifest = json.loads((checkpoint / "asrllm.json").read_text())
    resumed = SimpleNamespace(
        inherited=("projector.a",), named_parameters=lambda: [("projector.a", torch.zeros(2))]
    )
    write_inherited(resumed, tmp_path, checkpoint)
    assert read_inherited(checkpoint, manifest)["projector.a"].tolist() == [1, 1]
    torch.save({"projector.a": torch.zeros(2)}, tmp_path / "inherited_weights.pt")
    with pytest.raises(UserError, match=r"inherited_weights\.pt' .*checkpoint-1 "):
        read_inherited(checkpoint, manifest)


def test_error_if_the_disk_is_full_while_inherited_weights_are_written(tmp_path, monkeypatch):
    model = SimpleNamespace(
        inherited=("projector.a",), named_parameters=lambda: [("projector.a", torch.zeros(2))]
    )

    def full(state, path):
        path.write_bytes(b"a part")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"inherited_weights\.pt' .*file write failed"):
        write_inherited(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
