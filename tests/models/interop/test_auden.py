"""Directories of Auden's audio LLM, written here in the layout of its training."""

import json
import logging
import re
import shutil

import pytest
import torch
import transformers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import load_file, save_file

import asrllm
from asrllm.collator.chat import CHATML
from asrllm.errors import UserError
from asrllm.models.asr_llm.loading import load_model
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.auto import load_model_config
from asrllm.models.encoders.zipformer.modeling import ZipformerEncoder
from asrllm.models.interop.auden import AUDEN_KEYS, config_fields, from_auden_names
from asrllm.testing import TINY_ZIPFORMER, tiny_llm, tiny_tokenizer
from tests.models.asr_llm.test_modeling import samples

RATE, WIDTH = 4, 32  # of the tiny LLM
AUDEN_CHAT = """{% for message in messages -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor -%}
{% if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}"""


def auden_directory(
    world,
    folder,
    *,
    kind="whisper",
    left_out=("audio_encoder", "llm"),
    tags=False,
    name="pretrained.pt",
    tied=True,
):
    """Write a directory like those of Auden's training, with random weights."""
    folder.mkdir()
    llm_folder = tiny_llm(folder / "llm", tied=tied)
    llm = transformers.AutoModelForCausalLM.from_pretrained(llm_folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|AUDIO|>"]})
    tokenizer.chat_template = "{{ 'another' }}"
    tokenizer.save_pretrained(folder)
    if kind == "whisper":
        encoder = transformers.WhisperModel.from_pretrained(world.whisper).encoder
        encoder.save_pretrained(folder / "audio_encoder")
        encoder_config, encoder_width = encoder.config.to_dict(), 16
    else:
        shutil.copytree(world.zipformer, folder / "audio_encoder")
        encoder = ZipformerEncoder.from_pretrained(world.zipformer)
        encoder_config, encoder_width = (
            {"model_type": "zipformer", "warmup_batches": 4000.0, "dropout": None} | TINY_ZIPFORMER,
            24,
        )
    torch.manual_seed(1)
    state = {
        "encoder_projector.linear1.weight": torch.randn(WIDTH, encoder_width * RATE) * 0.1,
        "encoder_projector.linear1.bias": torch.randn(WIDTH) * 0.1,
        "encoder_projector.linear2.weight": torch.randn(WIDTH, WIDTH) * 0.1,
        "encoder_projector.linear2.bias": torch.randn(WIDTH) * 0.1,
    }
    if tags:
        state["audio_tag_embedding"] = torch.randn(2, WIDTH) * 0.1
    for part, module in (("audio_encoder", encoder), ("llm", llm)):
        if part not in left_out:
            state |= {
                f"{part}.{key}": tensor.clone() for key, tensor in module.state_dict().items()
            }
            shutil.rmtree(folder / part)
    config = {
        "model_type": "lalm",
        "audio_encoder_config": encoder_config,
        "llm_config": llm.config.to_dict(),
        "use_flash_attn": False,
        "audio_encoder_projector_ds_rate": RATE,
        "exclude_from_checkpoint": list(left_out),
        "tag_audio_boundary": tags,
        "audio_token": "<|AUDIO|>",
    }
    (folder / "config.json").write_text(json.dumps(config))
    if name.endswith(".pt"):
        torch.save({"state_dict": state} if tags else state, folder / name)
    else:
        save_file(state, folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("tags", [False, True])
@pytest.mark.parametrize("left_out", [("audio_encoder", "llm"), ("llm",), ()])
@pytest.mark.parametrize("kind", ["whisper", "zipformer"])
def test_directory_loads_as_the_same_model_in_our_format(world, tmp_path, kind, left_out, tags):
    folder = auden_directory(world, tmp_path / "auden", kind=kind, left_out=left_out, tags=tags)
    theirs = torch.load(folder / "pretrained.pt", weights_only=True)
    theirs = theirs.get("state_dict", theirs)
    model = asrllm.AutoModel.from_pretrained(folder)
    for key, ours in AUDEN_KEYS.items():
        assert (key in theirs) == (ours in model.weights())
        assert key not in theirs or torch.equal(model.weights()[ours], theirs[key])
    waves = [s.wave for s in samples(3)]
    chats = [model.processor.renderer.user_messages("Transcribe.")] * 3
    texts = model.generate(waves, chats, max_new_tokens=8)
    model.save_pretrained(tmp_path / "ours")
    shutil.rmtree(folder)
    assert (
        asrllm.AutoModel.from_pretrained(tmp_path / "ours").generate(waves, chats, max_new_tokens=8)
        == texts
    )
    by_hand = load_model(
        AsrLlmModel, tmp_path / "ours", load_file(tmp_path / "ours" / "model.safetensors")
    )
    assert by_hand.generate(waves, chats, max_new_tokens=8) == texts


@torch.no_grad()
@pytest.mark.parametrize("tags", [False, True])
def test_audio_embeddings_match_audens_arithmetic(world, tmp_path, tags):
    """Whisper of transformers, full stacks of frames, linear, ReLU, linear, boundary embeddings."""
    folder = auden_directory(world, tmp_path / "auden", tags=tags)
    model = asrllm.AutoModel.from_pretrained(folder)
    state = torch.load(folder / "pretrained.pt", weights_only=True)
    state = state.get("state_dict", state)
    features, lengths = model.audio_encoder.features(
        *model.processor.load_waves([samples(1)[0].wave])
    )
    encoder = transformers.WhisperModel.from_pretrained(world.whisper).encoder
    long = torch.nn.functional.pad(features, (0, 0, 0, 3000 - features.shape[1])).transpose(1, 2)
    x = torch.nn.functional.gelu(
        encoder.conv2(torch.nn.functional.gelu(encoder.conv1(long[..., : int(lengths)])))
    ).transpose(1, 2)
    x = x + encoder.embed_positions.weight[: x.shape[1]]
    for layer in encoder.layers:
        x = layer(x, None)
        x = x[0] if isinstance(x, tuple) else x
    x = encoder.layer_norm(x)
    assert x.shape[1] % RATE, "nothing would be dropped"
    x = x[:, : x.shape[1] // RATE * RATE].reshape(-1, RATE * x.shape[2])
    x = torch.relu(
        x @ state["encoder_projector.linear1.weight"].T + state["encoder_projector.linear1.bias"]
    )
    x = x @ state["encoder_projector.linear2.weight"].T + state["encoder_projector.linear2.bias"]
    if tags:
        x = torch.cat([state["audio_tag_embedding"][:1], x, state["audio_tag_embedding"][1:]])
    ours = model.encode(features, lengths)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)
    assert len(ours) == model.config.num_audio_tokens(len(samples(1)[0].wave))


def test_key_table_covers_the_projector_and_unknown_keys_are_rejected():
    state = {key: torch.zeros(i) for i, key in enumerate(AUDEN_KEYS)}
    assert {ours: len(tensor) for ours, tensor in from_auden_names(state, "x").items()} == {
        ours: i for i, ours in enumerate(AUDEN_KEYS.values())
    }
    assert from_auden_names(
        {f"module.{key}": tensor for key, tensor in state.items()}, "x"
    ).keys() == set(AUDEN_KEYS.values())
    with pytest.raises(UserError, match=r"'x'.* 'ctc_head' "):
        from_auden_names({"ctc_head": torch.zeros(1)}, "x")
    adapter = "llm.model.q_proj.lora_A.default.weight"
    with pytest.raises(UserError, match=re.escape(repr(adapter))):
        from_auden_names({adapter: torch.zeros(1)}, "x")


def test_describe_reads_the_configuration_without_weights(world, tmp_path, caplog, monkeypatch):
    folder = auden_directory(world, tmp_path / "auden")
    caplog.clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    config = asrllm.AutoModel.from_pretrained(folder).config
    assert not caplog.records
    assert load_model_config(folder).sample_limits() == config.sample_limits() == (160, 480159)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(fields | {"audio_encoder_projector_ds_rate": "4"})
    )
    with pytest.raises(
        UserError,
        match=r"config\.json': audio_encoder_projector_ds_rate='4' ",
    ):
        load_model_config(folder)


def test_chat_matches_audens(world, tmp_path):
    model = asrllm.AutoModel.from_pretrained(auden_directory(world, tmp_path / "auden"))
    assert model.processor.tokenizer.chat_template == CHATML
    chat = [{"role": "system", "content": "Hear."}, {"role": "user", "content": "<|AUDIO|> Write."}]
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True
    )  # as transformers renders
    expected = environment.from_string(AUDEN_CHAT).render(messages=chat, add_generation_prompt=True)
    ids = model.processor.renderer.encode_prompt(chat, [1])
    assert model.processor.tokenizer.decode(ids) == expected


