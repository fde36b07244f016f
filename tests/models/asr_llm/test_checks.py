"""Wrong fields of a config.json are named before anything is built from them."""

import json

import pytest

from asrllm.commands.dispatch import main
from asrllm.errors import UserError
from asrllm.models.asr_llm.checks import check_config_fields, read_config_fields
from tests.models.asr_llm.test_modeling import make_config

HUGE = 10**30
# a wrong value, by its place in config.json
WRONG = {
    "base_models.llm.fingerprint": [5, None, "", ["x"]],
    "base_models.audio_encoder.fingerprint": [[], {}],
    "base_models.llm.path": [1.5, False, None],
    "base_models.audio_encoder.path": [{}, ["x"]],
    "base_models.llm": [None, "x", {}, {"path": "x"}],
    "lora.target_modules": [[True], 5, {}],
    "lora.r": ["4", 0, -1, True, None, HUGE],
    "lora.lora_alpha": ["32", 0, None],
    "lora.lora_dropout": ["0", 1, -0.5],
    "lora.use_rslora": ["no", 1],
    "lora.rank_pattern": [{"q_proj": "x"}, 4],
    "lora.layers_to_transform": [["x"], 1.5],
    "audio_encoder_projector_ds_rate": [HUGE, 0, 4.0],
    "projector_hidden_size": [HUGE, 10**9],
    "audio_encoder.encoder_layers": [HUGE, 10**6],
    "audio_encoder.d_model": [HUGE, 10**9],
    "audio_encoder.num_mel_bins": [HUGE],
    "llm.num_hidden_layers": [HUGE, 10**6],
    "llm.hidden_size": [HUGE],
    "llm.vocab_size": [-HUGE],
    "llm.rope_parameters.rope_theta": [HUGE],
}


@pytest.fixture
def fields(world):
    """The content of a run's config.json."""
    from asrllm.models.build import describe_model

    processor = describe_model(make_config(world), pad_to_30s=False, prompts=("Transcribe.",))
    return json.loads(processor.config.to_json_string(use_diff=False))


def with_value(fields, place, value):
    changed = json.loads(json.dumps(fields))
    *groups, name = place.split(".")
    inner = changed
    for group in groups:
        inner = inner[group]
    inner[name] = value
    return changed


def test_wrong_fields_are_named_with_their_file(fields):
    check_config_fields(fields, "exp/config.json")
    for place, values in WRONG.items():
        for value in values:
            with pytest.raises(UserError) as caught:
                check_config_fields(with_value(fields, place, value), "exp/config.json")
            assert "'exp/config.json': " + place in str(caught.value), (place, value)


@pytest.mark.parametrize("heads", [0, 3])
def test_heads_that_do_not_divide_the_width_are_reported(fields, heads):
    with pytest.raises(UserError) as caught:
        check_config_fields(
            with_value(fields, "audio_encoder.encoder_attention_heads", heads), "exp/config.json"
        )
    assert "'exp/config.json': audio_encoder" in str(caught.value)


def test_command_ends_with_status_2_if_a_field_is_wrong(fields, tmp_path, capsys):
    changed = with_value(fields, "audio_encoder.encoder_layers", HUGE)
    (tmp_path / "config.json").write_text(json.dumps(changed))
    assert main(["transcribe", str(tmp_path), "x.wav"]) == 2
    error = capsys.readouterr().err
    assert f"{str(tmp_path / 'config.json')!r}: audio_encoder.encoder_layers" in error


def test_missing_directory_of_a_model_is_reported_as_missing(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, problem in (("none", "exist"), ("empty", r"config\.json")):
        with pytest.raises(UserError, match=rf"{name}'.* {problem}"):
            read_config_fields(tmp_path / name)
