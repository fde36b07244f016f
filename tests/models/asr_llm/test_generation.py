import copy
import logging

import numpy as np
import pytest
import soundfile
import torch
import transformers
from transformers import GenerationConfig

from asrllm.errors import UserError
from asrllm.models.asr_llm.answers import RowStopping, answer_tokens, first_loop, token_limit
from asrllm.models.asr_llm.decoding_options import decoding_config
from asrllm.models.build import build_model, build_processor
from asrllm.models.model_args import EncoderPart, LlmPart, ModelConfig
from asrllm.testing import tiny_llm, tiny_tokenizer, tone_sentences

SIZE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 12}  # shorter than every prompt
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 20},
    "gemma2": {
        **WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": {
        **WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    },
}


def family(folder, model_type):
    """Write a Hugging Face directory of a tiny LLM of this type with random weights."""
    tokenizer = tiny_tokenizer()
    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        **SIZE,
        **FAMILIES[model_type],
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def llm_of(folder, model_type):
    """Write a tiny qwen2, or an LLM of one of FAMILIES, and return its directory."""
    return tiny_llm(folder, tied=False) if model_type == "qwen2" else family(folder, model_type)


def make_model(
    world, llm, encoder="whisper", model_type="qwen2", projector="mlp", pad_to_30s=False
):
    config = ModelConfig(
        audio_encoder=EncoderPart(
            model_type=encoder, pretrained_model=str(getattr(world, encoder)), frozen=True
        ),
        llm=LlmPart(
            model_type=model_type,
            pretrained_model=str(llm),
            frozen=True,
            lora=None,
            chat_template=None,
        ),
        projector=projector,
        projector_hidden_size=32,
        audio_encoder_projector_ds_rate=4,
        audio_token="<|AUDIO|>",
        tag_audio_boundary=False,
        frozen_parameters=[],
        exclude_from_checkpoint=[],
    )
    processor = build_processor(config, pad_to_30s=pad_to_30s, prompts=("Transcribe.",))
    torch.manual_seed(0)
    model = build_model(processor, frozen=("audio_encoder", "llm"), dtype=torch.float32).eval()
    *_, last = (m for m in model.projector.modules() if isinstance(m, torch.nn.Linear))
    torch.nn.init.normal_(last.weight, std=1.0)  # large enough for the audio to change the text
    return model


@pytest.fixture(scope="module")
def model(world, tmp_path_factory):
    return make_model(world, tiny_llm(tmp_path_factory.mktemp("generation") / "llm", tied=False))


def waves_of(count):
    return [wave for _, wave in tone_sentences(count)]


def chats_of(model, count):
    return [model.processor.renderer.user_messages("Say " + "so " * (i % 4)) for i in range(count)]


def decode(model, inputs, chats, **options):
    """Return the texts, and the logits of each step (rows, steps, vocabulary)."""
    steps = []
    hook = model.llm.register_forward_hook(
        lambda _, __, output: steps.append(output.logits.flatten(0, 1).clone())
    )
    texts = model.generate(inputs, chats, max_new_tokens=10, **options)
    hook.remove()
    return texts, torch.stack(steps, 1)


def assert_batch_invariant(model, count=16):
    waves, chats = waves_of(count), chats_of(model, count)
    alone = [decode(model, [wave], [chat]) for wave, chat in zip(waves, chats, strict=True)]
    texts = [text for (text,), _ in alone]
    assert len(set(texts)) > count // 2
    x, x_lens = model.audio_encoder.features(*model.processor.load_waves(waves))
    padded = (torch.nn.functional.pad(x, (0, 0, 0, 57)), x_lens)
    order = np.random.default_rng(0).permutation(count)
    for inputs, indices in (
        (waves, range(count)),
        ([waves[i] for i in order], order),
        (padded, range(count)),
    ):
        together, logits = decode(model, inputs, [chats[i] for i in indices])
        assert together == [texts[i] for i in indices]
        for row, i in zip(logits, indices, strict=True):
            expected = alone[i][1][0]
            torch.testing.assert_close(row[: len(expected)], expected, rtol=1e-5, atol=1e-4)
    beams = [
        model.generate([wave], [chat], 8, num_beams=3)[0]
        for wave, chat in zip(waves[:6], chats, strict=False)
    ]
    assert model.generate(waves[:6][::-1], chats[:6][::-1], 8, num_beams=3) == beams[::-1]


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["whisper", "zipformer"])
def test_texts_do_not_depend_on_the_rest_of_the_batch(world, tmp_path, encoder):
    assert_batch_invariant(make_model(world, tiny_llm(tmp_path / "llm", tied=False), encoder))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_llm_family_is_batch_invariant(world, tmp_path, model_type):
    model = make_model(world, family(tmp_path / "llm", model_type), model_type=model_type)
    assert_batch_invariant(model, 8)