@pytest.mark.parametrize("name", ["pretrained.safetensors", "model.safetensors", "model.pt"])
def test_every_name_of_the_weight_file_is_found(world, tmp_path, name):
    folder = auden_directory(world, tmp_path / "auden", name=name, tied=False)
    model = asrllm.AutoModel.from_pretrained(folder, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert (
        len(
            model.generate(
                [samples(1)[0].wave],
                [model.processor.renderer.user_messages("x")],
                max_new_tokens=3,
            )
        )
        == 1
    )
    (folder / name).rename(
        folder / "averaged-iter-8-avg-2.pt" if name.endswith(".pt") else folder / "x.safetensors"
    )
    with pytest.raises(
        UserError, match=rf"'{folder}' .*pretrained\.safetensors, .*model\.pt.*weights="
    ):
        asrllm.AutoModel.from_pretrained(folder)


def test_invalid_directories_are_rejected(world, tmp_path):
    folder = auden_directory(world, tmp_path / "auden")
    config = json.loads((folder / "config.json").read_text())
    whisper = config["audio_encoder_config"]
    for change, message in (
        ({"projector_type": "qformer"}, "'projector_type'"),
        ({"llm_config": None}, r"x/config\.json .*llm_config\."),
        ({"llm_config": {"model_type": "nothing"}}, "llm_config .*nothing"),
        (
            {"audio_encoder_config": whisper | {"activation_function": "relu"}},
            r"audio_encoder_config\.activation_function='relu' .*'gelu'",
        ),
        (
            {"audio_encoder_config": {"model_type": "hubert"}},
            r"audio_encoder_config\.model_type='hubert' .*'zipformer' .*'whisper'",
        ),
        (
            {
                "audio_encoder_config": {"model_type": "zipformer", "use_rope": True}
                | TINY_ZIPFORMER
            },
            r"audio_encoder_config\.use_rope ",
        ),
    ):
        with pytest.raises(UserError, match=message):
            config_fields(config | change, "x")
    shutil.copytree(folder / "llm", folder / "kept")
    (folder / "llm" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match=f"'{folder}/llm' .*'llama' .*llm_config .*'qwen2'"):
        asrllm.AutoModel.from_pretrained(folder)
    shutil.rmtree(folder / "llm")
    with pytest.raises(UserError, match=f"'{folder}': .*llm .*neither"):
        asrllm.AutoModel.from_pretrained(folder)
    (folder / "kept").rename(folder / "llm")
    state = torch.load(folder / "pretrained.pt", weights_only=True)
    torch.save(state | {"llm.x": torch.zeros(1)}, folder / "pretrained.pt")
    with pytest.raises(UserError, match=f"'{folder}': .*llm .*both"):
        asrllm.AutoModel.from_pretrained(folder)
    state.pop("encoder_projector.linear1.bias")
    torch.save(state, folder / "pretrained.pt")
    with pytest.raises(UserError, match=rf"'{folder}' .* 1 .*'projector\.mlp\.linear1\.bias'"):
        asrllm.AutoModel.from_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(UserError, match=rf"'{folder}' .*'<\|AUDIO\|>'"):
        asrllm.AutoModel.from_pretrained(folder)


def test_tied_head_that_differs_is_rejected(world, tmp_path):
    folder = auden_directory(world, tmp_path / "auden", left_out=("audio_encoder",))
    state = torch.load(folder / "pretrained.pt", weights_only=True)
    state["llm.lm_head.weight"] += 1
    torch.save(state, folder / "pretrained.pt")
    with pytest.raises(UserError, match=r"'llm\.lm_head\.weight' .*tie_word_embeddings"):
        asrllm.AutoModel.from_pretrained(folder)
