"""Training of encoders without pretrained weights, in real processes."""

import json
import shutil

import pytest
import torch

from asrllm import AutoModel
from asrllm.commands.dispatch import main
from asrllm.errors import UserError
from asrllm.models.state_dict import plain_name
from asrllm.testing import tone_sentences
from asrllm.training.checkpoint.manifest import complete_checkpoints, step_of
from tests.conftest import REPOSITORY, assert_done, run_script
from tests.test_stages_end_to_end import losses

pytestmark = pytest.mark.slow

FIELDS = {
    "whisper": "{d_model: 16, encoder_layers: 2, encoder_attention_heads: 2, encoder_ffn_dim: 32}",
    "zipformer": "{encoder_dim: [16, 24], encoder_unmasked_dim: [8, 16], num_encoder_layers: "
    "[1, 2], feedforward_dim: [24, 32], downsampling_factor: [1, 2], cnn_module_kernel: [7, 5], "
    "num_heads: [2, 4], query_head_dim: 8, value_head_dim: 4, pos_head_dim: 4, pos_dim: 16}",
}


def settings(kind="whisper", **more):
    return {
        "model__audio_encoder__model_type": kind,
        "model__audio_encoder__pretrained_model": "null",
        "model__audio_encoder__size": "small",
        "model__audio_encoder__fields": FIELDS[kind],
        "model__audio_encoder__frozen": "false",
        "data__valid_data_config": "null",
        "trainer__precision": "fp32",
        "trainer__lr": 0.005,
    } | more


def partitioning(folder):
    """Write a DeepSpeed JSON of ZeRO-3 that partitions the tiny tensors too."""
    ds = json.loads((REPOSITORY / "ds_configs" / "zero3.json").read_text())
    ds["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = folder / "ds.json"
    path.write_text(json.dumps(ds))
    return path


def train(world, exp, options, launcher="ranks"):
    return assert_done(run_script("train", *world.overrides(exp, **options), launcher=launcher))


def stop_after_step_4(exp):
    """Make a run look as if it had been killed soon after step 4."""
    for checkpoint in complete_checkpoints(exp):
        if step_of(checkpoint) > 4:
            shutil.rmtree(checkpoint)
    assert not (exp / "checkpoint-8").exists()
    (exp / "pretrained.pt").unlink()


def encoder_of(exp):
    state = torch.load(exp / "pretrained.pt", weights_only=True)
    return {name: t for name, t in state.items() if name.startswith("audio_encoder.")}


@pytest.mark.longest(60, reason="trains twice on two ranks, evaluates and exports")
@pytest.mark.parametrize(("kind", "stage"), [("whisper", 3), ("zipformer", 0)])
def test_encoder_is_trained_resumed_averaged_evaluated_and_exported(world, tmp_path, kind, stage):
    exp = tmp_path / "exp"
    ds = partitioning(tmp_path) if stage == 3 else f"ds_configs/zero{stage}.json"
    options = settings(kind, trainer__deepspeed_config=ds)
    if kind == "whisper":
        options["model__frozen_parameters"] = "[audio_encoder.embed_positions.*]"
    train(world, exp, options)
    whole = losses(exp)
    assert len(whole) == 8
    assert whole[-1] < whole[0]
    weights = encoder_of(exp)
    config = json.loads((exp / "config.json").read_text())
    assert config["base_models"].keys() == {"llm"}
    assert config["stored"]["audio_encoder"] == len(weights)
    assert (exp / "inherited_weights.pt").exists() == (kind == "whisper")
    stop_after_step_4(exp)
    train(world, exp, options)
    assert losses(exp) == whole
    for name, tensor in encoder_of(exp).items():
        assert torch.equal(tensor, weights[name]), name

    test = f"data.test_data_config={world.root / 'test.yaml'}"
    choice = ("checkpoint.model.iter=8", "checkpoint.model.avg=2", "max_new_tokens=8")
    done = assert_done(run_script("evaluate", f"exp_dir={exp}", test, *choice))
    assert "No Whisper baseline" in done.stdout
    (result,) = json.loads((exp / "greedy_search" / "results.json").read_text()).values()
    assert result["utterances"] == 9

    waves = [wave for _, wave in tone_sentences(3)]
    texts = AutoModel.from_pretrained(exp).transcribe(waves, 8)
    exported = tmp_path / "exported"
    command = ["export", exp, "--output", exported, "--dtype", "float32", "--parts"]
    assert main(list(map(str, command))) == 0
    assert AutoModel.from_pretrained(exported).transcribe(waves, 8) == texts
    assert f"| audio_encoder | {kind} | random weights |" in (exported / "README.md").read_text()
    # the trained encoder is a pretrained model of another run
    more = settings(kind, model__audio_encoder__size="null", model__audio_encoder__fields="null")
    more |= {
        "model__audio_encoder__pretrained_model": exported / "audio_encoder",
        "trainer__num_steps": 1,
        "trainer__lr": 1e-30,
        "trainer__weight_decay": 0,
    }
    train(world, tmp_path / "next", more, "python")
    for name, tensor in encoder_of(tmp_path / "next").items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-20)
    with pytest.raises(UserError, match="audio_encoder"):
        AutoModel.from_pretrained(exp, base_models={"audio_encoder": world.whisper})


