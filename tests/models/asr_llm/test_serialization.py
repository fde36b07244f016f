"""Directories that save_pretrained writes: complete, merged, sharded and damaged ones."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import asrllm
from asrllm.commands.dispatch import main
from asrllm.errors import CorruptedError, UserError
from asrllm.integrity import CHECKSUMS
from asrllm.models.asr_llm.loading import load_model, rank_multiple
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.asr_llm.placement import as_dtype
from asrllm.models.asr_llm.weight_files import read_tensors, weight_files
from asrllm.models.auto import load_model_config, read_state
from asrllm.models.build import build_model, build_processor
from asrllm.models.encoders.registry import build_encoder
from asrllm.models.meta_device import parameters_on_meta
from asrllm.models.pretrained import empty_llm, pretrained_llm
from asrllm.testing import TINY_ZIPFORMER, tiny_llm, tiny_tokenizer, tiny_whisper
from tests.models.asr_llm.test_modeling import make_config, make_model, samples

SIZE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "llama": {},
    "mistral": {},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
}


def family_llm(folder, family, *, tied=True):
    """Write a directory of a tiny LLM of another family than tiny_llm's, with random weights."""
    tokenizer = tiny_tokenizer()
    ids = {
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    fields = (
        SIZE
        | FAMILIES[family]
        | ids
        | {"vocab_size": len(tokenizer), "tie_word_embeddings": tied, "initializer_range": 0.2}
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **fields)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def lora_model(world, **options):
    """Return a model whose LoraConfig has options that the run's configuration does not support."""
    processor = build_processor(make_config(world), pad_to_30s=False, prompts=("Transcribe.",))
    processor.config.lora |= options
    torch.manual_seed(0)
    model = build_model(processor, frozen=("audio_encoder", "llm"), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_magnitude" in name:
            torch.nn.init.uniform_(parameter, 0.1, 0.5)
    return model.eval()


@torch.no_grad()
def logits(model):
    """Return the LLM's logits for an utterance and a few tokens."""
    if model.config.llm["model_type"] == "gemma2":
        model.llm.set_attn_implementation("eager")  # no other attention here supports its soft cap
    features, lengths = model.audio_encoder.features(
        *model.processor.load_waves([samples(1)[0].wave])
    )
    audio = model.encode(features, lengths)
    ids = torch.tensor([[3, 5] + [model.config.audio_token_id] * len(audio) + [7, 9]])
    return model.llm(
        inputs_embeds=model.embed(ids, audio), attention_mask=torch.ones_like(ids)
    ).logits


def test_weights_may_contain_a_tied_head_twice(world, tmp_path):
    model = make_model(world, frozen=("audio_encoder",), llm={"frozen": False, "lora": None})
    model.require_processor().save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    state = {
        name: tensor
        for name, tensor in model.weights().items()
        if not name.startswith("audio_encoder.")
    }
    twice = state | {
        "llm.lm_head.weight": state["llm.model.embed_tokens.weight"].clone()
    }  # as in the files of DeepSpeed's converter
    found = load_model(AsrLlmModel, tmp_path, twice)
    torch.testing.assert_close(logits(found), logits(model))
    twice["llm.lm_head.weight"] += 1
    with pytest.raises(
        UserError, match=r"'llm\.lm_head\.weight' .*'llm\.model\.embed_tokens\.weight'"
    ):
        load_model(AsrLlmModel, tmp_path, twice)


def assert_same_buffers(model, other):
    theirs = dict(other.named_buffers())
    assert {name for name, _ in model.named_buffers()} == theirs.keys()
    for name, buffer in model.named_buffers():
        assert buffer.dtype == theirs[name].dtype, name
        assert torch.equal(buffer, theirs[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_llm_family_is_saved_and_loaded_bitwise(world, tmp_path, family, tied):
    llm = family_llm(tmp_path / "llm", family, tied=tied)
    model = make_model(world, llm={"model_type": family, "pretrained_model": str(llm)})
    model.save_pretrained(tmp_path / "saved")
    ordinary = AsrLlmModel(model.config)
    shutil.rmtree(llm)
    for dtype in (None, "float32", "auto"):
        loaded = AsrLlmModel.from_pretrained(tmp_path / "saved", dtype=dtype)
        assert torch.equal(logits(loaded), logits(model))
        assert_same_buffers(loaded, ordinary)
    assert (
        loaded.llm.get_output_embeddings().weight is loaded.llm.get_input_embeddings().weight
    ) == tied
    assert any("lora_A" in name and p.requires_grad for name, p in loaded.named_parameters())
    low = AsrLlmModel.from_pretrained(tmp_path / "saved", dtype="bfloat16")
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    theirs = transformers.AutoModelForCausalLM.from_config(
        low.llm.get_base_model().config, dtype=torch.bfloat16
    )
    assert_same_buffers(low.llm.get_base_model(), theirs)
    model.save_pretrained(tmp_path / "merged", merge_adapter=True)
    merged = AsrLlmModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fields", [{"model_type": "whisper"}, {"model_type": "zipformer"} | TINY_ZIPFORMER]
)
def test_encoder_built_on_meta_matches_the_ordinary_one(fields):
    if fields["model_type"] == "whisper":
        fields |= {
            "num_mel_bins": 80,
            "d_model": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
        }
    ordinary = build_encoder(fields, pad_to_30s=False).eval()
    with parameters_on_meta():
        empty = build_encoder(fields, pad_to_30s=False).eval()
    assert all(p.is_meta for p in empty.parameters())
    assert [n for n, _ in empty.named_parameters()] == [n for n, _ in ordinary.named_parameters()]
    empty.load_state_dict(ordinary.state_dict(), assign=True)
    assert_same_buffers(empty, ordinary)
    waves, lengths = torch.randn(2, 8000), torch.tensor([8000, 7000])
    with torch.no_grad():
        assert torch.equal(
            empty(*empty.features(waves, lengths))[0],
            ordinary(*ordinary.features(waves, lengths))[0],
        )
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_llm_built_on_meta_keeps_tied_weights_and_generation_config(world):
    fields = transformers.AutoConfig.from_pretrained(world.llm).to_dict()
    with parameters_on_meta():
        llm = empty_llm(fields)
    assert llm.lm_head.weight is llm.model.embed_tokens.weight
    assert llm.lm_head.weight.is_meta


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}]
)
def test_merging_does_not_change_the_model_and_writes_a_plain_one(world, tmp_path, options):
    model = lora_model(
        world,
        target_modules=["q_proj", "v_proj", "down_proj"]
        if "lora_bias" not in options
        else ["q_proj"],
        **options,
    )
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    model.save_pretrained(tmp_path / "merged", merge_adapter=True)
    assert model.config.to_dict() == config
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    merged = asrllm.AutoModel.from_pretrained(tmp_path / "merged")
    assert merged.config.lora is None
    assert merged.config.base_models is None
    plain = transformers.AutoModelForCausalLM.from_pretrained(world.llm)
    assert merged.llm.state_dict().keys() == plain.state_dict().keys()
    assert not torch.equal(
        merged.llm.model.layers[0].self_attn.q_proj.weight,
        plain.model.layers[0].self_attn.q_proj.weight,
    )
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "beside")
    assert torch.equal(logits(asrllm.AutoModel.from_pretrained(tmp_path / "beside")), logits(model))


