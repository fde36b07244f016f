"""Wrong fields of a config.json are named before anything is built from them."""

import dataclasses
import json
import math
import shutil

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError

from asrllm.commands.dispatch import main
from asrllm.errors import UserError
from asrllm.models.asr_llm.checks import check_config_fields, read_config_fields
from asrllm.models.config_numbers import MAX_LLM_NUMBER, check_numbers
from asrllm.models.encoders.zipformer.configuration import ZipformerConfig
from asrllm.models.encoders.zipformer.modeling import plain_fields
from asrllm.testing import TINY_ZIPFORMER
from tests.models.asr_llm.test_modeling import make_config

HUGE = 10**30
NAN = math.nan
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
    "audio_encoder.encoder_attention_heads": [0, -2, True, "2", NAN],
    "audio_encoder.encoder_ffn_dim": [0, 1.5, HUGE],
    "llm.num_hidden_layers": [HUGE, 10**6, 0, -1, 2.0, "2"],
    "llm.hidden_size": [HUGE, 10**9, 0, None, True],
    "llm.intermediate_size": [HUGE, 0, "64", NAN],
    "llm.num_attention_heads": [HUGE, 0, -4, NAN],
    "llm.num_key_value_heads": [HUGE, 0, -1, 3, 1.0],
    "llm.head_dim": [10**9, 0, -8, "8", True, math.inf],
    "llm.vocab_size": [-HUGE, 0, 10**10, None],
    "llm.max_position_embeddings": [0, -1, HUGE, "long"],
    "llm.sliding_window": [-1, 1.5],
    "llm.pad_token_id": [10**6, -2, "<pad>", 1.0],
    "llm.rms_norm_eps": [0, -1e-6, NAN, math.inf, 10.0, "1e-6", True],
    "llm.initializer_range": [-1, NAN, "x"],
    "llm.attention_dropout": [-0.1, 1.5, NAN, "0"],
    "llm.rope_parameters.rope_theta": [HUGE, 0, -10000.0, NAN, math.inf, "1e6", True],
    "llm.rope_parameters.factor": [0, -2, NAN, HUGE, "2"],
    "llm.unknown": [NAN, -math.inf, HUGE],
}
WRONG_ZIPFORMER = {
    "encoder_dim": [0, -16, 10**9, 1.5, True, "16"],
    "num_heads": [0, HUGE, NAN],
    "pos_dim": [0, -2, "16", NAN, 10**9],
    "feature_dim": [0, 80.0, HUGE],
    "num_encoder_layers": [0, 10**6, True],
}


@pytest.fixture
def fields(world):
    """The content of a run's config.json."""
    from asrllm.models.build import build_processor

    processor = build_processor(make_config(world), pad_to_30s=False, prompts=("Transcribe.",))
    return json.loads(processor.config.to_json_string(use_diff=False))


@pytest.fixture
def zipformer_fields(fields):
    """The content of a config.json with the smallest Zipformer."""
    encoder = plain_fields(ZipformerConfig(**TINY_ZIPFORMER))
    return fields | {"audio_encoder": json.loads(json.dumps(encoder)) | {"model_type": "zipformer"}}


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


@pytest.mark.parametrize("name", WRONG_ZIPFORMER)
def test_wrong_fields_of_a_zipformer_are_named_with_their_file(zipformer_fields, name):
    check_config_fields(zipformer_fields, "exp/config.json")
    for value in WRONG_ZIPFORMER[name]:
        for given in (value, [value]):
            changed = with_value(zipformer_fields, f"audio_encoder.{name}", given)
            with pytest.raises(UserError) as caught:
                check_config_fields(changed, "exp/config.json")
            assert f"'exp/config.json': audio_encoder.{name}" in str(caught.value), given


@pytest.mark.parametrize("name", transformers.MODEL_FOR_CAUSAL_LM_MAPPING.keys())
def test_defaults_of_every_llm_are_in_range(name):
    """The fields of transformers' own defaults, as a config.json has them."""
    try:
        config = name()
    except (ValueError, StrictDataclassError):
        pytest.skip("its defaults contradict one another")
    check_numbers(json.loads(config.to_json_string(use_diff=False)), MAX_LLM_NUMBER, "", "")


@pytest.mark.parametrize(
    ("name", "value"),
    [("head_dim", 10**9), ("rope_theta", 0), ("rms_norm_eps", -1.0), ("num_key_value_heads", 0)],
)
def test_wrong_number_in_the_base_llm_is_named_with_its_file(world, tmp_path, name, value):
    from asrllm.models.build import build_processor

    config = make_config(world)
    shutil.copytree(world.llm, tmp_path / "llm")
    file = tmp_path / "llm" / "config.json"
    changed = json.loads(file.read_text())
    inner = changed["rope_parameters"] if name == "rope_theta" else changed
    inner[name] = value
    file.write_text(json.dumps(changed))
    llm = dataclasses.replace(config.llm, pretrained_model=str(tmp_path / "llm"))
    config = dataclasses.replace(config, llm=llm)
    with pytest.raises(UserError) as caught:
        build_processor(config, pad_to_30s=False, prompts=("Transcribe.",))
    message = str(caught.value)
    assert repr(str(file)) in message
    assert f"{name}={value}" in message


@pytest.mark.parametrize("heads", [3])
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
