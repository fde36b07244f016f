"""Training and evaluation with a fine-tuned Zipformer in real processes."""

import json

import pytest
import torch

import asrllm
from asrllm.checkpoints.consolidate import checkpoint_weights
from asrllm.models.encoders.zipformer.modeling import ZipformerEncoder
from tests.conftest import assert_done, run_script
from tests.test_end_to_end import losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def settings(world, **more):
    encoder = {"model_type": "zipformer", "pretrained_model": world.zipformer, "frozen": "false"}
    return {f"model__audio_encoder__{key}": value for key, value in encoder.items()} | more


@pytest.mark.soak
def test_zipformer_fine_tuning_resumes_and_is_evaluated(world, tmp_path, soak):
    """ZeRO-3 on two processes, with gradient checkpointing and random layer skips on each rank.

    The soak test uses bfloat16, whose convolutions take ten times as long on a processor without
    bfloat16 instructions.
    """
    exp = tmp_path / "exp"
    more = settings(
        world,
        trainer__deepspeed_config="ds_configs/zero3.json",
        trainer__gradient_checkpointing="true",
    )
    more |= {"trainer__num_steps": 3, "trainer__save_every": 2, "data__valid_data_config": "null"}
    more["trainer__precision"] = "bf16" if soak else "fp32"
    assert_done(run_script("train", *world.overrides(exp, **more), launcher="ranks"))
    whole = losses(exp)
    assert len(whole) == 3
    assert whole[-1] < whole[0]
    trained = torch.load(exp / "pretrained.pt", weights_only=True)
    before = ZipformerEncoder.from_pretrained(world.zipformer).state_dict()
    for name, tensor in before.items():
        start = tensor.bfloat16().float() if soak else tensor
        assert not torch.equal(trained[f"audio_encoder.{name}"].reshape(tensor.shape), start), name
    # like a run that was killed between steps 2 and 3
    for path in (exp / "checkpoint-3" / "asrllm.json", exp / "pretrained.pt"):
        path.unlink()
    assert_done(run_script("train", *world.overrides(exp, **more), launcher="ranks"))
    assert losses(exp) == whole
    test = f"data.test_data_config={world.root / 'test.yaml'}"
    done = assert_done(run_script("evaluate", f"exp_dir={exp}", test, "max_new_tokens=10"))
    assert "WER" in done.stdout
    assert (
        json.loads((exp / "greedy_search" / "results.json").read_text())["test"]["utterances"] == 9
    )
    wavs = sorted((world.root / "kaldi" / "test" / "wav").glob("*.wav"))[:4]
    model = asrllm.AutoModel.from_pretrained(exp)
    together = model.transcribe(wavs, 10)
    assert together == [model.transcribe([wav], 10)[0] for wav in wavs]
    model.save_pretrained(tmp_path / "exported")
    assert asrllm.AutoModel.from_pretrained(tmp_path / "exported").transcribe(wavs, 10) == together


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (2, "fp32")])
def test_zipformer_fine_tuning_from_a_file_with_zero_1_and_2(world, tmp_path, stage, precision):
    """The pretrained encoder is a checkpoint file instead of a directory."""
    exp = tmp_path / "exp"
    file = tmp_path / "icefall.pt"
    torch.save({"model": ZipformerEncoder.from_pretrained(world.zipformer).state_dict()}, file)
    more = settings(
        world, trainer__deepspeed_config=f"ds_configs/zero{stage}.json", trainer__num_steps=3
    )
    more |= {"trainer__precision": precision, "data__valid_data_config": "null"}
    more["model__audio_encoder__pretrained_model"] = file
    assert_done(run_script("train", *world.overrides(exp, **more), launcher="ranks"))
    assert losses(exp)[-1] < losses(exp)[0]
    assert (
        sum(
            name.startswith("audio_encoder.")
            for name in checkpoint_weights(exp / "checkpoint-3").load()
        )
        > 100
    )
