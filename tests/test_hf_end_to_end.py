"""Training with encoders of transformers in real processes."""

import json

import pytest
import torch

import asrllm
from asrllm.models.encoders.hf import HfEncoder
from asrllm.testing import tone_sentences
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