def test_raw_audio_may_be_files_arrays_tensors_or_pairs_with_a_rate(model, tmp_path):
    wave = waves_of(1)[0]
    fast = np.repeat(wave, 3)
    soundfile.write(tmp_path / "stereo.wav", np.stack([wave, wave], 1), 16000, subtype="FLOAT")
    chats = chats_of(model, 1)
    expected = model.generate([wave], chats, 8)
    forms = [
        str(tmp_path / "stereo.wav"),
        tmp_path / "stereo.wav",
        torch.from_numpy(wave),
        wave.astype(np.float64),
        (wave, 16000),
    ]
    for form in forms:
        assert model.generate([form], chats, 8) == expected
    waves, lengths = model.processor.load_waves(
        [(fast, 48000), (wave[::2], 8000), torch.from_numpy(wave).bfloat16()]
    )
    assert abs(lengths - len(wave)).max() <= 2
    assert abs(waves[0, : len(wave)] - torch.from_numpy(wave)).mean() < 0.05


def test_audios_are_assigned_to_chats_in_order(model):
    a, b, c = waves_of(3)
    audio = model.config.audio_token
    two = [{"role": "user", "content": f"{audio} and {audio}"}]
    one = [{"role": "user", "content": f"{audio} Say so."}]
    together = model.generate([a, b, c], [two, one], 8)
    assert together == model.generate([a, b], [two], 8) + model.generate([c], [one], 8)
    assert model.generate([a, c, b], [one, two], 8) == model.generate(
        [a], [one], 8
    ) + model.generate([c, b], [two], 8)
    assert model.generate([b, a], [two], 8) != model.generate([a, b], [two], 8)


@pytest.mark.parametrize(
    ("audios", "contents", "message"),
    [
        (2, ["{a}", "none"], r"chat 1 .*<\|AUDIO\|>"),
        (2, ["{a} {a}", "{a}"], "^2 .* 2, 1 .* 2 "),
        (3, ["{a}"], "^1 .* 1 .* 3 "),
        (1, [], "^0 .* 0 .* 1 "),
        (1, [[{"type": "image"}]], "chat 0: .*'image'"),
    ],
)
def test_wrong_number_of_audio_tokens_is_rejected(model, audios, contents, message):
    chats = [
        [{"role": "user", "content": c.format(a="<|AUDIO|>") if isinstance(c, str) else c}]
        for c in contents
    ]
    with pytest.raises(UserError, match=message) as caught:
        model.generate(waves_of(audios), chats)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, n: (x * float("nan"), n), "features .*audio 0 .* NaN"),
        (lambda x, n: (x, n + 1000), r"x_lens\[0\]=\d+ .* 1 and \d+"),
        (lambda x, n: (x, n * 0), r"x_lens\[0\]=0 .* 1 and \d+"),
        (lambda x, n: (x[..., :40], n), r" \(2, \d+, 40\) .*\(N, T, 80\)"),
        (lambda x, n: (x[0], n), r" \(\d+, 80\) .*\(N, T, 80\)"),
        (lambda x, n: (x, n[:1]), r"x_lens .* \(1,\) .* 2 "),
        (lambda x, n: (x, n.float()), r"x_lens .* torch\.float32"),
        (
            lambda x, n: (torch.zeros(2, 4000, 80), torch.tensor([4000, 10])),
            r"x_lens\[0\]=4000 .* 1 and 3001",
        ),
    ],
)
def test_invalid_features_are_rejected(model, change, message):
    features = model.audio_encoder.features(*model.processor.load_waves(waves_of(2)))
    with pytest.raises(UserError, match=message):
        model.generate(change(*features), chats_of(model, 2))


