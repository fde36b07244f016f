"""Weights of icefall's ASR_LLM: the key table, and parity of the imported model."""

import errno
import os

import pytest
import torch

from asrllm import AutoModel
from asrllm.commands.dispatch import main
from asrllm.errors import UserError
from asrllm.models.interop.icefall import ICEFALL_KEYS, from_icefall_names, import_icefall
from tests.models.asr_llm.test_modeling import make_model, samples
from tests.models.asr_llm.test_serialization import logits

PROJECTOR = ["linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias"]


@pytest.fixture
def theirs(world, tmp_path):
    """Return a model, and its trained weights by icefall's names."""
    model = make_model(world, audio_token="<speech>", llm={"chat_template": "chatml"})
    back = {ours: name for name, ours in ICEFALL_KEYS.items()}
    state = {
        back.get(n, n): t
        for n, t in model.weights().items()
        if n.startswith("projector") or "lora_" in n
    }
    positions = model.weights()["audio_encoder.embed_positions.weight"]
    torch.save(state | {"encoder.positional_embedding": positions}, tmp_path / "pytorch_model.bin")
    return model, tmp_path / "pytorch_model.bin"


def test_key_table_and_unknown_keys():
    adapter = "llm.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    state = {f"encoder_projector.{name}": torch.zeros(1) for name in PROJECTOR} | {
        adapter: torch.zeros(1)
    }
    state |= {
        "encoder.blocks.3.attn.query.weight": torch.zeros(1),
        "encoder.conv1.bias": torch.zeros(1),
    }
    assert sorted(from_icefall_names(state, "x")) == sorted(
        [f"projector.mlp.{name}" for name in PROJECTOR]
        + [adapter, "audio_encoder.layers.3.self_attn.q_proj.weight", "audio_encoder.conv1.bias"]
    )
    assert (
        from_icefall_names({f"module.{name}": tensor for name, tensor in state.items()}, "x").keys()
        == from_icefall_names(state, "x").keys()
    )
    with pytest.raises(UserError, match=r"'ctc\.weight'"):
        from_icefall_names(state | {"ctc.weight": torch.zeros(1)}, "x")
    state.pop("encoder_projector.linear2.bias")
    with pytest.raises(UserError, match=r"'projector\.mlp\.linear2\.bias'"):
        from_icefall_names(state, "x")


def test_imported_model_computes_the_same(world, theirs, tmp_path):
    model, file = theirs
    arguments = [
        "--audio-encoder",
        str(world.whisper),
        "--llm",
        str(world.llm),
        "--lora-alpha",
        "8",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(["import-icefall", str(file), *arguments]) == 0
    found = AutoModel.from_pretrained(tmp_path / "out", dtype="float32")
    assert (found.config.lora["r"], found.config.lora["target_modules"]) == (
        4,
        ["q_proj", "v_proj"],
    )
    assert (found.config.audio_encoder_projector_ds_rate, found.config.projector_hidden_size) == (
        4,
        32,
    )
    assert (found.config.drop_ragged_frames, found.config.prompts) == (True, ["请转写音频为文字"])
    for name, tensor in model.weights().items():
        assert torch.equal(found.weights()[name], tensor), name
    model.config.drop_ragged_frames = model.projector.drop_ragged = True
    torch.testing.assert_close(logits(found), logits(model))
    assert isinstance(found.transcribe([samples(1)[0].wave], max_new_tokens=3)[0], str)


def test_full_disk_is_reported(world, theirs, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("asrllm.tensor_files._bytes_of", full)
    arguments = [
        "--audio-encoder",
        str(world.whisper),
        "--llm",
        str(world.llm),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(["import-icefall", str(theirs[1]), *arguments]) == 2
    assert os.strerror(errno.ENOSPC) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_encoder_is_rejected(world, theirs, tmp_path):
    _, file = theirs
    state = torch.load(file, weights_only=True)
    state["encoder_projector.linear1.weight"] = state["encoder_projector.linear1.weight"][
        :, :-1
    ].clone()
    torch.save(state, file)
    with pytest.raises(UserError, match=r" 63, .* 16, "):
        import_icefall(file, tmp_path / "out", encoder=str(world.whisper), llm=str(world.llm))
    assert not (tmp_path / "out").exists()


def one_row_less(state):
    name = next(name for name in state if "lora_B" in name)
    state[name] = state[name][:31].clone()


HARMS = {
    "a factor of other rows": (
        one_row_less,
        r"lora_B.*\(31, 4\).*\(32, 4\)",
    ),
    "a layer more": (
        lambda state: state.update({k.replace(".1.", ".77."): t for k, t in state.items()}),
        r"'llm\..*layers\.77\.",
    ),
    "a layer without": (
        lambda state: state.pop(next(k for k in state if "layers.1" in k and "lora_A" in k)),
        r" 1 .*'llm\..*layers\.1\..*lora_A",
    ),
    "part of an encoder": (
        lambda state: state.update({"encoder.conv1.bias": torch.zeros(16)}),
        r" \d+ .*'audio_encoder\.",
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_weights_that_do_not_fit_are_rejected(world, theirs, tmp_path, harm):
    _, file = theirs
    state = torch.load(file, weights_only=True)
    HARMS[harm][0](state)
    torch.save(state, file)
    with pytest.raises(UserError, match=HARMS[harm][1]):
        import_icefall(file, tmp_path / "out", encoder=str(world.whisper), llm=str(world.llm))
    assert not (tmp_path / "out").exists()
