"""The packed step of every LLM family against transformers on each utterance."""

import json

import pytest
import torch

from asrllm.errors import UserError
from asrllm.models import loss
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.loss import head_of
from asrllm.models.pretrained import empty_llm, pretrained_llm
from asrllm.testing import tiny_llm
from tests.models.test_loss import Largest

SIZE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
FAMILIES = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": 6},
    "gemma": {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": {
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 2.0,
    },
    "gemma3_text": {
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granite": {
        "logits_scaling": 4.0,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "cohere": {"logit_scale": 0.3},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
AUDIO = 200  # a token beyond the vocabulary: the embeddings are not resized


def make_model(family, tied):
    fields = {"model_type": family, "tie_word_embeddings": tied} | SIZE | FAMILIES[family]
    encoder = {
        "model_type": "whisper",
        "num_mel_bins": 80,
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "max_source_positions": 1500,
    }
    config = AsrLlmConfig(
        audio_encoder=encoder,
        llm=fields,
        projector_hidden_size=16,
        audio_encoder_projector_ds_rate=4,
        audio_token_id=AUDIO,
        lora={"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj"]},
    )
    torch.manual_seed(0)
    model = AsrLlmModel(config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.freeze("audio_encoder", "llm")
    return model.eval()


def chats(seconds=(0.5, 0.1, 0.9)):
    """Return the waveform, the ids with audio tokens, and the labels of each utterance.

    The longest one is longer than the sliding windows.
    """
    generator = torch.Generator().manual_seed(0)
    for s in seconds:
        wave = 0.1 * torch.randn(round(16000 * s), generator=generator)
        audio = -(-((len(wave) // 160 + 1) // 2) // 4)
        text = torch.randint(3, 97, (9,), generator=generator)
        ids = torch.cat([text[:3], torch.full((audio,), AUDIO), text[3:]])
        labels = torch.full_like(ids, -100)
        labels[-4:] = ids[-4:]
        yield wave, ids, labels


def packed(rows):
    lengths = torch.tensor([len(ids) for _, ids, _ in rows])
    labels = torch.cat([torch.cat([labels[1:], torch.tensor([-100])]) for _, _, labels in rows])
    positions = torch.nonzero(labels != -100).flatten()
    return {
        "waves": torch.nn.utils.rnn.pad_sequence([wave for wave, _, _ in rows], batch_first=True),
        "wave_lengths": torch.tensor([len(wave) for wave, _, _ in rows]),
        "input_ids": torch.cat([ids for _, ids, _ in rows])[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
        "cu_seqlens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        "target_positions": positions,
        "targets": labels[positions],
    }


def reference_loss(model, wave, ids, labels):
    """Return transformers' loss of one utterance with eager attention, summed over the labels."""
    features, lengths = model.audio_encoder.features(wave[None], torch.tensor([len(wave)]))
    audio = model.projector(*model.audio_encoder(features, lengths))
    audio_token = model.config.audio_token_id
    embeddings = model.llm.get_input_embeddings()(ids.masked_fill(ids == audio_token, 0))
    embeddings = embeddings.masked_scatter((ids == audio_token)[:, None], audio)
    return model.llm(
        inputs_embeds=embeddings[None], labels=labels[None], use_cache=False
    ).loss * int((labels[1:] != -100).sum())


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_step_matches_transformers_on_each_utterance(family, tied):
    model, rows = make_model(family, tied), list(chats())
    mine = model(**packed(rows)).loss
    mine.backward()
    mine_grads = gradients(model)
    model.llm.set_attn_implementation("eager")
    theirs = sum(reference_loss(model, *row) for row in rows)
    theirs.backward()
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    for name, grad in gradients(model).items():
        assert grad.abs().max() > 1e-6, name
        torch.testing.assert_close(
            mine_grads[name], grad, rtol=1e-3, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_adapters_of_the_head_are_rejected():
    model, rows = make_model("llama", False), list(chats())
    options = {"r": 2, "lora_alpha": 2, "target_modules": ["lm_head"]}
    model = AsrLlmModel(AsrLlmConfig(**model.config.to_dict() | {"lora": options}))
    with pytest.raises(UserError, match=r"target_modules .*head"):
        model(**packed(rows))


def test_no_tensor_of_all_tokens_by_the_vocabulary_is_built(monkeypatch):
    monkeypatch.setattr(loss, "MAX_CHUNK_LOGITS", 8 * 20_000)
    monkeypatch.setitem(FAMILIES, "llama", {"vocab_size": 20_000})
    model, rows = make_model("llama", True), list(chats((3.0, 2.0, 4.0)))
    inputs = packed(rows)
    with Largest() as largest:
        model(**inputs).loss.backward()
    tokens = inputs["input_ids"].shape[1]
    assert tokens > 100
    assert largest.elements == 32 * 20_000  # the embeddings, transposed for the head's product
    assert largest.elements < tokens * 20_000 / 3


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("mamba", {}, "'mamba'"),
        (
            "bloom",
            {"hidden_size": 32, "n_layer": 1, "n_head": 4},
            "'bloom'",
        ),
        (
            "llama4_text",
            {"intermediate_size_mlp": 32, "num_local_experts": 2},
            "'chunked_attention'",
        ),
    ],
)
def test_families_without_packing_support_are_rejected(family, fields, message):
    with pytest.raises(UserError, match=message):
        empty_llm({"model_type": family} | SIZE | fields)


def test_unknown_scale_of_the_logits_is_rejected():
    llm = empty_llm({"model_type": "llama", "logits_scaling": 3.0} | SIZE)
    with pytest.raises(UserError, match=r"'llama' .*logits_scaling=3"):
        head_of(llm)


@pytest.mark.parametrize(
    "setting", [{"return_dict": False}, {"output_attentions": True}, {"output_hidden_states": True}]
)
def test_settings_of_the_outputs_have_no_effect(tmp_path, setting):
    tiny_llm(tmp_path)
    path = tmp_path / "config.json"
    expected = pretrained_llm(str(tmp_path), torch.float32)
    fields = json.loads(path.read_text()) | setting
    path.write_text(json.dumps(fields))
    llm = pretrained_llm(str(tmp_path), torch.float32)
    tokens = torch.tensor([[3, 4, 5]])
    outputs = llm(input_ids=tokens)
    assert torch.equal(outputs.logits, expected(input_ids=tokens).logits)
    assert outputs.attentions is None
    assert outputs.hidden_states is None
    assert empty_llm(fields).config.return_dict
