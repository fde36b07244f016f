import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import asrllm
from asrllm.audio.reader import Sample
from asrllm.collator.batch import Collator
from asrllm.data.prompts import Prompt
from asrllm.errors import UserError
from asrllm.models.build import build_model, build_processor
from asrllm.models.fingerprint import resolve_pretrained
from asrllm.models.model_args import EncoderPart, LlmPart, LoraPart, ModelConfig
from asrllm.models.projectors import PROJECTORS
from asrllm.testing import tiny_llm, tone_sentences
from asrllm.training.trainer import MODEL_INPUTS


def make_config(world, **changes):
    lora = LoraPart(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    llm = {
        "model_type": "qwen2",
        "pretrained_model": str(world.llm),
        "frozen": True,
        "lora": lora,
        "chat_template": None,
    }
    whole = {
        "audio_encoder": EncoderPart(
            model_type="whisper", pretrained_model=str(world.whisper), frozen=True, lora=None
        ),
        "llm": LlmPart(**llm | changes.pop("llm", {})),
        "projector": "mlp",
        "projector_hidden_size": 32,
        "audio_encoder_projector_ds_rate": 4,
        "audio_token": "<|AUDIO|>",
        "tag_audio_boundary": False,
        "frozen_parameters": [],
        "exclude_from_checkpoint": [],
    }
    return ModelConfig(**whole | changes)


def make_model(
    world,
    frozen=("audio_encoder", "llm"),
    patterns=(),
    init_from=None,
    pad_to_30s=False,
    **changes,
):
    processor = build_processor(
        make_config(world, **changes), pad_to_30s=pad_to_30s, prompts=("Transcribe.", "Write.")
    )
    torch.manual_seed(0)
    model = build_model(
        processor, frozen=frozen, patterns=patterns, init_from=init_from, dtype=torch.float32
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # it starts at zero, and adapters would not be tested
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def samples(count=4):
    return [
        Sample(key=str(i), wave=wave, text=words)
        for i, (words, wave) in enumerate(tone_sentences(count))
    ]


def batch_of(model, chosen):
    processor = model.processor
    prompts = [Prompt(text=text) for text in processor.config.prompts]
    collator = Collator(
        processor.renderer, prompts, num_audio_tokens=processor.config.num_audio_tokens, seed=0
    )
    batch = collator(chosen)
    return {name: getattr(batch, name) for name in MODEL_INPUTS}


def test_base_models_are_stored_by_absolute_path(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world.root)
    encoder = EncoderPart(model_type="whisper", pretrained_model="whisper", frozen=True, lora=None)
    config = make_config(world, audio_encoder=encoder, llm={"pretrained_model": "llm"})
    described = build_processor(config, pad_to_30s=False, prompts=("Transcribe.",)).config
    assert {part: base["path"] for part, base in described.base_models.items()} == {
        "audio_encoder": str(world.whisper),
        "llm": str(world.llm),
    }
    (tmp_path / "link.pt").symlink_to(world.llm / "model.safetensors")
    assert resolve_pretrained(tmp_path / "link.pt", file=True) == tmp_path / "link.pt"


@torch.no_grad()
def test_kept_silence_takes_375_tokens_in_training_and_decoding(world):
    model = make_model(world, pad_to_30s="keep_silence", projector="voxtral")
    chosen = samples()
    batch = batch_of(model, chosen)
    is_audio = batch["input_ids"] == model.config.audio_token_id
    assert is_audio.sum() == 375 * len(chosen)
    together = model(**batch)
    alone = [model(**batch_of(model, [sample])).loss for sample in chosen]
    torch.testing.assert_close(together.loss, sum(alone), rtol=1e-5, atol=1e-4)
    waves = [sample.wave for sample in chosen]
    chats = [model.processor.renderer.user_messages("Transcribe.")] * len(waves)
    texts = model.generate(waves, chats, 6)
    assert texts == [model.generate([wave], [chats[0]], 6)[0] for wave in waves]
    features = model.audio_encoder.features(*model.processor.load_waves(waves))
    assert model.generate(features, chats, 6) == texts


@pytest.mark.parametrize("boundary", [False, True])
@pytest.mark.parametrize("projector", PROJECTORS)
def test_packed_loss_and_gradients_are_the_sum_over_single_utterances(world, boundary, projector):
    model = make_model(world, tag_audio_boundary=boundary, projector=projector)
    together = model(**batch_of(model, samples()))
    together.loss.backward()
    packed = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    alone = [model(**batch_of(model, [sample])) for sample in samples()]
    sum(output.loss for output in alone).backward()
    torch.testing.assert_close(
        together.loss, sum(output.loss for output in alone), rtol=1e-5, atol=1e-4
    )
    assert together.correct == sum(output.correct for output in alone)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name
            torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-3, atol=1e-4)


def test_loss_matches_transformers(world):
    """Run the same chat through the plain LM, with labels and audio embeddings set by hand."""
    model = make_model(world)
    (sample,) = samples(1)
    inputs = batch_of(model, [sample])
    features, lengths = model.audio_encoder.features(inputs["waves"], inputs["wave_lengths"])
    frames, frame_lengths = model.audio_encoder(features, lengths)
    audio = model.projector(frames, frame_lengths)
    table = model.llm.get_input_embeddings().weight
    embeddings = table[inputs["input_ids"].clamp(max=len(table) - 1)].clone()
    embeddings[inputs["input_ids"] == model.config.audio_token_id] = audio
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, inputs["target_positions"] + 1] = inputs["targets"]
    model.llm.set_attn_implementation("eager")
    theirs = model.llm(inputs_embeds=embeddings, labels=labels, use_cache=False).loss * len(
        inputs["targets"]
    )
    model.llm.set_attn_implementation("asrllm_packed")
    torch.testing.assert_close(model(**inputs).loss, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_only_adapters_and_projector_are_trained_and_frozen_parts_stay_in_eval_mode(world):
    model = make_model(world).train()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        n for n, _ in model.named_parameters() if n.startswith("projector.") or "lora_" in n
    }
    assert not model.audio_encoder.training
    assert model.llm.training
    assert model.projector.training


