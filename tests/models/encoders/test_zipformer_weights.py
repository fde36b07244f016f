"""Encoders in the files of icefall and Auden."""

import argparse
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from asrllm.errors import CorruptedError, UserError
from asrllm.models.encoders.zipformer.configuration import PUBLIC_SIZES, ZipformerConfig
from asrllm.models.encoders.zipformer.modeling import PRETRAINED_BATCHES, ZipformerEncoder
from asrllm.models.encoders.zipformer.weights import fields_of_shapes
from asrllm.models.fingerprint import fingerprint
from asrllm.testing import TINY_ZIPFORMER


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return ZipformerEncoder(ZipformerConfig(**TINY_ZIPFORMER)).eval()


def published(encoder, prefix=""):
    """Return a state dict like the published code's, with unused parameters and other modules."""
    state = dict(encoder.state_dict())
    for name in [name for name in state if name.endswith("layers.0.bypass.bypass_scale")]:
        state[name.replace("bypass.bypass_scale", "bypass_scale")] = torch.full_like(
            state[name], 9.0
        )
    state |= {"encoder_embed.batch_count": torch.tensor(3.0)} if prefix == "bad." else {}
    return {prefix + name: tensor for name, tensor in state.items()} | {
        "decoder.weight": torch.ones(2),
        "model_batch_count": torch.tensor(7),
    }


def assert_same(path, encoder):
    loaded = ZipformerEncoder.from_pretrained(path)
    assert not loaded.training
    for name, tensor in encoder.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, atol=0, rtol=0)
    x, lengths = torch.randn(1, 60, 80), torch.tensor([60])
    with torch.no_grad():
        assert torch.equal(loaded(x, lengths)[0], encoder(x, lengths)[0])
    return loaded


@pytest.mark.slow
@pytest.mark.parametrize("container", [None, "model", "model_avg", "state_dict"])
@pytest.mark.parametrize(
    "prefix",
    ["", "encoder.", "audio_encoder.", "module.", "module.encoder.", "model.audio_encoder."],
)
def test_encoder_is_found_below_every_prefix_and_container(encoder, tmp_path, prefix, container):
    state = published(encoder, prefix)
    if container == "model_avg":
        state = {name: tensor.double() for name, tensor in state.items()}
    torch.save(
        {container: state, "epoch": 3, "optimizer": {"state": []}} if container else state,
        tmp_path / "pretrained.pt",
    )
    assert_same(tmp_path / "pretrained.pt", encoder)


def test_configuration_must_agree_with_the_weights(encoder, tmp_path):
    save_file(published(encoder, "encoder."), tmp_path / "model.safetensors")
    fields = TINY_ZIPFORMER | {
        "pos_head_dim": [4],
        "chunk_size": [16, 32, 64, -1],
        "left_context_frames": [64, -1],
        "dropout": 0.1,
    }
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "asr", "encoder_config": fields})
    )
    loaded = assert_same(tmp_path, encoder)
    assert loaded.config.encoder_unmasked_dim == (8, 16)
    fields, state = ZipformerEncoder.read_pretrained(str(tmp_path))
    assert (
        ZipformerEncoder.from_fields(json.loads(json.dumps(fields)), pad_to_30s=False)
        .load_state_dict(state)
        .missing_keys
        == []
    )
    wrong = TINY_ZIPFORMER | {"num_heads": [4, 4]}
    (tmp_path / "config.json").write_text(json.dumps(wrong))
    with pytest.raises(
        UserError,
        match=rf"'{tmp_path}/config\.json' .*num_heads=\[4, 4\].* \[2, 4\]",
    ):
        ZipformerEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (json.dumps([TINY_ZIPFORMER]), "config.json"),
        (json.dumps(TINY_ZIPFORMER | {"pos_head_dims": 4}), "pos_head_dims"),
        (json.dumps(TINY_ZIPFORMER | {"chunk_size": "16,32"}), "chunk_size='16,32'"),
        (json.dumps(TINY_ZIPFORMER | {"num_heads": []}), "num_heads"),
        (json.dumps(TINY_ZIPFORMER | {"pos_dim": None}), "pos_dim=None"),
        (json.dumps(TINY_ZIPFORMER | {"pos_head_dim": 0}), "pos_head_dim=0"),
    ],
)
def test_wrong_field_is_reported_with_its_file(encoder, tmp_path, content, named):
    save_file(published(encoder), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as error:
        ZipformerEncoder.from_pretrained(tmp_path)
    assert named in str(error.value)
    assert str(tmp_path / "config.json") in str(error.value)


def test_adapters_are_not_loaded_as_an_encoder(encoder, tmp_path):
    save_file(published(encoder), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    with pytest.raises(UserError, match=r"'base'"):
        ZipformerEncoder.from_pretrained(tmp_path)


def test_head_widths_other_than_icefalls_are_read_from_the_configuration(tmp_path):
    encoder = ZipformerEncoder(ZipformerConfig(**TINY_ZIPFORMER | {"pos_head_dim": [2, 6]})).eval()
    save_file(published(encoder), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"encoder_dim": [16, 24], "pos_head_dim": [2, 6]})
    )
    assert_same(tmp_path, encoder)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", PUBLIC_SIZES)
