"""Training with encoders of transformers in real processes."""

import json

import pytest
import torch

import asrllm
from asrllm.commands.plan import plan
from asrllm.models.build import build_model, build_processor
from asrllm.models.encoders.hf import HfEncoder
from asrllm.testing import tone_sentences
from asrllm.training.run_config import PlanRun
from tests.composing import load_config
from tests.conftest import REPOSITORY, assert_done, run_script
from tests.models.encoders.test_hf import edited, write
from tests.test_end_to_end import losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def settings(folder, case, **more):
    """Write an encoder without dropout, and return the settings that train it."""
    write(folder, case)
    fields = json.loads((folder / "config.json").read_text())
    edited(folder, "config.json", **{name: 0.0 for name in fields if "dropout" in name})
    encoder = {"model_type": "hf", "pretrained_model": folder, "frozen": "false"}
    common = {
        "trainer__num_steps": 3,
        "trainer__save_every": 3,
        "trainer__precision": "fp32",
        "trainer__gradient_checkpointing": "true",
        "data__valid_data_config": "null",
        "model__audio_encoder_projector_ds_rate": 4,
    }
    named = {f"model__audio_encoder__{key}": value for key, value in encoder.items()}
    return common | named | more


@pytest.mark.parametrize(("case", "projector"), [("wav2vec2", "qformer"), ("parakeet", "conv")])
def test_zero_3_trains_as_zero_1_does(world, tmp_path, case, projector):
    """The ranks have different numbers of utterances, and encode them one after the other."""
    more = settings(tmp_path / "encoder", case, model__projector=projector)
    found = {}
    for stage in (1, 3):
        exp = tmp_path / f"zero{stage}"
        ds = json.loads((REPOSITORY / f"ds_configs/zero{stage}.json").read_text())
        if stage == 3:  # partition the tiny tensors too
            ds["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        (tmp_path / f"zero{stage}.json").write_text(json.dumps(ds))
        changes = more | {"trainer__deepspeed_config": tmp_path / f"zero{stage}.json"}
        assert_done(run_script("train", *world.overrides(exp, **changes), launcher="ranks"))
        found[stage] = losses(exp)
    assert len(found[1]) == 3
    assert found[3] == pytest.approx(found[1], rel=1e-4)
    trained = torch.load(tmp_path / "zero3" / "pretrained.pt", weights_only=True)
    other = torch.load(tmp_path / "zero1" / "pretrained.pt", weights_only=True)
    _, before = HfEncoder.read_pretrained(str(tmp_path / "encoder"))
    moved = 0
    for name, tensor in other.items():
        torch.testing.assert_close(trained[name], tensor, atol=1e-4, rtol=1e-2)
        start = before.get(name.removeprefix("audio_encoder."))
        moved += start is not None and not torch.equal(tensor.view_as(start), start)
    assert moved > 20
    waves = [wave for _, wave in tone_sentences(4)]
    model = asrllm.AutoModel.from_pretrained(tmp_path / "zero3")
    together = model.transcribe(waves, 6)
    assert together == [model.transcribe([wave], 6)[0] for wave in waves]
    model.save_pretrained(tmp_path / "saved")
    assert asrllm.AutoModel.from_pretrained(tmp_path / "saved").transcribe(waves, 6) == together


def test_adapters_of_a_frozen_encoder_train_alike_with_zero_1_and_3(world, tmp_path):
    more = settings(
        tmp_path / "encoder",
        "wav2vec2-bert",
        model__audio_encoder__frozen="true",
        model__audio_encoder__lora__r=2,
        model__audio_encoder__lora__target_modules="[linear_q,linear_v]",
    )
    found = {}
    for stage in (1, 3):
        exp = tmp_path / f"zero{stage}"
        changes = more | {"trainer__deepspeed_config": f"ds_configs/zero{stage}.json"}
        assert_done(run_script("train", *world.overrides(exp, **changes), launcher="ranks"))
        found[stage] = losses(exp)
    assert found[3] == pytest.approx(found[1], rel=1e-4)
    trained = torch.load(tmp_path / "zero3" / "pretrained.pt", weights_only=True)
    adapted = [name for name in trained if name.startswith("audio_encoder.") and "lora_B" in name]
    assert len(adapted) == 4
    assert all(trained[name].abs().max() > 0 for name in adapted)


@pytest.mark.parametrize("projector", ["qformer", "conv", "swiglu", "voxtral"])
def test_plan_counts_the_parameters(world, tmp_path, projector):
    more = settings(tmp_path / "encoder", "parakeet", model__projector=projector)
    config = load_config("plan", world.overrides(tmp_path / "exp", **more), PlanRun)
    processor = build_processor(config.model, pad_to_30s=False, prompts=("Transcribe.",))
    model = build_model(processor, frozen=config.model.frozen_parts, dtype=torch.float32)
    sizes = [p.numel() for p in model.parameters()]
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    found = plan(config)
    assert found["model"]["weights"] == sum(sizes)
    assert found["model"]["trained"] == sum(trained)
    assert found["activations"]["each"] > 0


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        ("config.json", {"model_type": "clap"}, "clap"),
        ("preprocessor_config.json", {"sampling_rate": 8000}, "sampling_rate=8000"),
        ("config.json", {"intermediate_size": 33}, "33"),
    ],
)
def test_unsupported_encoders_end_a_run_with_status_2(world, tmp_path, file, changes, named):
    more = settings(tmp_path / "encoder", "hubert")
    edited(tmp_path / "encoder", file, **changes)
    done = run_script("train", *world.overrides(tmp_path / "exp", **more))
    assert done.returncode == 2
    assert named in done.stderr
    assert str(tmp_path / "encoder") in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "exp").exists()