@pytest.mark.filterwarnings("ignore:.lora_bias=True")
def test_adapter_bias_without_a_layer_bias_is_rejected(world, tmp_path):
    options = {"lora_bias": True, "target_modules": ["q_proj", "down_proj"]}
    with pytest.raises(
        UserError,
        match=r"model\.llm\.lora\.options\.lora_bias=true, "
        r".*'llm\..*layers\.0\.mlp\.down_proj' .*target_modules",
    ):
        lora_model(world, **options)
    config = make_model(world).config
    config.lora |= options
    with pytest.raises(UserError, match=r"'llm\..*layers\.0\.mlp\.down_proj' .*lora_bias"):
        AsrLlmModel(config).save_pretrained(tmp_path / "merged", merge_adapter=True)


def test_rank_multiple_is_read_from_adapters_of_embeddings():
    key = "llm.base_model.model.model.embed_tokens.lora_embedding_A.default"
    model = SimpleNamespace(weights=lambda: {key: torch.zeros(2, 11)})
    assert rank_multiple(model, {key: torch.zeros(6, 11)}) == 3


@pytest.mark.slow
def test_adapters_of_the_encoder_are_merged(world, tmp_path):
    from peft import LoraConfig, get_peft_model, inject_adapter_in_model

    options = LoraConfig(r=2, target_modules=["q_proj", "out_proj"], init_lora_weights=False)
    for wrap in (
        get_peft_model,
        lambda encoder, options: inject_adapter_in_model(options, encoder),
    ):
        model = make_model(world)
        model.audio_encoder = wrap(model.audio_encoder, options)
        model.save_pretrained(tmp_path, merge_adapter=True)
        torch.testing.assert_close(
            logits(asrllm.AutoModel.from_pretrained(tmp_path)), logits(model), rtol=1e-4, atol=1e-4
        )