def test_generation_config_of_the_llm_is_ignored_without_a_warning(model, caplog, monkeypatch):
    waves, chats = waves_of(3), chats_of(model, 3)
    expected = model.generate(waves, chats, 12)
    own = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_p=0.8,
        top_k=20,
        repetition_penalty=1.5,
        max_length=4096,
        num_beams=1,
    )
    monkeypatch.setattr(model.llm, "generation_config", own)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    before = copy.deepcopy(own.to_dict())
    assert model.generate(waves, chats, 12) == expected
    assert model.generate(waves, chats, 12, num_beams=2) != []
    assert own.to_dict() == before
    assert not caplog.records


def test_keywords_override_the_generation_config(model, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    waves, chats = waves_of(3), chats_of(model, 3)
    given = GenerationConfig(num_beams=3, max_new_tokens=6)
    assert model.generate(waves, chats, generation_config=given) == model.generate(
        waves, chats, 6, num_beams=3
    )
    assert model.generate(waves, chats, generation_config=given, num_beams=1) == model.generate(
        waves, chats, 6
    )
    sampled = set()
    for seed in range(3):
        torch.manual_seed(seed)
        sampled.update(model.generate(waves, chats, 6, do_sample=True, temperature=2.0))
    assert len(sampled) > 3
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beam": 2}, "'num_beam' .*'num_beams'"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_length": 9}, "max_length .* max_new_tokens"),
        ({"num_return_sequences": 2}, "num_return_sequences=2 "),
        ({"temperature": 0.5}, r"temperature=0\.5 .*do_sample=True"),
        ({"repetition_guard": 0}, "repetition_guard=0"),
        ({"max_tokens_per_second": -1.0}, "max_tokens_per_second=-1"),
        ({"max_tokens_per_second": "two"}, "max_tokens_per_second='two'"),
        ({"num_beams": 0}, "num_beams=0 "),
        ({"num_beams": "two"}, "num_beams='two' "),
        ({"num_beams": True}, "num_beams=true "),
        ({"do_sample": True, "temperature": 0.0}, r"temperature=0\.0 "),
        ({"do_sample": True, "top_p": 1.5}, r"top_p=1\.5 "),
        ({"do_sample": "yes"}, "do_sample='yes' "),
        ({"guidance_scale": 1.5}, "^guidance_scale "),
        ({"assistant_early_exit": 1}, "^assistant_early_exit "),
        ({"stop_strings": [1]}, r"stop_strings=\[1\] "),
        ({"bad_words_ids": [3]}, r"bad_words_ids\[0\]=3 "),
        ({"eos_token_id": "x"}, "eos_token_id='x' "),
        (
            {"generation_config": {"num_beams": 2}},
            "generation_config .*dict.*GenerationConfig",
        ),
    ],
)
def test_invalid_options_are_rejected(model, options, message):
    with pytest.raises(UserError, match=message):
        model.generate(waves_of(1), chats_of(model, 1), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1},
        {
            "do_sample": True,
            "top_h": 0.5,
            "typical_p": 0.9,
            "epsilon_cutoff": 0.1,
            "eta_cutoff": 0.1,
        },
        {"num_beams": 2, "length_penalty": -1, "early_stopping": "never", "max_time": 60},
        {
            "suppress_tokens": [3],
            "begin_suppress_tokens": [4],
            "bad_words_ids": [[5, 6]],
            "sequence_bias": {(7,): 1.0},
        },
        {
            "exponential_decay_length_penalty": (2, 1.1),
            "renormalize_logits": True,
            "min_new_tokens": 2,
            "use_cache": False,
        },
        {
            "eos_token_id": [5, 6],
            "forced_eos_token_id": 5,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "output_scores": True,
        },
    ],
)
def test_every_accepted_option_works(model, options):
    assert len(model.generate(waves_of(2), chats_of(model, 2), 5, **options)) == 2


