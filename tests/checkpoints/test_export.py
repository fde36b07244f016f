"""Exported directories: the model card, separate parts, and uploads to the hub."""

import json
import re
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from asrllm.checkpoints.export import export, public_name, push, sources_paragraph, training_data
from asrllm.commands.dispatch import main
from asrllm.errors import CorruptedError, UserError
from asrllm.models.encoders.registry import encoder_class
from asrllm.models.hub_files import check_directory
from asrllm.models.model_args import EncoderPart
from tests.checkpoints.test_merge import logits, run_of
from tests.models.asr_llm.test_modeling import make_model
from tests.models.asr_llm.test_serialization import lora_model


@pytest.fixture
def exp(world, tmp_path):
    exp = run_of(lora_model(world), tmp_path / "exp")
    (tmp_path / "train.yaml").write_text(
        "- {shards: /data/libri, hours: 960, lang: en}\n"
        "- {manifest: /data/wenet.jsonl, hours: 10000}\n"
    )
    (exp / "config.yaml").write_text(f"data: {{train_data_config: {tmp_path / 'train.yaml'}}}\n")
    (exp / "greedy_search").mkdir()
    found = {
        "wer": 2.5,
        "cer": 1.25,
        "wer_ci95": [2.0, 3.0],
        "utterances": 9,
        "normalizer": "basic",
        "weights": "pretrained.pt",
    }
    (exp / "greedy_search" / "results.json").write_text(
        json.dumps({"test-clean": found, "of-others": found | {"weights": "averaged.pt"}})
    )
    return exp


@pytest.mark.slow
def test_card_states_training_data_and_error_rates(exp, tmp_path):
    export(exp / "pretrained.pt", tmp_path / "model", dtype="float32")
    card = (tmp_path / "model" / "README.md").read_text()
    for text in (
        "pipeline_tag: automatic-speech-recognition",
        "| libri | 960 | en |",
        "| wenet.jsonl | 10000 |  |",
        "| test-clean | 2.50 | 2.00 to 3.00 | 1.25 | 9 | basic | greedy_search |",
        "- Transcribe.",
        f"torch {torch.__version__}",
    ):
        assert text in card
    assert "of-others" not in card
    assert 'from_pretrained("model")' in card
    assert str(tmp_path) not in card
    assert "| llm | qwen2 | llm |" in card
    assert "The weights are" not in card, "the file does not name its checkpoints"
    export(
        tmp_path / "model", tmp_path / "again", dtype="float32"
    )  # an exported directory has no record of the run
    assert "## Training data" not in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.slow
def test_card_describes_the_exported_weights(exp, tmp_path):
    state = OrderedDict(torch.load(exp / "pretrained.pt", weights_only=True))
    (exp / "pretrained.pt").unlink()
    state.about = {
        "sources": [{"checkpoint": f"checkpoint-{n}"} for n in (4, 6, 8)],
        "mean": "checkpoints",
        "lora": "factors",
    }
    torch.save(state, exp / "averaged.pt")
    (exp / "averaged.pt").rename(exp / "averaged-iter-8-avg-3.pt")
    results = exp / "greedy_search" / "results.json"
    results.write_text(
        results.read_text().replace('"averaged.pt"', '"/private/exp/averaged-iter-8-avg-3.pt"')
    )
    export(exp, tmp_path / "model", dtype="float32", repository="me/model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert re.search("checkpoint-4.*checkpoint-6.*checkpoint-8", card)
    assert "| of-others | 2.50" in card
    assert "| test-clean |" not in card
    assert 'AutoModel.from_pretrained("me/model")' in card


def test_card_names_source_checkpoints_and_base_models():
    steps = {
        "sources": [{"checkpoint": "checkpoint-2"}, {"checkpoint": "checkpoint-8"}],
        "mean": "every step between",
    }
    both = sources_paragraph(steps)[0]
    assert re.search("checkpoint-2.*checkpoint-8", both)
    one = sources_paragraph({"sources": steps["sources"][1:]})[0]
    assert "checkpoint-8" in one
    assert "checkpoint-2" not in one
    assert public_name("/home/me/hub/models--Qwen--Qwen2.5-7B/snapshots/0a1b") == "Qwen/Qwen2.5-7B"
    assert public_name("/home/me/models/whisper") == "whisper"


@pytest.mark.slow
@pytest.mark.parametrize("text", ["{", "[1]", '{"test": {"wer": 1}}', '{"test": 1}'])
def test_tables_missing_from_the_card_are_logged(exp, tmp_path, caplog, text):
    (exp / "greedy_search" / "results.json").write_text(text)
    (exp / "config.yaml").write_text("data: {train_data_config: gone.yaml}\n")
    export(exp, tmp_path / "model", dtype="float32")
    assert "results.json" in caplog.text
    assert "'gone.yaml'" in caplog.text


@pytest.mark.parametrize("text", ["", "3", "[libri]", "{"])
def test_invalid_list_of_training_data_is_left_out(exp, tmp_path, caplog, text):
    (tmp_path / "train.yaml").write_text(text)
    assert training_data(exp) == []
    assert "config.yaml" in caplog.text


@pytest.mark.slow
def test_exported_parts_can_be_loaded(world, exp, tmp_path):
    export(exp, tmp_path / "model", dtype="float32", parts=True)
    model = lora_model(world)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model" / "llm")),
        logits(model.llm),
        rtol=1e-4,
        atol=1e-4,
    )
    fields, state = encoder_class("whisper").read_pretrained(
        str(tmp_path / "model" / "audio_encoder")
    )
    assert all(
        torch.equal(tensor, state[name])
        for name, tensor in model.audio_encoder.state_dict().items()
    )
    assert fields | {"model_type": "whisper"} == model.config.audio_encoder
    assert (tmp_path / "model" / "projector" / "model.safetensors").is_file()
    readers = {
        "audio_encoder": encoder_class("whisper").read_pretrained,
        "llm": lambda folder: check_directory(folder, "model.llm.pretrained_model"),
    }
    for part, read in readers.items():
        path = tmp_path / "model" / part / "config.json"
        path.write_text(path.read_text() + " ")
        with pytest.raises(CorruptedError, match=re.escape(repr(str(path)))):
            read(str(path.parent))