def test_shapes_determine_the_published_configurations(size, causal):
    chunks = (
        {"chunk_size": [16, 32, 64, -1], "left_context_frames": [64, 128, 256, -1]}
        if causal
        else {}
    )
    config = ZipformerConfig.public(size, causal=causal, **chunks)
    with torch.device("meta"):
        state = ZipformerEncoder(config).state_dict()
    assert ZipformerConfig(**fields_of_shapes(state, {}, Path("config.json"))) == config


def test_fine_tuning_starts_at_the_ends_of_the_schedules(encoder, tmp_path):
    torch.save(published(encoder), tmp_path / "a.pt")
    loaded = ZipformerEncoder.from_pretrained(tmp_path / "a.pt")
    counts = {module.batch_count for module in loaded.modules() if hasattr(module, "batch_count")}
    assert counts == {PRETRAINED_BATCHES} == {100_000}
    loaded.set_batch_count(5000)
    assert loaded.encoder_embed.batch_count == 105_000
    assert type(loaded.encoder_embed.batch_count) is int
    assert not any("batch_count" in name for name in loaded.state_dict())


def test_loading_is_strict(encoder):
    state = encoder.state_dict()
    del state["encoder.downsample_output.bias"]
    with pytest.raises(RuntimeError, match=r"\"encoder\.downsample_output\.bias\""):
        encoder.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"\"encoder\.encoders\.0\.layers\.0\.other\""):
        encoder.load_state_dict(
            encoder.state_dict() | {"encoder.encoders.0.layers.0.other": torch.ones(1)}
        )


def test_code_in_a_file_is_never_executed(encoder, tmp_path):
    ran = tmp_path / "ran"

    class Harm:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    torch.save({"model": published(encoder), "sampler": Harm()}, tmp_path / "harm.pt")
    with pytest.raises(UserError, match=r"harm\.pt' .*state dict.*torch\.save"):
        ZipformerEncoder.from_pretrained(tmp_path / "harm.pt")
    torch.save(
        {"model": published(encoder), "params": argparse.Namespace(a=1)}, tmp_path / "params.pt"
    )
    with pytest.raises(UserError, match=r"params\.pt' .*state dict.*torch\.save"):
        ZipformerEncoder.from_pretrained(tmp_path / "params.pt")
    assert not ran.exists()


def test_files_without_an_encoder_are_rejected(encoder, tmp_path):
    def rejected(*names, path=tmp_path, error=UserError):
        with pytest.raises(error) as caught:
            ZipformerEncoder.from_pretrained(path)
        for name in names:
            assert name in str(caught.value)

    rejected(repr(str(tmp_path)), "*.safetensors", "pretrained.pt", "*.pth")
    file = tmp_path / "a.pt"
    torch.save({"decoder.weight": torch.ones(2)}, file)
    rejected("'encoder_embed.conv.0.weight'", "model.audio_encoder.pretrained_model")
    torch.save([1, 2], file)
    rejected(repr(str(file)), "state dict")
    file.write_bytes(b"junk")
    rejected(repr(str(file)), error=CorruptedError)
    file.write_bytes(pickle.dumps({"model": 1}, protocol=2))
    rejected(repr(str(file)), "torch.save")
    torch.save(published(encoder, "a.") | published(encoder, "b."), file)
    rejected(" 2 ", "'a.', 'b.'")
    broken = {
        name: tensor for name, tensor in published(encoder).items() if "linear_pos" not in name
    }
    torch.save(broken, file)
    rejected(
        repr(str(tmp_path)), "'encoder.encoders.0.layers.0.self_attn_weights.linear_pos.weight'"
    )
    torch.save(published(encoder), tmp_path / "b.pt")
    rejected(repr(str(tmp_path)), " 2 ", "a.pt")
    (tmp_path / "config.json").write_text("{")
    rejected(f"{tmp_path / 'config.json'}:1:2 ", path=tmp_path / "b.pt")
    with pytest.raises(
        UserError, match=r"data\.pad_to_30s=true .*zipformer.*data\.pad_to_30s=false"
    ):
        ZipformerEncoder.from_fields(TINY_ZIPFORMER, pad_to_30s=True)


def test_single_file_has_a_fingerprint(encoder, tmp_path):
    torch.save(published(encoder), tmp_path / "a.pt")
    assert fingerprint(tmp_path / "a.pt") == fingerprint(tmp_path)