def test_stop_strings_end_an_answer(model):
    waves, chats = waves_of(2), chats_of(model, 2)
    spoken, steps = model.processor.tokenizer("one two six eight")["input_ids"], []

    def forward(_, __, output):
        output.logits[..., spoken[len(steps) % len(spoken)]] += 1e4
        steps.append(1)

    hook = model.llm.register_forward_hook(forward)
    assert model.generate(waves, chats, len(spoken)) == ["one two six eight"] * 2
    for stop in ("six", ["never said", "o six"]):
        steps.clear()
        assert model.generate(waves, chats, len(spoken), stop_strings=stop) == ["one two six"] * 2
    hook.remove()


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ((chat for chat in ()), "messages .*generator"),
        (None, "messages .*NoneType"),
        ([None], "chat 0 .*NoneType"),
        ([(m for m in ())], "chat 0 .*generator"),
    ],
)
def test_invalid_messages_are_rejected(model, messages, message):
    with pytest.raises(UserError, match=message):
        model.generate(waves_of(1), messages)


def test_samples_too_large_for_features_are_rejected(model, tmp_path):
    wave = waves_of(1)[0]
    soundfile.write(tmp_path / "loud.wav", wave * 1e30, 16000, subtype="FLOAT")
    with pytest.raises(UserError, match=r"features .*audio 1 "):
        model.transcribe([wave, wave * np.float32(1e30)])
    with pytest.raises(UserError, match=r"'.*loud\.wav' .*\de\+\d\d"):
        model.transcribe([wave, tmp_path / "loud.wav"])
    with pytest.raises(UserError, match=r"audio 1 .*float32"):
        model.transcribe([wave, wave.astype(np.float64) * 1e300])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}])
@pytest.mark.parametrize("name", ["projector.mlp.linear1.bias", "llm.model.norm.weight"])
def test_weights_with_nan_are_reported(model, name, options):
    broken = copy.deepcopy(model)
    broken.get_parameter(name).data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"chat 0 .*NaN.*dtype='float32'"):
        broken.generate(waves_of(2), chats_of(model, 2), 5, **options)


def test_texts_do_not_depend_on_the_batches(model, monkeypatch):
    """A chat may have several audios, and the list is not sorted by length."""
    waves = [np.resize(wave, 4000 * (1 + i * 3 % 7)) for i, wave in enumerate(waves_of(7))]
    token = model.processor.renderer.audio_token
    chats = [model.processor.renderer.user_messages(f"Say {i}") for i in range(6)]
    chats[2] = [{"role": "user", "content": f"{token} and {token}"}]
    together = model.generate(waves, chats, 12, batch_seconds=None)
    sizes = []
    encode = model.encode
    monkeypatch.setattr(
        model, "encode", lambda x, lengths: sizes.append(len(lengths)) or encode(x, lengths)
    )
    for seconds in (1e-3, 1.5, 3.0, 1e9):
        assert model.generate(waves, chats, 12, batch_seconds=seconds) == together
    assert sorted(sizes[:6]) == [1, 1, 1, 1, 1, 2]
    assert sizes[-1] == 7
    assert 1 < len(sizes[6:-1]) < 12


def test_error_of_a_batch_has_the_number_of_the_caller(model, monkeypatch):
    waves = [np.resize(wave, 8000 * (i + 1)) for i, wave in enumerate(waves_of(3))]
    chats = chats_of(model, 3)
    forward = model.audio_encoder.features.forward

    def broken(batch, samples):
        features, lengths = forward(batch, samples)
        return features.where(samples[:, None, None] != 16000, float("inf")), lengths

    monkeypatch.setattr(model.audio_encoder.features, "forward", broken)
    with pytest.raises(UserError, match="audio 1 "):
        model.generate(waves, chats, 5, batch_seconds=0.1)