def test_export_writes_parts_in_float16_with_a_progress_bar_each(exp, tmp_path, capsys):
    options = ["--parts", "--dtype", "float16"]
    assert main(["export", str(exp), "--output", str(tmp_path / "model"), *options]) == 0
    printed = capsys.readouterr().err
    for what in ("model", "audio_encoder", "projector", "llm"):
        assert printed.count(f"writing {what}: ") == 1
        file = tmp_path / "model" / ("" if what == "model" else what) / "model.safetensors"
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}


@pytest.mark.slow
def test_weights_beyond_the_range_of_float16_are_not_exported(exp, tmp_path, capsys):
    state = torch.load(exp / "pretrained.pt", weights_only=True)
    name = max(key for key in state if key.startswith("projector.") and state[key].ndim == 2)
    state[name][0, 0] = 1e5
    torch.save(state, exp / "pretrained.pt")
    out = tmp_path / "model"
    assert main(["export", str(exp), "--output", str(out), "--dtype", "float16"]) == 2
    assert repr(name) in capsys.readouterr().err
    assert not out.exists()
    assert main(["export", str(exp), "--output", str(out), "--dtype", "bfloat16"]) == 0
    assert load_file(out / "model.safetensors")[name][0, 0] == torch.tensor(1e5).bfloat16()


@pytest.mark.slow
def test_exported_zipformer_can_be_loaded(world, tmp_path):
    encoder = EncoderPart(
        model_type="zipformer", pretrained_model=str(world.zipformer), frozen=True, lora=None
    )
    model = make_model(world, audio_encoder=encoder)
    export(run_of(model, tmp_path / "exp"), tmp_path / "model", dtype="float32", parts=True)
    _, state = encoder_class("zipformer").read_pretrained(str(tmp_path / "model" / "audio_encoder"))
    assert all(
        torch.equal(tensor, state[name])
        for name, tensor in model.audio_encoder.state_dict().items()
    )


def test_push_creates_the_repository_and_returns_its_address(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo",
        lambda self, *a, **k: calls.append((a, k)) or "https://hub/me/model",
    )
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **k: calls.append(k))
    assert push(tmp_path, "me/model", private=True) == "https://hub/me/model"
    assert calls[0] == (("me/model",), {"private": True, "exist_ok": True})
    assert (calls[1]["repo_id"], calls[1]["folder_path"]) == ("me/model", tmp_path)


@pytest.mark.parametrize("name", ["me/model", "a b"])
def test_failed_upload_names_the_command_to_repeat_it(monkeypatch, tmp_path, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"hf upload {name} {tmp_path}"):
        push(tmp_path, name, private=False)