def test_a_part_can_be_trained_in_full(world):
    model = make_model(world, frozen=("audio_encoder",), llm={"frozen": False, "lora": None})
    assert all(p.requires_grad for p in model.llm.parameters())
    assert not any(p.requires_grad for p in model.audio_encoder.parameters())


@pytest.mark.slow
def test_texts_are_batch_invariant_for_features_and_for_raw_audio(world, tmp_path):
    model = make_model(world, llm={"pretrained_model": str(tiny_llm(tmp_path / "llm", tied=False))})
    chosen = samples(8)
    waves = [s.wave for s in chosen]
    chats = [model.processor.renderer.user_messages("Transcribe.")] * 8
    alone = [model.generate([wave], chats[:1], max_new_tokens=12)[0] for wave in waves]
    assert len(set(alone)) > 1
    assert model.generate(waves, chats, max_new_tokens=12) == alone
    assert model.generate(waves[::-1], chats, max_new_tokens=12) == alone[::-1]
    x, x_lens = model.audio_encoder.extract_feature(waves)
    assert model.generate((x, x_lens), chats, max_new_tokens=12) == alone
    assert model.transcribe(waves, max_new_tokens=12) == alone
    assert len(model.transcribe(waves, max_new_tokens=12, num_beams=2)) == 8


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_saved_directory_is_self_contained_and_loads_with_auto_classes(world, tmp_path, tied):
    llm = tiny_llm(tmp_path / "llm", tied=tied)
    model = make_model(world, llm={"pretrained_model": str(llm)})
    texts = model.transcribe([s.wave for s in samples()], max_new_tokens=10)
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(llm)
    for loader in (asrllm.AutoModel, transformers.AutoModel, asrllm.AsrLlmModel):
        loaded = loader.from_pretrained(tmp_path / "saved")
        assert not loaded.training
        assert loaded.config.audio_token == "<|AUDIO|>"
        assert loaded.transcribe([s.wave for s in samples()], max_new_tokens=10) == texts
        for name, tensor in model.weights().items():
            assert torch.equal(loaded.weights()[name], tensor), name
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "saved")
    assert processor.default_prompt == "Transcribe."
    assert transformers.AutoConfig.from_pretrained(tmp_path / "saved").model_type == "asrllm"


