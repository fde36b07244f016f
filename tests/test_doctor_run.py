"""`asrllm doctor key=value ...`: checks of a planned run, with planted faults."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from asrllm.collator.chat import CHATML
from asrllm.commands.dispatch import main
from asrllm.doctor import planned_run
from asrllm.doctor.adapters import fault_of_gradients
from asrllm.models.encoders.whisper import WhisperEncoder
from asrllm.testing import data_config
from tests.test_cli import fails

pytestmark = pytest.mark.slow
# warnings about the machine, and of a corpus with few words, are not faults of the run
MACHINE = {"accelerator", "bfloat16", "operators", "ffmpeg", "disk", "attention"}
USUAL = MACHINE | {"overlap of text", "temporary files", "shared memory", "launcher"}


@pytest.fixture
def examine(world, tmp_path, capsys):
    """Return a function that checks a run, and returns the findings that are not ok by check."""

    def run(**changed):
        capsys.readouterr()
        exp = tmp_path / "exp"
        status = main(["doctor", "--json", *map(str, world.overrides(exp, **changed))])
        rows = json.loads(capsys.readouterr().out)["findings"]
        faults = {row["check"]: row for row in rows if row["level"] != "ok"}
        is_problem = any(row["level"] == "problem" for row in faults.values())
        assert status == (2 if is_problem else 0)
        assert not exp.exists()
        return {name: row for name, row in faults.items() if name not in USUAL}

    return run


@pytest.mark.parametrize("encoder", ["whisper", "zipformer"])
def test_good_runs_have_no_fault(world, examine, encoder):
    path = world.root / encoder
    changed = {
        "model__audio_encoder__model_type": encoder,
        "model__audio_encoder__pretrained_model": path,
    }
    assert examine(**changed) == {}


@pytest.mark.parametrize(
    "changed",
    [
        {"data__valid_data_config": "null"},
        {"data__pad_to_30s": "true"},
        {"data__text_normalization": "basic"},
        {"data__augment__speed": "[0.9,1.0,1.1]", "data__augment__spec_augment__prob": 1},
        {"prompt_file": "PROMPTS"},
        {"model__projector": "normed", "model__tag_audio_boundary": "true"},
        {"model__llm__lora__r": 0},
        {"model__llm__lora__r": 0, "model__llm__frozen": "false"},
        {"model__llm__chat_template": "chatml"},
        {"trainer__precision": "fp32", "trainer__deepspeed_config": "ds_configs/zero3.json"},
        {"trainer__num_steps": "null", "trainer__num_epochs": 2},
        {"trainer__keep_last_k": 1, "trainer__schedule__name": "wsd"},
        {"data__use_infinite_dataset": "true"},
    ],
    ids=lambda changed: ",".join(changed),
)
def test_other_good_runs_have_no_fault(world, examine, changed):
    files = {"PROMPTS": world.root / "prompts.txt"}
    assert examine(**{key: files.get(value, value) for key, value in changed.items()}) == {}


def test_unknown_key_is_an_error(world, tmp_path, capsys):
    overrides = world.overrides(tmp_path / "exp", trainer__lrr=1)
    assert "'trainer.lrr'" in fails(capsys, "doctor", *overrides)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_a_problem(world, examine, tmp_path, value):
    llm = shutil.copytree(world.llm, tmp_path / "llm")
    weights = load_file(llm / "model.safetensors")
    name = next(iter(weights))
    weights[name].view(-1)[0] = value
    save_file(weights, llm / "model.safetensors", {"format": "pt"})
    faults = examine(model__llm__pretrained_model=llm)
    assert faults.keys() == {"llm"}
    assert faults["llm"]["level"] == "problem"
    assert name in faults["llm"]["text"]


def test_missing_model_is_a_problem(examine, tmp_path):
    faults = examine(model__llm__pretrained_model=tmp_path / "no" / "llm")
    assert faults.keys() == {"configuration"}
    assert str(tmp_path / "no" / "llm") in faults["configuration"]["text"]


def test_manifest_without_shards_is_a_problem_and_is_not_written(examine, tmp_path):
    (tmp_path / "cuts.jsonl").write_text("{}\n")
    data = data_config(tmp_path / "data.yaml", [{"manifest": str(tmp_path / "cuts.jsonl")}])
    faults = examine(data__train_data_config=data)
    assert faults.keys() == {"configuration"}
    assert "cuts.jsonl" in faults["configuration"]["text"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cuts.jsonl", "data.yaml"]


def test_filters_that_drop_much_are_a_warning_with_the_reason(examine):
    faults = examine(data__filter__min_duration=0.6)
    assert faults.keys() == {"filter"}
    assert "too_short" in faults["filter"]["text"]


def test_corrupted_audio_is_a_problem(world, examine, tmp_path):
    shards = shutil.copytree(world.root / "shards" / "valid", tmp_path / "valid")
    tar = shards / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    for place in range(600, len(content) - 10240, 512):
        content[place] ^= 0xFF
    tar.write_bytes(content)
    data = data_config(tmp_path / "valid.yaml", [{"name": "dev", "shards": str(shards)}])
    faults = examine(data__valid_data_config=data)
    assert faults.keys() == {"audio"}
    assert faults["audio"]["text"].startswith("dev: 0 of 3")


def test_validation_audio_in_the_training_data_is_a_warning(world, examine, tmp_path):
    shards = [str(world.root / "shards" / name) for name in ("train", "valid")]
    data = data_config(tmp_path / "train.yaml", [{"shards": path} for path in shards])
    faults = examine(data__train_data_config=data)
    assert faults.keys() == {"overlap of audio"}
    assert "7 of 7" in faults["overlap of audio"]["text"]


def test_long_warmup_is_a_warning(examine):
    faults = examine(trainer__warmup_steps=9)
    assert faults.keys() == {"schedule"}
    assert "trainer.warmup_steps" in faults["schedule"]["fix"]


def test_disk_too_small_for_the_checkpoints_is_a_problem(examine, monkeypatch):
    full = SimpleNamespace(total=1 << 40, used=1 << 40, free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    faults = examine()
    assert faults.keys() == {"checkpoints"}
    assert faults["checkpoints"]["level"] == "problem"


def test_audio_tokens_that_differ_from_the_encoders_frames_are_a_problem(examine, monkeypatch):
    right = WhisperEncoder.frame_lengths
    monkeypatch.setattr(WhisperEncoder, "frame_lengths", staticmethod(lambda *n: right(*n) + 1))
    assert examine().keys() == {"audio tokens"}


def test_other_prompt_in_decoding_is_a_problem(examine, monkeypatch):
    read = planned_run.as_decoding_reads

    def changed(processor):
        decoding = read(processor)
        decoding.tokenizer.chat_template = f"Listen. {CHATML}"
        return type(decoding)(decoding.tokenizer, decoding.config)

    monkeypatch.setattr(planned_run, "as_decoding_reads", changed)
    assert examine().keys() == {"prompts"}


def test_labels_that_decode_to_another_text_are_a_warning(examine, monkeypatch):
    right = planned_run.training_tokens

    def shortened(*arguments):
        tokens, labels = right(*arguments)
        labels[next(i for i, label in enumerate(labels) if label >= 0)] = -100
        return tokens, labels

    monkeypatch.setattr(planned_run, "training_tokens", shortened)
    assert examine().keys() == {"labels"}


def test_adapters_before_layers_of_zeros_are_a_problem(world, examine, tmp_path):
    llm = shutil.copytree(world.llm, tmp_path / "llm")
    weights = load_file(llm / "model.safetensors")
    for name, weight in weights.items():
        if "o_proj" in name:
            weight.zero_()
    save_file(weights, llm / "model.safetensors", {"format": "pt"})
    faults = examine(model__llm__pretrained_model=llm)
    assert faults.keys() == {"adapters"}
    assert faults["adapters"]["level"] == "problem"


# --- adapters ---


def test_only_adapters_and_the_projector_get_a_gradient(examine, monkeypatch):
    models = []
    check = planned_run.check_adapters

    def recorded(model, batch):
        models.append(model)
        return check(model, batch)

    monkeypatch.setattr(planned_run, "check_adapters", recorded)
    assert examine(model__llm__lora__r=0, model__llm__frozen="false") == {}
    (model,) = models
    reached = {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"projector"}


@pytest.mark.parametrize(
    ("gradients", "named"),
    [
        ({"llm.lora_A": [0.0, 1.0], "projector.a": [0.0], "projector.b": [1.0]}, ""),
        ({"llm.lora_A": [0.0, 0.0], "projector.a": [1.0]}, "'llm.lora_A'"),
        ({"llm.lora_A": None, "projector.a": [1.0]}, "'llm.lora_A'"),
        ({"llm.lora_A": [1.0], "projector.a": [float("nan")]}, "'projector.a'"),
        ({"llm.lora_A": [1.0], "projector.a": [0.0], "projector.b": None}, "the projector"),
        ({}, ""),
    ],
)
def test_faults_of_gradients(gradients, named):
    tensors = {name: value and torch.tensor(value) for name, value in gradients.items()}
    fault = fault_of_gradients(tensors)
    assert named in fault
    assert bool(fault) == bool(named)
