"""Encoders without pretrained weights: their sizes, their first weights, and wrong settings."""

import pytest
import torch
from transformers import WhisperConfig, WhisperModel

from asrllm.commands.dispatch import main
from asrllm.models.encoders.registry import build_encoder, encoder_sizes
from asrllm.models.init_from import base_difference
from asrllm.models.model_args import EncoderPart
from asrllm.models.pretrained import initial_encoder
from tests.models.asr_llm.test_modeling import make_model

# parameters of the published models: of the whole model, and of its encoder
WHISPER = {
    "tiny": (37_760_640, 8_208_384),
    "base": (72_593_920, 20_590_592),
    "small": (241_734_912, 88_154_112),
    "medium": (763_857_920, 307_216_384),
    "large-v3": (1_543_490_560, 636_968_960),
}
ZIPFORMER = {"small": 21_989_779, "medium": 63_994_103, "large": 146_625_594}
SMALL = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def empty(kind, fields):
    with torch.device("meta"):
        return build_encoder({"model_type": kind} | fields, pad_to_30s=False)


@pytest.mark.parametrize("size", WHISPER)
def test_whisper_has_the_published_sizes(size):
    fields = encoder_sizes("whisper")[size]
    config = WhisperConfig(
        **fields,
        vocab_size=51866 if size == "large-v3" else 51865,
        decoder_layers=fields["encoder_layers"],
        decoder_attention_heads=fields["encoder_attention_heads"],
        decoder_ffn_dim=fields["encoder_ffn_dim"],
    )
    with torch.device("meta"):
        theirs = WhisperModel(config)
    assert (count(theirs), count(theirs.encoder)) == WHISPER[size]
    assert count(empty("whisper", fields)) == count(theirs.encoder)


@pytest.mark.slow
@pytest.mark.parametrize("size", ZIPFORMER)
def test_zipformer_has_the_published_sizes(size):
    """The published count includes an unused parameter per layer, which is not built here."""
    fields = encoder_sizes("zipformer")[size]
    widths = zip(fields["num_encoder_layers"], fields["encoder_dim"], strict=True)
    dead = sum(layers * width for layers, width in widths)
    assert count(empty("zipformer", fields)) + dead == ZIPFORMER[size]


def test_all_sizes_are_tested():
    assert encoder_sizes("whisper").keys() == WHISPER.keys()
    assert encoder_sizes("zipformer").keys() == ZIPFORMER.keys()
    assert encoder_sizes("hf") == {}
    assert encoder_sizes("openai/whisper-tiny") == {}


def sized(kind="whisper", size="tiny", **more):
    fields = SMALL if kind == "whisper" else None
    return EncoderPart(model_type=kind, size=size, fields=fields, frozen=False, **more)


@pytest.mark.slow
def test_whisper_starts_like_transformers(world):
    torch.manual_seed(0)
    config = WhisperConfig(**encoder_sizes("whisper")["tiny"], decoder_layers=1, vocab_size=60000)
    theirs = WhisperModel(config).encoder.state_dict()
    encoder = build_encoder(
        {"model_type": "whisper"} | encoder_sizes("whisper")["tiny"], pad_to_30s=False
    )
    encoder.start_from_scratch()
    mine = encoder.state_dict()
    assert mine.keys() == theirs.keys()
    torch.testing.assert_close(mine["embed_positions.weight"], theirs["embed_positions.weight"])
    for name, tensor in theirs.items():
        if tensor.unique().numel() == 1:  # biases and norms
            assert torch.equal(mine[name], tensor), name
        else:
            assert abs(mine[name].mean()) < 1e-3 or name == "embed_positions.weight", name
            torch.testing.assert_close(mine[name].std(), tensor.std(), rtol=0.03, atol=0)


def test_zipformer_starts_its_schedules_at_the_first_step_unless_it_was_trained(world):
    model = make_model(world, frozen=("llm",), audio_encoder=sized("zipformer", "small"))
    assert "audio_encoder" not in model.config.base_models
    encoder = model.audio_encoder
    encoder.set_batch_count(7)
    assert encoder.encoder.batch_count == 7
    assert encoder.encoder_embed.convnext.pointwise_conv2.bias.abs().max() <= 0.001
    assert encoder.encoder_embed.convnext.pointwise_conv2.weight.abs().max() <= 0.01 / 384**0.5
    trained = initial_encoder(model.config, is_random=False)
    trained.set_batch_count(7)
    assert trained.encoder.batch_count == 100_007


def test_encoder_depends_on_the_seed_only(world):
    def first_weights(seed):
        torch.manual_seed(seed)
        model = make_model(world, frozen=("llm",), audio_encoder=sized())
        torch.manual_seed(seed)
        return initial_encoder(model.config).state_dict()

    one, again, other = (first_weights(seed) for seed in (1, 1, 2))
    for name, tensor in one.items():
        assert torch.equal(tensor, again[name])
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])


def test_frozen_random_weights_are_inherited(world):
    model = make_model(
        world,
        frozen=("llm",),
        patterns=("audio_encoder.embed_positions.*",),
        audio_encoder=sized(),
    )
    assert model.inherited == ("audio_encoder.embed_positions.weight",)
    stored = sum(name.startswith("audio_encoder.") for name in model.state_dict())
    assert model.stored_weights()["audio_encoder"] == stored