def test_excluded_parts_are_read_from_the_base_model_and_another_base_is_rejected(world, tmp_path):
    llm = tiny_llm(tmp_path / "llm")
    model = make_model(
        world, llm={"pretrained_model": str(llm)}, exclude_from_checkpoint=["llm", "audio_encoder"]
    )
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {k for k in saved if not k.startswith("projector.")} == {
        k for k in model.weights() if "lora_" in k
    }
    wave = samples(1)[0].wave
    assert asrllm.AutoModel.from_pretrained(tmp_path / "saved").transcribe(
        [wave]
    ) == model.transcribe([wave])
    tiny_llm(llm, seed=1)
    with pytest.raises(UserError, match=f"'{llm}' .*model.llm.pretrained_model="):
        asrllm.AutoModel.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("projector.mlp.linear1.bias"),
            r" 1 .*'projector\.mlp\.linear1\.bias'",
        ),
        (lambda s: s.update(extra=torch.zeros(1)), " 1 .*'extra'"),
        (
            lambda s: s.update({"projector.mlp.linear1.bias": torch.zeros(3)}),
            r"'projector\.mlp\.linear1\.bias' .*\(3,\).*\(32,\)",
        ),
    ],
)
def test_wrong_keys_are_reported(world, tmp_path, change, message):
    make_model(world).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        asrllm.AutoModel.from_pretrained(tmp_path)


def test_invalid_generation_input_is_rejected(world):
    model = make_model(world)
    wave = samples(1)[0].wave
    chat = model.processor.renderer.user_messages("x")
    for audio, chats, message in (
        ([wave[:100]], [chat], r"audio 0 .* 100 .* 160 \(0\.010 s\)"),
        ([wave * float("nan")], [chat], "audio 0 .*NaN"),
        ([wave[None]], [chat], rf"audio 0 .*\(1, {len(wave)}\)"),
        ([wave, wave], [chat], "1 chats .* 2 audios"),
        ([wave], [[{"role": "user", "content": "hi"}]], r"chat 0 .*<\|AUDIO\|>"),
    ):
        with pytest.raises(UserError, match=message):
            model.generate(audio, chats)


def test_invalid_configuration_is_reported_before_weights_are_loaded(world, tmp_path):
    def describe(**changes):
        return build_processor(make_config(world, **changes), pad_to_30s=False, prompts=("x",))

    shutil.copytree(world.llm, tmp_path / "llm")
    for file in (tmp_path / "llm").glob("token*"):
        file.unlink()
    with pytest.raises(UserError, match=rf"'{tmp_path}/llm' .*tokenizer\.json"):
        describe(llm={"pretrained_model": str(tmp_path / "llm")})
    with pytest.raises(UserError, match=r"model\.llm\.model_type='llama'.* 'qwen2'"):
        describe(llm={"model_type": "llama"})
    with pytest.raises(UserError, match=r"model\.llm\.pretrained_model '/no/such/llm'"):
        describe(llm={"pretrained_model": "/no/such/llm"})
    with pytest.raises(UserError, match=r"model\.audio_token='<\|im_end\|>' "):
        describe(audio_token="<|im_end|>")
    with pytest.raises(UserError, match=r"model\.llm\.frozen=false .*model\.llm\.lora\.r=0"):
        describe(llm={"frozen": False})
    with pytest.raises(UserError, match=r"model\.llm\.lora\..*'nothing'"):
        make_model(
            world,
            llm={"lora": LoraPart(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["nothing"])},
        )


def test_exp_dir_without_weights_is_reported(world, tmp_path):
    with pytest.raises(UserError, match=rf"'{tmp_path}' .*config\.json"):
        asrllm.AutoModel.from_pretrained(tmp_path)
    make_model(world).config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "asrllm"
    with pytest.raises(UserError, match=rf"pretrained\.pt .*'asrllm average {tmp_path} "):
        asrllm.AutoModel.from_pretrained(tmp_path)