def test_merging_is_rejected_without_adapters_and_with_excluded_parts(world, tmp_path):
    model = make_model(world, exclude_from_checkpoint=["audio_encoder"])
    model.save_pretrained(tmp_path / "saved", merge_adapter=True)
    loaded = asrllm.AutoModel.from_pretrained(tmp_path / "saved")
    assert loaded.config.base_models.keys() == {"audio_encoder"}
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"^merge_adapter=True, .*adapters"):
        loaded.save_pretrained(tmp_path / "again", merge_adapter=True)
    model.config.exclude_from_checkpoint = ["llm"]
    with pytest.raises(UserError, match=r" llm, .*exclude_from_checkpoint"):
        model.save_pretrained(tmp_path / "again", merge_adapter=True)
    assert not (tmp_path / "again").exists()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")  # PEFT warns of it
def test_adapter_of_tied_embeddings_is_not_merged(world, tmp_path):
    model = lora_model(world, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(UserError, match=r"embeddings .*head"):
        model.save_pretrained(tmp_path / "merged", merge_adapter=True)
    assert not (tmp_path / "merged").exists()


def test_merged_weights_are_rounded_once(world, tmp_path):
    """The merged weight of a bfloat16 model is the sum in float32, rounded."""
    model = lora_model(world, target_modules=["q_proj"]).bfloat16()
    layer = model.causal_lm.model.layers[0].self_attn.q_proj
    a, b, base = (
        x.weight.detach().float()
        for x in (layer.lora_A["default"], layer.lora_B["default"], layer.base_layer)
    )
    model.save_pretrained(tmp_path, merge_adapter=True)
    merged = load_file(tmp_path / "model.safetensors")["llm.model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(merged, (base + layer.scaling["default"] * b @ a).bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("model.layers.0.mlp.up_proj.weight"),
            r" 1 .*'model\.layers\.0\.mlp\.up_proj\.weight'",
        ),
        (
            lambda s: s.update({"model.extra": torch.zeros(1)}),
            r" 1 .*'model\.extra'",
        ),
        (
            lambda s: s.update({"model.norm.weight": torch.zeros(3)}),
            r" 1 .*'model\.norm\.weight'",
        ),
        (None, r"/llm/model\.safetensors' .*header"),
    ],
)
def test_damaged_base_llm_is_reported(world, tmp_path, change, message):
    folder = shutil.copytree(world.llm, tmp_path / "llm")
    state = load_file(folder / "model.safetensors")
    if change:
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:900]
        )
    with pytest.raises(UserError, match=message):
        make_model(world, llm={"pretrained_model": str(folder)})