def test_difference_of_base_models_names_both():
    one = {"audio_encoder": {"path": "/a", "fingerprint": "1"}, "llm": {"fingerprint": "2"}}
    scratch = {"llm": {"fingerprint": "2"}}
    assert base_difference(one, one) == base_difference(scratch, scratch) == ""
    assert "'/a'" in base_difference(one, scratch)
    assert "'/a'" in base_difference(scratch, one)
    moved = one | {"audio_encoder": {"path": "/b", "fingerprint": "1"}}
    assert base_difference(one, moved) == ""


SIZE = "model.audio_encoder.size"
WRONG = {
    "pretrained weights beside it": (
        {"size": "tiny", "pretrained_model": "openai/whisper-tiny"},
        (f"{SIZE}=tiny", "model.audio_encoder.pretrained_model='openai/whisper-tiny'", "Remove"),
    ),
    "neither": (
        {},
        ("model.audio_encoder.pretrained_model is not set", SIZE, "large-v3"),
    ),
    "frozen": (
        {"size": "tiny", "frozen": "true"},
        (f"{SIZE}=tiny", "model.audio_encoder.frozen=true", "Set"),
    ),
    "adapters": (
        {"size": "tiny", "frozen": "true", "lora.r": 4},
        (f"{SIZE}=tiny", "model.audio_encoder.lora.r=4", "lora.r=0"),
    ),
    "unknown size": ({"size": "tinny"}, (f"{SIZE}=tinny", "whisper", "'tiny'")),
    "size of another encoder": (
        {"size": "tiny", "model_type": "zipformer"},
        (f"{SIZE}=tiny", "zipformer", "small"),
    ),
    "encoder without sizes": (
        {"size": "base", "model_type": "hf"},
        (f"{SIZE}=base", "model.audio_encoder.model_type='hf'", "whisper or zipformer"),
    ),
    "place instead of a name": (
        {"size": "base", "model_type": "openai/whisper-base"},
        (f"{SIZE}=base", "'openai/whisper-base'", "whisper or zipformer"),
    ),
    "fields without a size": (
        {"fields": "{d_model: 16}"},
        ("model.audio_encoder.fields={'d_model': 16}", SIZE, "Set the size"),
    ),
    "text as a field": (
        {"size": "tiny", "fields": "{d_model: wide}"},
        ("model.audio_encoder.fields", "d_model"),
    ),
    "left out of checkpoints": (
        {"size": "tiny", "exclude": "[audio_encoder]"},
        ("model.exclude_from_checkpoint=[audio_encoder]", "size=tiny", "Remove"),
    ),
    "warm start": (
        {"size": "tiny", "projector_init": "aligned"},
        (f"{SIZE}=tiny", "model.projector_init=aligned", "random"),
    ),
}


def overrides_of(world, tmp_path, changes):
    changes = {"model_type": "whisper", "pretrained_model": "null", "frozen": "false"} | changes
    more = {
        "model__exclude_from_checkpoint": changes.pop("exclude", "[]"),
        "model__projector_init": changes.pop("projector_init", "random"),
    }
    more |= {f"model__audio_encoder__{key}": value for key, value in changes.items()}
    return world.overrides(tmp_path / "exp", **more)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_setting_is_reported_before_anything_is_read(world, tmp_path, capsys, case):
    changes, texts = WRONG[case]
    overrides = overrides_of(world, tmp_path, changes)
    # which would be the error if it were read
    overrides.append("model.llm.pretrained_model=/does/not/exist")
    assert main(["train", *overrides]) == 2
    error = capsys.readouterr().err
    assert [text for text in texts if text not in error] == []
    assert "/does/not/exist" not in error
    assert not (tmp_path / "exp").exists()


@pytest.mark.parametrize(
    ("kind", "fields", "text"),
    [
        ("whisper", {"d_modell": 16}, "'d_model'"),
        ("whisper", {"encoder_layers": 0}, "fields.encoder_layers=0"),
        ("whisper", {"encoder_attention_heads": 7}, "encoder_attention_heads=7"),
        ("whisper", {"d_model": 2, "encoder_attention_heads": 1}, "d_model=2"),
        ("whisper", {"max_source_positions": 1 << 40}, "fields.max_source_positions"),
        ("zipformer", {"pos_dim": 3}, "pos_dim=3"),
        ("zipformer", {"encoder_dim": [16, 16]}, "6 values"),
        ("zipformer", {"feature_dim": 2}, "feature_dim"),
    ],
)
def test_wrong_field_is_reported(world, tmp_path, capsys, kind, fields, text):
    size = "small"
    changes = {"model_type": kind, "size": size, "fields": str(fields).replace("'", "")}
    assert main(["train", *overrides_of(world, tmp_path, changes)]) == 2
    error = capsys.readouterr().err
    assert "model.audio_encoder.fields" in error
    assert text in error


def test_encoder_that_is_frozen_by_patterns_is_reported(world, tmp_path, capsys):
    overrides = overrides_of(world, tmp_path, {"size": "tiny"})
    overrides.append("model.frozen_parameters=[audio_encoder.*]")
    assert main(["train", *overrides]) == 2
    assert "model.frozen_parameters=['audio_encoder.*']" in capsys.readouterr().err


def test_projector_is_not_fitted_to_random_frames(world, tmp_path, capsys):
    assert main(["warm-start", *overrides_of(world, tmp_path, {"size": "tiny"})]) == 2
    assert f"{SIZE}=tiny" in capsys.readouterr().err