@pytest.mark.parametrize(
    ("seconds", "value"), [(0, "0"), (-1.0, r"-1\.0"), ("long", "'long'"), (True, "true")]
)
def test_invalid_batch_length_is_rejected(model, seconds, value):
    with pytest.raises(UserError, match=f"batch_seconds={value} "):
        model.generate(waves_of(1), chats_of(model, 1), 5, batch_seconds=seconds)


def test_nan_logits_are_reported_with_the_number_of_the_chat(model):
    def forward(_, __, output):
        output.logits[2:] = float("nan")  # of the second chat, with two beams each

    hook = model.llm.register_forward_hook(forward)
    with pytest.raises(UserError, match=r"chat 1 .*NaN"):
        model.generate(waves_of(2), chats_of(model, 2), 5, num_beams=2)
    hook.remove()


def test_generation_disables_dropout_and_restores_training_mode(model):
    training = copy.deepcopy(model)
    for parameter in training.parameters():
        parameter.requires_grad_(True)
    for layer in training.llm.model.layers:
        layer.mlp.down_proj = torch.nn.Sequential(torch.nn.Dropout(0.5), layer.mlp.down_proj)
    training.train()
    training.audio_encoder.layers[0].eval()  # as a caller may have it
    modes = {name: module.training for name, module in training.named_modules()}
    waves, chats = waves_of(2), chats_of(model, 2)
    expected = model.generate(waves, chats, 8)
    assert [training.generate(waves, chats, 8) for _ in range(3)] == [expected] * 3
    assert {name: module.training for name, module in training.named_modules()} == modes
    with pytest.raises(UserError):
        training.generate(waves, chats, 8, num_beams=0)
    training.llm.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"chat 0 .*NaN"):
        training.generate(waves, chats, 8)
    assert {name: module.training for name, module in training.named_modules()} == modes


def test_generation_does_not_change_the_tokenizer(model):
    tokenizer = model.processor.tokenizer
    before = (tokenizer.padding_side, tokenizer.pad_token, tokenizer.chat_template, len(tokenizer))
    model.generate(waves_of(2), chats_of(model, 2), 4)
    assert (
        tokenizer.padding_side,
        tokenizer.pad_token,
        tokenizer.chat_template,
        len(tokenizer),
    ) == before


def endless(model, monkeypatch):
    """Keep the model from ending answers. Return a list of its forward passes."""
    steps = []

    def forward(_, __, output):
        steps.append(len(output.logits))
        output.logits[..., model.processor.renderer.stop_ids] = -1e4
        return output

    hook = model.llm.register_forward_hook(forward)
    monkeypatch.setattr(
        model.processor.tokenizer, "decode", lambda row, **_: " ".join(map(str, row))
    )
    return steps, hook


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 2])
def test_answers_are_limited_by_duration_and_the_batch_stops_with_the_last_row(
    model, monkeypatch, beams
):
    waves, chats = (
        [np.tile(waves_of(1)[0], 20)[:n] for n in (16000, 48000, 8000)],
        chats_of(model, 3),
    )
    steps, hook = endless(model, monkeypatch)
    texts = model.generate(waves, chats, 100, max_tokens_per_second=3, num_beams=beams)
    assert [len(text.split()) for text in texts] == [13, 19, 12]  # 0.5 s: 1.5 rounds to 2
    assert len(steps) == 19
    features = model.audio_encoder.features(*model.processor.load_waves(waves))
    assert model.generate(features, chats, 100, max_tokens_per_second=3, num_beams=beams) == texts
    assert [
        len(text.split())
        for text in model.generate(waves, chats, 15, max_tokens_per_second=3, num_beams=beams)
    ] == [13, 15, 12]
    both = [{"role": "user", "content": "<|AUDIO|> <|AUDIO|>"}]
    assert len(model.generate(waves[:2], [both], 100, max_tokens_per_second=3)[0].split()) == 22
    assert len(model.transcribe(waves[:1], repetition_guard=None)[0].split()) == 25
    assert len(model.generate(waves[:1], chats[:1], 30)[0].split()) == 30
    hook.remove()