def test_chat_tokens_beyond_the_vocabulary_are_reported(world, tmp_path):
    folder = shutil.copytree(world.llm, tmp_path / "llm")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 2}))
    with pytest.raises(UserError, match=rf"'{folder}' has 2 .*'u' \(\d+\)"):
        make_model(world, llm={"pretrained_model": str(folder)})


def test_merge_lora_command(world, tmp_path, capsys):
    model = make_model(world)
    model.save_pretrained(tmp_path / "saved")
    assert (
        main(
            [
                "export",
                str(tmp_path / "saved"),
                "--output",
                str(tmp_path / "out"),
                "--dtype",
                "float32",
            ]
        )
        == 0
    )
    assert str(tmp_path / "out") in capsys.readouterr().out
    assert not any("lora_" in key for key in load_file(tmp_path / "out" / "model.safetensors"))
    torch.testing.assert_close(
        logits(asrllm.AutoModel.from_pretrained(tmp_path / "out")),
        logits(model),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.slow
def test_saving_again_removes_the_earlier_files(world, tmp_path):
    model, folder = make_model(world), tmp_path / "saved"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    for size, files in (("5GB", 1), ("20KB", None), ("40KB", None), ("5GB", 1), ("20KB", None)):
        torch.nn.init.normal_(model.projector.mlp.linear1.bias)
        model.save_pretrained(folder, max_shard_size=size)
        shards = sorted(file.name for file in folder.glob("*.safetensors"))
        assert len(shards) == files if files else len(shards) > 2
        index = folder / "model.safetensors.index.json"
        assert index.exists() == (files is None)
        if files is None:
            assert sorted(set(json.loads(index.read_text())["weight_map"].values())) == shards
        assert torch.equal(logits(asrllm.AutoModel.from_pretrained(folder)), logits(model))
    assert (folder / "README.md").read_text() == "mine"
    assert not list(folder.glob(".saving*"))


def test_failed_save_keeps_the_existing_files(world, tmp_path, monkeypatch):
    model = make_model(world)
    model.save_pretrained(tmp_path / "saved")
    expected = logits(model)
    torch.nn.init.normal_(model.projector.mlp.linear1.bias)
    monkeypatch.setattr(
        "asrllm.models.asr_llm.saving.write_sharded",
        lambda *_, **__: (_ for _ in ()).throw(OSError("No space left on device")),
    )
    for folder in (tmp_path / "saved", tmp_path / "new"):
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(folder)
    assert torch.equal(logits(asrllm.AutoModel.from_pretrained(tmp_path / "saved")), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"'{tmp_path}/file'"):
        model.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""


def test_model_may_be_saved_to_the_directory_it_was_loaded_from(world, tmp_path):
    make_model(world).save_pretrained(tmp_path)
    model = asrllm.AutoModel.from_pretrained(tmp_path)
    expected = logits(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(asrllm.AutoModel.from_pretrained(tmp_path)), expected)


def test_hub_id_is_loaded_like_a_directory(world, tmp_path, monkeypatch):
    make_model(world).save_pretrained(tmp_path / "snapshot")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, **_: asked.append(name) or str(tmp_path / "snapshot"),
    )
    assert asrllm.AutoModel.from_pretrained("me/model").config.lora["r"] == 4
    assert load_model_config("me/model").lora["r"] == 4
    assert asked == ["me/model"] * 2
    for path in ("nowhere", "./a/b", "/no/where"):
        with pytest.raises(UserError, match=rf"'{Path(path)}'"):
            asrllm.AutoModel.from_pretrained(path)


