"""Training in stages with adapters on both parts, in real processes."""

import json
import shutil

import pytest
import torch

from asrllm import AutoModel
from asrllm.checkpoints.consolidate import checkpoint_weights
from asrllm.errors import UserError
from asrllm.testing import tone_sentences
from tests.conftest import REPOSITORY, assert_done, run_script

STAGE_1 = {
    "model__llm__lora__r": 0,
    "trainer__precision": "fp32",
    "data__valid_data_config": "null",
    "trainer__label_smoothing": 0.1,
}
ADAPTERS = {
    "model__llm__lora__r": 4,
    "model__llm__lora__use_rslora": "true",
    "model__audio_encoder__lora__r": 2,
    "model__audio_encoder__lora__target_modules": "[q_proj,fc1]",
    "model__frozen_parameters": "[projector.*]",
}


def losses(exp):
    return [
        json.loads(line)["loss"]
        for line in (exp / "metrics.jsonl").read_text().splitlines()
        if "loss" in json.loads(line)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "stage"), [("ranks", 2), ("ranks", 3)])
def test_second_stage_keeps_trained_weights_and_resumes_bitwise(world, tmp_path, launcher, stage):
    first = tmp_path / "first"
    second = tmp_path / "second"
    assert_done(run_script("train", *world.overrides(first, **STAGE_1)))
    ds = json.loads((REPOSITORY / "ds_configs" / f"zero{stage}.json").read_text())
    if stage == 3:
        # partition the tiny tensors too
        ds["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    settings = (
        STAGE_1 | ADAPTERS | {"trainer__deepspeed_config": tmp_path / "ds.json", "init_from": first}
    )
    assert_done(run_script("train", *world.overrides(second, **settings), launcher=launcher))
    whole = losses(second)
    assert len(whole) == 8
    projector = torch.load(first / "pretrained.pt", weights_only=True)
    trained = torch.load(second / "pretrained.pt", weights_only=True)
    assert {name for name in trained if "lora_" not in name} == set(projector)
    assert any(name.startswith("audio_encoder.") for name in trained)
    for name, tensor in projector.items():
        assert torch.equal(trained[name], tensor), name
    waves = [wave for _, wave in tone_sentences(3)]
    texts = AutoModel.from_pretrained(second).transcribe(waves, max_new_tokens=8)
    # the second run resumes without the first one, because it has copies of the inherited weights
    shutil.rmtree(first)
    for path in (second / "checkpoint-8" / "asrllm.json", second / "pretrained.pt"):
        path.unlink()
    assert_done(run_script("train", *world.overrides(second, **settings), launcher=launcher))
    assert losses(second) == whole
    assert AutoModel.from_pretrained(second).transcribe(waves, max_new_tokens=8) == texts
    (second / "inherited_weights.pt").unlink()
    with pytest.raises(UserError, match=r"inherited_weights\.pt"):
        checkpoint_weights(second / "checkpoint-4").load()


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "stage"), [("python", 0), ("ranks", 1), ("ranks", 3)])
def test_partial_encoder_and_full_llm_fine_tuning(world, tmp_path, launcher, stage):
    """Frozen layers come from the base model, trained layers from the checkpoint."""
    settings = {
        "model__audio_encoder__frozen": "false",
        "model__frozen_parameters": "['audio_encoder.layers.0.*','audio_encoder.conv*']",
        "model__llm__frozen": "false",
        "model__llm__lora__r": 0,
        "trainer__precision": "fp32",
        "trainer__deepspeed_config": f"ds_configs/zero{stage}.json",
    }
    assert_done(
        run_script("train", *world.overrides(tmp_path / "exp", **settings), launcher=launcher)
    )
    model = AutoModel.from_pretrained(tmp_path / "exp")
    trained = torch.load(tmp_path / "exp" / "pretrained.pt", weights_only=True)
    assert not [name for name in trained if name.startswith("audio_encoder.layers.0.")]
    for name, tensor in model.weights().items():
        assert name not in trained or torch.equal(tensor, trained[name]), name
    assert len(model.transcribe([wave for _, wave in tone_sentences(3)], max_new_tokens=8)) == 3
    lost = "llm.model.layers.1.mlp.gate_proj.weight"
    torch.save(
        {name: tensor for name, tensor in trained.items() if name != lost},
        tmp_path / "exp" / "pretrained.pt",
    )
    with pytest.raises(UserError, match=r" 25 .*llm.* 26\b"):
        AutoModel.from_pretrained(tmp_path / "exp")