def test_token_limit_grows_with_duration_up_to_max_new_tokens():
    assert token_limit(2.0, 200, 15.0) == 40
    assert token_limit(100.0, 200, 15.0) == 200
    assert token_limit(0.0, 200, 15.0) == 10
    assert token_limit(2.0, 200, None) == 200


HONEST = [
    [1, 1, 1],
    [1, 2] * 4,
    [1, 2] * 16,
    [7] * 32,
    [1, 2, 3] * 10,
    list(range(20)) * 4,
    [1, 2, 3, 4, 5, 6, 7, 8] * 4,
    [3, 9] * 15 + [4] * 20,
]


@pytest.mark.parametrize("row", HONEST)
def test_short_repetitions_are_not_loops(row):
    assert first_loop(row, 32) is None
    assert not any(
        RowStopping([999], 32)(torch.tensor([row[:n]]), None).any() for n in range(1, len(row) + 1)
    )
    assert answer_tokens(row, [99], 32) == row


@pytest.mark.parametrize(
    ("unit", "copies"),
    [([1], 33), ([1, 2], 17), ([1, 2, 3], 11), (list(range(10, 18)), 5), (list(range(16)), 5)],
)
def test_row_stops_at_a_loop_and_the_answer_has_one_copy(unit, copies):
    before = [50, 51, 50]
    row = before + unit * copies
    ends = RowStopping([999, 999], 32)
    other = torch.randint(100, 10_000, (len(row),))
    assert ends(torch.stack([torch.tensor(row), other]), None).tolist() == [True, False]
    assert ends(torch.stack([torch.tensor(row), other])[:, :-1], None).tolist() == [False, False]
    assert answer_tokens(row, [99], 32) == before + unit
    assert answer_tokens([*row, 99, 3], [99], 32) == before + unit
    assert answer_tokens(row, [99], None) == row


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}])
def test_looping_answer_is_truncated_and_its_row_stops(model, monkeypatch, options):
    steps, hook = endless(model, monkeypatch)

    def loop(_, __, output):
        output.logits[..., 40 + len(steps) % 3] += 1e4
        return output

    second = model.llm.register_forward_hook(loop)
    waves, chats = waves_of(2), chats_of(model, 2)
    texts = model.generate(waves, chats, 100, repetition_guard=32, **options)
    assert [len(text.split()) for text in texts] == [3, 3]
    assert len(steps) == (100 if "num_beams" in options else 33)
    assert len(model.generate(waves, chats, 100, **options)[0].split()) == 100
    hook.remove()
    second.remove()


def test_eos_token_ids_of_the_caller_are_added_to_the_stop_ids():
    config = decoding_config(GenerationConfig(eos_token_id=[5, 7]), None, [3])
    assert config.eos_token_id == [3, 5, 7]
    assert config.max_new_tokens == 200


def test_evaluation_passes_its_limits_to_generation(model):
    from asrllm.evaluation.engine import TorchEngine

    waves = waves_of(3)
    limits = {
        "num_beams": 1,
        "max_new_tokens": 12,
        "max_tokens_per_second": 2,
        "repetition_guard": 32,
    }
    answers = TorchEngine(model, limits).answer(waves, ["p", "q", "p"])
    chats = [model.processor.renderer.user_messages(prompt) for prompt in ("p", "q", "p")]
    assert [answer.text for answer in answers] == model.generate(waves, chats, **limits)
    assert {answer.end for answer in answers} <= {"stop", "limit"}


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_normed_projector_output_has_the_scale_of_the_embeddings(world, tmp_path, model_type):
    """Gemma 3 scales its embeddings when they are looked up."""
    model = make_model(
        world, family(tmp_path / "llm", model_type), model_type=model_type, projector="normed"
    )
    spoken = model.llm.get_input_embeddings()(torch.arange(97))
    torch.testing.assert_close(
        model.projector.mlp.norm_out.weight.mean(), spoken.std(), rtol=0.05, atol=0
    )