@pytest.mark.longest(60, reason="trains four times")
@pytest.mark.parametrize("kind", FIELDS)
def test_first_weights_depend_on_the_seed_only(world, tmp_path, kind):
    untrained = settings(kind, trainer__num_steps=1, trainer__lr=1e-30, trainer__weight_decay=0)
    zero3 = untrained | {"trainer__deepspeed_config": partitioning(tmp_path)}
    train(world, tmp_path / "one", untrained, "python")
    train(world, tmp_path / "two", untrained)
    train(world, tmp_path / "three", zero3)
    train(world, tmp_path / "seed", untrained | {"seed": 1}, "python")
    one, two, three, seed = (encoder_of(tmp_path / n) for n in ("one", "two", "three", "seed"))
    assert one.keys() == two.keys() == three.keys() == seed.keys()
    for name, tensor in one.items():  # the step changes those that begin as zero
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=1e-20)
        torch.testing.assert_close(tensor, three[name], rtol=0, atol=1e-20)
    assert any(not torch.equal(tensor, seed[name]) for name, tensor in one.items())


@pytest.mark.longest(60, reason="trains four times")
def test_later_stage_keeps_the_encoder_of_the_first(world, tmp_path, capsys):
    first = tmp_path / "first"
    second = tmp_path / "second"
    train(world, first, settings(model__llm__lora__r=0), "python")
    frozen = {
        "init_from": first,
        "model__audio_encoder__frozen": "true",
        "model__audio_encoder__lora__r": 2,
        "trainer__deepspeed_config": partitioning(tmp_path),
    }
    train(world, second, settings(**frozen))
    whole = losses(second)
    weights = encoder_of(first)
    later = {plain_name(name): tensor for name, tensor in encoder_of(second).items()}
    assert {name for name in later if "lora_" not in name} == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(later[name], tensor), name
    waves = [wave for _, wave in tone_sentences(3)]
    texts = AutoModel.from_pretrained(second).transcribe(waves, 8)
    stop_after_step_4(second)
    train(world, second, settings(**frozen))
    assert losses(second) == whole
    assert AutoModel.from_pretrained(second).transcribe(waves, 8) == texts

    def error_of(exp=tmp_path / "third", **more):
        assert main(["train", *world.overrides(exp, **settings(**more))]) == 2
        return capsys.readouterr().err

    heads = FIELDS["whisper"].replace("heads: 2", "heads: 4")
    other = {"model__audio_encoder__fields": heads}
    assert "audio_encoder" in error_of(init_from=first, **other)
    pretrained = {"size": "null", "fields": "null", "pretrained_model": world.whisper}
    base = {f"model__audio_encoder__{key}": value for key, value in pretrained.items()}
    assert "(random)" in error_of(init_from=first, **base)
    # resuming has the same checks
    without_adapters = {"model__llm__lora__r": 0}
    assert "audio_encoder" in error_of(first, **without_adapters, **other)
    assert "(random)" in error_of(first, **without_adapters, **base)
    # and an earlier run without the encoder's weights is incomplete
    state = torch.load(first / "pretrained.pt", weights_only=True)
    name = next(iter(weights))
    torch.save({key: t for key, t in state.items() if key != name}, first / "pretrained.pt")
    failed = run_script("train", *world.overrides(tmp_path / "third", **settings(**frozen)))
    assert failed.returncode == 2
    assert name in failed.stderr


@pytest.mark.parametrize("kind", FIELDS)
def test_plan_and_doctor_accept_the_run(world, tmp_path, capsys, kind):
    overrides = world.overrides(tmp_path / "exp", **settings(kind))
    assert main(["plan", *overrides, f"output={tmp_path / 'plan.json'}"]) == 0
    sizes = json.loads((tmp_path / "plan.json").read_text())["model"]
    assert 0 < sizes["trained"] < sizes["weights"]
    capsys.readouterr()
    main(["doctor", "--json", *overrides])
    found = {row["check"]: row for row in json.loads(capsys.readouterr().out)["findings"]}
    for check in ("configuration", "encoder", "llm", "audio tokens", "adapters"):
        assert found[check]["level"] == "ok", found[check]
    assert "random weights" in str(found["encoder"])