def test_features_and_generation_config_are_saved_and_loaded(world, tmp_path):
    wide = tiny_whisper(tmp_path / "wide", num_mel_bins=128)
    encoder = make_config(world).audio_encoder
    model = make_model(
        world,
        audio_encoder=type(encoder)(model_type="whisper", pretrained_model=str(wide), frozen=True),
    )
    model.llm.generation_config.renormalize_logits = True
    model.save_pretrained(tmp_path / "saved")
    loaded = asrllm.AutoModel.from_pretrained(tmp_path / "saved")
    waves = loaded.processor.load_waves([samples(1)[0].wave])
    assert loaded.audio_encoder.features(*waves)[0].shape[2] == 128
    assert loaded.llm.generation_config.renormalize_logits is True
    assert loaded.transcribe([samples(1)[0].wave], max_new_tokens=5) == model.transcribe(
        [samples(1)[0].wave], max_new_tokens=5
    )


def test_invalid_generation_config_is_reported(world, tmp_path):
    model = make_model(world)
    model.llm.generation_config.temperature = 0.5
    with pytest.raises(UserError, match=r"GenerationConfig .*`temperature`"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.slow
def test_auto_classes_in_a_new_process_need_only_the_directory(world, tmp_path):
    whisper, llm = tiny_whisper(tmp_path / "whisper"), tiny_llm(tmp_path / "llm")
    encoder = type(make_config(world).audio_encoder)(
        model_type="whisper", pretrained_model=str(whisper), frozen=True
    )
    model = make_model(world, audio_encoder=encoder, llm={"pretrained_model": str(llm)})
    model.save_pretrained(tmp_path / "saved")
    text = model.transcribe([samples(1)[0].wave], max_new_tokens=8)[0]
    shutil.rmtree(whisper)
    shutil.rmtree(llm)
    program = f"""
import transformers, torch
from asrllm import AutoModel  # registers the classes with transformers
from asrllm.testing import tone_sentences
folder = {str(tmp_path / "saved")!r}
wave = tone_sentences(4)[0][1]
assert transformers.AutoConfig.from_pretrained(folder).audio_token == "<|AUDIO|>"
assert "<|AUDIO|>" in transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
assert transformers.AutoProcessor.from_pretrained(folder).default_prompt == "Transcribe."
assert transformers.AutoModel.from_pretrained(folder, dtype="bfloat16").dtype == torch.bfloat16
model = transformers.AutoModel.from_pretrained(folder)
print(model.transcribe([wave], max_new_tokens=8)[0], end="")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == text


def damage_index(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def set_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


DROPPED = object()


def set_part(folder, part, **values):
    fields = json.loads((folder / "config.json").read_text())[part] | values
    set_config(
        folder, **{part: {key: value for key, value in fields.items() if value is not DROPPED}}
    )


DAMAGES = {
    "truncated": (truncate, r"/model\.safetensors' .*header"),
    "no tensors at all": (
        lambda f: (f / "model.safetensors").write_bytes(b"x" * 50),
        r"/model\.safetensors' .*header",
    ),
    "a lost shard": (
        damage_index,
        r" model-00002-of-00002\.safetensors, .*model\.safetensors\.index\.json",
    ),
    "two saves": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        r"both model\.safetensors .*model\.safetensors\.index\.json",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
        r"neither model\.safetensors .*model\.safetensors\.index\.json",
    ),
    "another kind": (
        lambda f: set_config(f, model_type="qwen2"),
        "'qwen2' .*'asrllm'",
    ),
    "no json": (lambda f: (f / "config.json").write_text("{"), r"/config\.json:1:2 "),
    "no object": (lambda f: (f / "config.json").write_text("[]"), r"/config\.json' .*JSON"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json, "),
    "no tokenizer settings": (
        lambda f: (f / "tokenizer_config.json").unlink(),
        r" tokenizer_config\.json",
    ),
    "another tokenizer": (
        lambda f: set_config(f, audio_token_id=7),
        r" \d+ .*'<\|AUDIO\|>', .*config\.json .* 7\.",
    ),
    "no generation settings": (
        lambda f: (f / "generation_config.json").write_text("{"),
        r"/generation_config\.json:1:2 ",
    ),
    "no encoder": (
        lambda f: set_config(f, audio_encoder=None),
        r"config\.json': audio_encoder\.model_type=None .*whisper, ",
    ),
    "an encoder's field too many": (
        lambda f: set_part(f, "audio_encoder", extra=1),
        r"config\.json': audio_encoder .* whisper: .*'extra'",
    ),
    "an encoder's field lost": (
        lambda f: set_part(f, "audio_encoder", d_model=DROPPED),
        r"audio_encoder .* whisper: .*d_model",
    ),
    "an encoder's text": (
        lambda f: set_part(f, "audio_encoder", d_model="16"),
        r"config\.json': audio_encoder\.d_model='16' ",
    ),
    "an LLM of no type": (
        lambda f: set_part(f, "llm", model_type="qwen99"),
        r"config\.json': llm\.model_type='qwen99' .*transformers",
    ),
    "an LLM that writes nothing": (
        lambda f: set_part(f, "llm", model_type="vit"),
        r"config\.json': llm\.model_type='vit' ",
    ),
    "an LLM's text": (
        lambda f: set_part(f, "llm", hidden_size="x"),
        r"config\.json': llm\.hidden_size='x' ",
    ),
    "no LLM": (lambda f: set_config(f, llm=None), r"llm\.model_type=None"),
    "a rate in words": (
        lambda f: set_config(f, audio_encoder_projector_ds_rate="4"),
        r"json': audio_encoder_projector_ds_rate='4'",
    ),
    "no rate": (
        lambda f: set_config(f, audio_encoder_projector_ds_rate=0),
        r"audio_encoder_projector_ds_rate=0 ",
    ),
    "prompts of no list": (
        lambda f: set_config(f, prompts="x"),
        r"config\.json': prompts='x' ",
    ),
    "another projector": (
        lambda f: set_config(f, projector="q"),
        r"config\.json': projector='q' .*mlp, normed",
    ),
    "empty": (lambda f: save_file({}, f / "model.safetensors"), "empty"),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_directory_is_reported(world, tmp_path, damage):
    make_model(world).save_pretrained(tmp_path)
    (tmp_path / CHECKSUMS).unlink()  # which would report every change
    change, message = DAMAGES[damage]
    change(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        asrllm.AutoModel.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "weights"), [("5GB", 1), ("20KB", 5)])
def test_every_file_of_a_saved_directory_has_a_checksum(world, tmp_path, size, weights):
    make_model(world).save_pretrained(tmp_path, max_shard_size=size)
    assert len(list(tmp_path.glob("model*.safetensors"))) >= weights
    (tmp_path / "notes.txt").write_text("added later")
    asrllm.AutoModel.from_pretrained(tmp_path)
    saved = [path for path in tmp_path.iterdir() if path.name not in (CHECKSUMS, "notes.txt")]
    assert {path.name for path in saved} >= {"chat_template.jinja", "config.json"}
    for path in saved:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CorruptedError, match=re.escape(repr(str(path)))):
            asrllm.AutoModel.from_pretrained(tmp_path)
        path.unlink()
        with pytest.raises(UserError):
            asrllm.AutoModel.from_pretrained(tmp_path)
        path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "name", [CHECKSUMS, "config.json", "model.safetensors", "tokenizer.json", "pretrained.pt"]
)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_path_that_is_not_a_regular_file_is_named(world, tmp_path, name, make):
    make_model(world).save_pretrained(tmp_path)
    if name != CHECKSUMS:
        (tmp_path / CHECKSUMS).unlink()
    if name == "pretrained.pt":
        (tmp_path / "model.safetensors").unlink()
    else:
        (tmp_path / name).unlink()
    make(tmp_path / name)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
        asrllm.AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("line", ["junk", "0" * 64, "0" * 64 + "  ", "0" * 64 + "  no.json"])
def test_wrong_line_of_the_checksums_is_reported(world, tmp_path, line):
    make_model(world).save_pretrained(tmp_path)
    (tmp_path / CHECKSUMS).write_text(line + "\n")
    with pytest.raises(CorruptedError, match=re.escape(CHECKSUMS)):
        asrllm.AutoModel.from_pretrained(tmp_path)


def test_changed_file_is_accepted_without_its_checksum(world, tmp_path):
    make_model(world).save_pretrained(tmp_path)
    template = tmp_path / "chat_template.jinja"
    template.write_text(template.read_text() + "{# changed #}")
    lines = (tmp_path / CHECKSUMS).read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.endswith("  chat_template.jinja\n")]
    (tmp_path / CHECKSUMS).write_text("".join(kept))
    model = asrllm.AutoModel.from_pretrained(tmp_path)
    assert model.processor.tokenizer.chat_template == template.read_text()


def test_weights_are_loaded_in_the_requested_dtype(world, tmp_path):
    make_model(world).save_pretrained(tmp_path)
    for wrong, message in (
        ("float17", "dtype='float17' .*'(b?float16|float32)'"),
        (torch.int8, r"dtype=torch\.int8 "),
    ):
        with pytest.raises(UserError, match=message):
            asrllm.AutoModel.from_pretrained(tmp_path, dtype=wrong)
    assert as_dtype("torch.float16") == torch.float16
    assert (
        asrllm.AsrLlmModel.from_pretrained(tmp_path, torch_dtype="bfloat16").dtype == torch.bfloat16
    )


def test_read_tensors_reads_everything_when_the_file_is_reopened(tmp_path, monkeypatch):
    state = {f"t{i}": torch.randn(100) for i in range(7)} | {"count": torch.tensor(3)}
    save_file(state, tmp_path / "x.safetensors")
    for size in (1, 900, 1 << 30):
        monkeypatch.setattr("asrllm.models.asr_llm.weight_files.REOPEN_BYTES", size)
        read = read_tensors(tmp_path / "x.safetensors", torch.float64)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[name].to(state[name].dtype), state[name]) for name in state)
    assert read["count"].dtype == torch.int64


def test_run_is_loaded_from_a_state_dict_file(world, tmp_path):
    model = make_model(world)
    model.config.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    torch.save(model.weights(), tmp_path / "pretrained.pt")
    save_file(model.weights(), tmp_path / "other.safetensors")
    for weights in (None, tmp_path / "other.safetensors"):
        assert torch.equal(
            logits(asrllm.AutoModel.from_pretrained(tmp_path, weights=weights)), logits(model)
        )
    (tmp_path / "pretrained.pt").write_bytes((tmp_path / "pretrained.pt").read_bytes()[:500])
    with pytest.raises(UserError, match=f"'{tmp_path}/pretrained.pt' "):
        asrllm.AutoModel.from_pretrained(tmp_path)


@pytest.mark.slow
def test_unknown_keywords_are_rejected(world, tmp_path):
    model = make_model(world)
    for options, message in (
        (
            {"merge_adapters": True},
            r"save_pretrained\(\) .*'merge_adapters'.* 'merge_adapter'",
        ),
        (
            {"state_dict": {}},
            r"'state_dict'.* max_shard_size, merge_adapter",
        ),
        ({"max_shard_size": "banana"}, "max_shard_size='banana' "),
        ({"max_shard_size": 0}, "max_shard_size=0 "),
        ({"max_shard_size": "0.0GB"}, r"max_shard_size='0\.0GB' "),
    ):
        with pytest.raises(UserError, match=message):
            model.save_pretrained(tmp_path / "saved", **options)
    assert not (tmp_path / "saved").exists()
    model.save_pretrained(tmp_path / "saved", max_shard_size="0.5 gb")
    for options, message in (
        ({"atn_implementation": "sdpa"}, "'atn_implementation'"),
        ({"dtyp": "bfloat16"}, "'dtyp'.* 'dtype'"),
        ({"device_map": "cpuu"}, "device_map='cpuu'"),
        ({"device_map": {"llm": 0, "audio_encoder": 1}}, "device_map="),
    ):
        for load in (
            asrllm.AutoModel.from_pretrained,
            AsrLlmModel.from_pretrained,
            transformers.AutoModel.from_pretrained,
        ):
            with pytest.raises(UserError, match=message):
                load(tmp_path / "saved", **options)
    with pytest.raises(UserError, match="'chat_template'"):
        asrllm.AsrLlmProcessor.from_pretrained(tmp_path / "saved", chat_template="x")
    config = copy.deepcopy(model.config)
    assert AsrLlmModel.from_pretrained(tmp_path / "saved", config=config)
    config.projector_hidden_size = 7
    for load in (AsrLlmModel.from_pretrained, transformers.AutoModel.from_pretrained):
        with pytest.raises(UserError, match="projector_hidden_size"):
            load(tmp_path / "saved", config=config)
    for device_map in ("auto", "cpu", torch.device("cpu"), {"": "cpu"}):
        options = {"device_map": device_map, "torch_dtype": torch.float64}
        for load in (asrllm.AutoModel.from_pretrained, AsrLlmModel.from_pretrained):
            loaded = load(tmp_path / "saved", **options)
            assert loaded.dtype == torch.float64
            if device_map != "auto":
                assert loaded.device.type == "cpu"
    given = {"revision": "main", "trust_remote_code": True, "local_files_only": True}
    assert (
        transformers.AutoModel.from_pretrained(
            tmp_path / "saved", **given, dtype=torch.bfloat16
        ).dtype
        == torch.bfloat16
    )
    assert (
        transformers.AutoProcessor.from_pretrained(tmp_path / "saved", **given).default_prompt
        == "Transcribe."
    )


def test_llm_trained_in_full_keeps_the_generation_config_of_its_base(world, tmp_path):
    llm = tiny_llm(tmp_path / "llm")
    transformers.GenerationConfig(pad_token_id=0, max_new_tokens=77).save_pretrained(llm)
    model = make_model(world, llm={"pretrained_model": str(llm), "frozen": False, "lora": None})
    exp = tmp_path / "exp"
    model.config.save_pretrained(exp)
    model.processor.save_pretrained(exp)
    torch.save(
        {k: v for k, v in model.weights().items() if not k.startswith("audio_encoder.")},
        exp / "pretrained.pt",
    )
    asrllm.AutoModel.from_pretrained(exp).save_pretrained(tmp_path / "saved")
    own = asrllm.AutoModel.from_pretrained(tmp_path / "saved").causal_lm.generation_config
    assert (own.pad_token_id, own.max_new_tokens) == (0, 77)
    shutil.rmtree(llm)
    assert asrllm.AutoModel.from_pretrained(exp).causal_lm.generation_config.max_new_tokens is None


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "model.safetensors.index.json", "a/../../b.bin"]
)
def test_weight_map_with_files_outside_of_its_directory_is_rejected(tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    for read in (weight_files, read_state):
        with pytest.raises(UserError, match=re.escape(name)):
            read(tmp_path)


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000]
)
def test_invalid_weight_map_is_rejected(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json"):
        weight_files(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_base_llm_with_a_value_that_is_not_finite_is_reported(world, tmp_path, value):
    shutil.copytree(world.llm, tmp_path / "llm")
    state = load_file(tmp_path / "llm" / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][2, 3] = value
    save_file(state, tmp_path / "llm" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        pretrained_llm(str(tmp_path / "llm"), torch.bfloat16)
    for named in ("'model.layers.1.mlp.up_proj.weight'", str(tmp_path / "llm/model.safetensors")):
        assert named in str(error.value)
