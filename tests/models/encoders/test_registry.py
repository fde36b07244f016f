"""The registry of encoders."""

import json

import pytest
import soundfile
import torch

from asrllm.errors import UserError
from asrllm.models.encoders.registry import build_encoder, encoder_class, encoder_kind
from asrllm.models.model_args import EncoderPart
from asrllm.testing import tiny_whisper, tiny_zipformer, tone
from tests.models.asr_llm.test_modeling import make_model


def test_unknown_encoder_is_rejected():
    with pytest.raises(UserError, match=r"model_type='wisper' .* 'whisper'"):
        EncoderPart(model_type="wisper", pretrained_model="x", frozen=True)


@pytest.mark.parametrize("name", ["no", "file", "no/such/dir"])
def test_missing_directory_of_an_encoder_is_reported_with_its_path(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as error:
        encoder_kind(str(tmp_path / name))
    assert f"model.audio_encoder.model_type={str(tmp_path / name)!r}" in str(error.value)
    assert "config.json" in str(error.value)


@pytest.mark.parametrize("make", [tiny_whisper, tiny_zipformer])
def test_features_are_extracted_from_files_and_arrays(tmp_path, make):
    folder = make(tmp_path / "encoder")
    fields, _ = encoder_class(make.__name__.removeprefix("tiny_")).read_pretrained(str(folder))
    encoder = build_encoder(
        {"model_type": make.__name__.removeprefix("tiny_")} | fields, pad_to_30s=False
    )
    wave = tone("one", 0.5)
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="FLOAT")
    x, x_lens = encoder.extract_feature([tmp_path / "a.wav", wave, (tone("two", 0.5, 8000), 8000)])
    assert x.shape == (3, int(x_lens.max()), 80)
    torch.testing.assert_close(x[0], x[1])
    assert not torch.allclose(x[0], x[2])
    with pytest.raises(UserError, match="audio 1"):
        encoder.extract_feature([wave, wave.reshape(2, -1)])
    with pytest.raises(UserError, match="audio 1 is too short"):
        encoder.extract_feature([wave, wave[:5]])


def test_model_type_may_be_a_directory_with_a_config(world, tmp_path):
    def part(place):
        return EncoderPart(model_type=str(place), pretrained_model=str(world.whisper), frozen=True)

    by_name = make_model(world, audio_encoder=part("whisper"))
    by_directory = make_model(world, audio_encoder=part(world.whisper))
    assert by_directory.config.audio_encoder == by_name.config.audio_encoder
    config = json.loads((world.whisper / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"encoder_layers": 7}))
    with pytest.raises(
        UserError, match=f"'{tmp_path}/config.json' .*encoder_layers=7, .*'{world.whisper}' .* 2\\."
    ):
        make_model(world, audio_encoder=part(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "clap"}))
    with pytest.raises(UserError, match=f"'{tmp_path}/config.json' .*model_type='clap'"):
        part(tmp_path)


@pytest.mark.parametrize("kind", ["hf", "zipformer"])
def test_model_type_of_another_encoder_is_reported_with_the_right_one(world, kind):
    encoder = EncoderPart(model_type=kind, pretrained_model=str(world.whisper))
    with pytest.raises(UserError, match=f"model_type={kind} .*'{world.whisper}'.*=whisper"):
        make_model(world, audio_encoder=encoder)


def test_hub_id_names_an_encoder_by_its_configuration(world, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda repo_id, **_: world.whisper if repo_id == "someone/speech" else None,
    )
    assert encoder_kind("someone/speech") == "whisper"


def test_wrong_hub_id_of_an_encoder_is_reported():
    with pytest.raises(UserError, match="'whisper/'"):
        encoder_kind("whisper/")
