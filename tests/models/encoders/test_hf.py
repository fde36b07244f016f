"""Encoders of transformers: frames, gradients, lengths and files against transformers itself."""

import json

import numpy as np
import pytest
import torch
import transformers
from transformers import MODEL_MAPPING, AutoConfig
from transformers.masking_utils import create_bidirectional_mask

from asrllm.audio.waves import padded
from asrllm.errors import UserError
from asrllm.models.encoders.hf import HfEncoder
from asrllm.models.encoders.hf_families import HF_FAMILIES
from asrllm.models.encoders.registry import encoder_kind
from asrllm.training.memory_estimate import SavedBytes

WAVE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": [8, 8, 8],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
ADAPTER = {"add_adapter": True, "num_adapter_layers": 2, "output_hidden_size": 12}
NORMED = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
WHISPER = {
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "num_mel_bins": 80,
}
VOXTRAL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_mel_bins": 80,
}
BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "left_max_position_embeddings": 8,
    "right_max_position_embeddings": 2,
}
PARAKEET = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "subsampling_conv_channels": 4,
    "num_mel_bins": 80,
}
MOONSHINE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "encoder_num_hidden_layers": 2,
    "decoder_num_hidden_layers": 1,
    "encoder_num_attention_heads": 2,
    "decoder_num_attention_heads": 2,
    "encoder_num_key_value_heads": 2,
    "decoder_num_key_value_heads": 2,
    "vocab_size": 20,
    "pad_token_id": 0,
}
# name of a case: (model_type, fields)
CASES = {
    "wav2vec2": ("wav2vec2", WAVE),
    "wav2vec2 large": ("wav2vec2", WAVE | NORMED),
    "wav2vec2 adapter": ("wav2vec2", WAVE | ADAPTER),
    "wav2vec2-conformer": ("wav2vec2-conformer", WAVE),
    "hubert": ("hubert", WAVE),
    "hubert large": ("hubert", WAVE | NORMED),
    "wavlm": ("wavlm", WAVE),
    "wavlm large": ("wavlm", WAVE | NORMED),
    "unispeech-sat": ("unispeech-sat", WAVE),
    "data2vec-audio": ("data2vec-audio", WAVE),
    "wav2vec2-bert": ("wav2vec2-bert", BERT),
    "wav2vec2-bert adapter": ("wav2vec2-bert", BERT | ADAPTER),
    "parakeet": ("parakeet_encoder", PARAKEET),
    "moonshine": ("moonshine", MOONSHINE),
    "qwen3_asr": ("qwen3_asr_encoder", WHISPER | {"downsample_hidden_size": 4}),
    "qwen2_audio": ("qwen2_audio_encoder", WHISPER),
    "voxtral": ("voxtral_encoder", VOXTRAL),
}
EXTRACTORS = {
    "wave": transformers.Wav2Vec2FeatureExtractor,
    "seamless": transformers.SeamlessM4TFeatureExtractor,
    "parakeet": transformers.ParakeetFeatureExtractor,
    "mel": transformers.Qwen3ASRFeatureExtractor,
    "mel of 30 s": transformers.WhisperFeatureExtractor,
}
LENGTHS = (16000, 4321, 9000, 16000, 900)


def extractor_of(kind):
    family = HF_FAMILIES[kind]
    options = {"feature_size": 1} if family.features == "wave" else {}
    if family.features == "mel":
        options = {"feature_size": 80, "min_length": 0}
    return EXTRACTORS[family.features](**options)


def make_theirs(case):
    """Return transformers' model of a case, in eval mode with random weights."""
    kind, fields = CASES[case]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **fields)
    model = MODEL_MAPPING[type(config)](config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # zero or one in a new model, which hides mistakes
            torch.nn.init.normal_(parameter, float("norm" in name and "bias" not in name), 0.2)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    return model


def write(folder, case):
    """Write a directory with the model and the feature extractor of a case."""
    model = make_theirs(case)
    model.save_pretrained(folder)
    extractor_of(CASES[case][0]).save_pretrained(folder)
    return model


def load(folder):
    """Return our encoder from a directory, in eval mode, and its fields."""
    values, state = HfEncoder.read_pretrained(str(folder))
    values = json.loads(json.dumps(values))  # as from config.json
    encoder = HfEncoder.from_fields(values, pad_to_30s=False).eval()
    encoder.load_state_dict(state)
    return encoder, values


def waves_of(lengths=LENGTHS):
    generator = np.random.default_rng(0)
    return [generator.normal(0, 0.1, n).astype(np.float32) for n in lengths]


def run_theirs(model, kind, features, length):
    """Return the frames of one utterance, from its features (T, F), by transformers."""
    if kind == "moonshine":
        model = model.encoder
    family = HF_FAMILIES[kind]
    if family.features == "wave":
        return model(features[None, :, 0]).last_hidden_state[0]
    options = {}
    if kind == "qwen2_audio_encoder":
        valid = torch.arange(1500)[None] < (length + 1) // 2
        options["attention_mask"] = create_bidirectional_mask(
            config=model.config, inputs_embeds=torch.zeros(1, 1500, 1), attention_mask=valid.long()
        )
    if family.features == "mel of 30 s":
        features = features.T
    elif family.features == "mel":
        missing = -len(features) % 100
        mask = torch.arange(len(features) + missing)[None] < len(features)
        features = torch.nn.functional.pad(features.T, (0, missing))
        return model(features[None], input_features_mask=mask.long()).last_hidden_state
    elif kind == "parakeet_encoder":  # its forward pass without a mask and with one
        options["attention_mask"] = torch.ones(1, length, dtype=torch.bool)
    return model(features[None], **options).last_hidden_state[0]


def weighted(frames):
    """Return a sum of frames (T, C) of which each has a weight of its own."""
    return (frames * torch.linspace(-1, 1, frames.numel()).view(frames.shape)).sum()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_frames_and_gradients_in_a_batch_are_those_of_transformers_alone(tmp_path, case):
    kind = CASES[case][0]
    theirs = write(tmp_path, case)
    encoder, values = load(tmp_path)
    waves, samples = padded(waves_of())
    frames, lengths = encoder(*encoder.features(waves, samples))
    assert lengths.tolist() == encoder.frame_lengths(samples, values).tolist()
    total = torch.zeros(())
    expected_total = torch.zeros(())
    for i, n in enumerate(samples.tolist()):
        features, count = encoder.features(waves[i : i + 1, :n], samples[i : i + 1])
        expected = run_theirs(theirs, kind, features[0], int(count))[: lengths[i]]
        assert expected.shape == (lengths[i], encoder.output_dim)
        torch.testing.assert_close(frames[i, : lengths[i]], expected, atol=1e-5, rtol=1e-5)
        assert not frames[i, lengths[i] :].any()
        total = total + weighted(frames[i, : lengths[i]])
        expected_total = expected_total + weighted(expected)
    total.backward()
    expected_total.backward()
    own = dict(encoder.model.named_parameters())
    theirs = theirs.encoder if kind == "moonshine" else theirs
    checked = 0
    for name, parameter in theirs.named_parameters():
        if parameter.grad is None:
            continue
        scale = parameter.grad.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(
            own[name].grad / scale, parameter.grad / scale, atol=2e-5, rtol=1e-5
        )
        checked += 1
    assert checked > 20


@pytest.mark.parametrize("case", CASES)
def test_features_are_those_of_the_feature_extractor(tmp_path, case):
    kind = CASES[case][0]
    write(tmp_path, case)
    encoder, values = load(tmp_path)
    extractor = extractor_of(kind)
    waves = waves_of()
    features, lengths = encoder.features(*padded(waves))
    width, hop = encoder.feature_shape(values)
    assert features.shape[2] == width
    for wave, row, length in zip(waves, features, lengths.tolist(), strict=True):
        options = {"padding": True} if kind == "qwen3_asr_encoder" else {}
        inputs = extractor(wave, sampling_rate=16000, return_tensors="pt", **options)
        theirs = next(inputs[name] for name in ("input_values", "input_features") if name in inputs)
        theirs = theirs[0]
        if len(theirs) == width > 1:
            theirs = theirs.T
        theirs = theirs.reshape(-1, width)
        assert abs(length - len(wave) / hop) <= 2
        # log-mel spectrograms of transformers have float64 steps
        torch.testing.assert_close(row[:length], theirs[:length], atol=2e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_lengths_match_the_frames_for_every_remainder(tmp_path, case):
    write(tmp_path, case)
    encoder, values = load(tmp_path)
    shortest, longest = encoder.sample_limits(values)
    assert shortest < 8000 < longest
    lengths = [shortest, shortest + 1, 5000, *range(6000, 6000 + 1281, 61), 16000, 33333]
    if encoder.pad_to_30s:
        lengths = [shortest, 6001, longest]
    for n in lengths:
        with torch.no_grad():
            features, counts = encoder.features(torch.randn(1, n), torch.tensor([n]))
            frames, frame_lengths = encoder(features, counts)
        assert frames.shape[1] == frame_lengths[0] == encoder.frame_lengths(n, values) >= 1
        assert torch.isfinite(frames).all()
    assert encoder.frame_lengths(shortest - 1, values) < encoder.frame_lengths(6001, values)
    array = encoder.frame_lengths(np.array(lengths), values)
    assert array.tolist() == [encoder.frame_lengths(n, values) for n in lengths]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_bfloat16_changes_frames_by_its_rounding_only(tmp_path, case):
    write(tmp_path, case)
    encoder, _ = load(tmp_path)
    features = encoder.features(*padded(waves_of((16000, 9000))))
    expected = encoder(*features)[0]
    frames = encoder.bfloat16()(*features)[0]
    assert frames.dtype == torch.bfloat16
    difference = (frames.float() - expected).square().mean().sqrt()
    assert difference < 0.1 * expected.square().mean().sqrt()
    frames.float().sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["wav2vec2", "wavlm large", "wav2vec2-bert", "parakeet"])
def test_recomputed_activations_have_the_same_gradients(tmp_path, case):
    write(tmp_path, case)
    fields = json.loads((tmp_path / "config.json").read_text())
    edited(tmp_path, "config.json", **{name: 0.0 for name in fields if "dropout" in name})
    gradients = []
    saved = []
    for recompute in (False, True):
        encoder, _ = load(tmp_path)
        if recompute:
            encoder.gradient_checkpointing_enable()
        encoder.train()
        counter = SavedBytes(encoder)
        with counter:
            frames, _ = encoder(*encoder.features(*padded(waves_of())))
        weighted(frames).backward()
        saved.append(counter.total)
        gradients.append({n: p.grad for n, p in encoder.named_parameters()})
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    assert saved[1] < 0.9 * saved[0]


def test_training_does_not_change_the_statistics_of_batch_norms(tmp_path):
    write(tmp_path, "parakeet")
    encoder, _ = load(tmp_path)
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    encoder.train()
    encoder(*encoder.features(*padded(waves_of())))
    for name, buffer in encoder.named_buffers():
        assert torch.equal(buffer, before[name]), name


CONTAINERS = {
    "hubert": ("HubertForCTC", {}),
    "wav2vec2": ("Wav2Vec2ForPreTraining", {"codevector_dim": 8, "proj_codevector_dim": 8}),
    "parakeet": ("ParakeetForCTC", {"vocab_size": 8, "pad_token_id": 7}),
    "moonshine": ("MoonshineForConditionalGeneration", {}),
    "qwen2_audio": ("Qwen2AudioForConditionalGeneration", {}),
    "qwen3_asr": ("Qwen3ASRForConditionalGeneration", {}),
    "voxtral": ("VoxtralForConditionalGeneration", {}),
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 20,
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_the_encoder_in_a_larger_model_is_found(tmp_path, case):
    name, more = CONTAINERS[case]
    kind, fields = CASES[case]
    model_class = getattr(transformers, name)
    config_class = model_class.config_class
    if case == "parakeet":
        config = config_class(encoder_config=fields, **more)
    elif case in ("qwen2_audio", "qwen3_asr", "voxtral"):
        llms = {"qwen2_audio": "qwen2", "qwen3_asr": "qwen3", "voxtral": "llama"}
        text = {"model_type": llms[case]} | TEXT
        config = config_class(audio_config={"model_type": kind} | fields, text_config=text)
    else:
        config = config_class(**fields | more)
    torch.manual_seed(0)
    model_class(config).eval().save_pretrained(tmp_path)
    extractor_of(kind).save_pretrained(tmp_path)
    assert encoder_kind(str(tmp_path)) == "hf"
    encoder, _ = load(tmp_path)
    reloaded = model_class.from_pretrained(tmp_path).eval()
    inner = next(module for module in reloaded.modules() if type(module) is type(encoder.model))
    for key, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, inner.state_dict()[key]), key


def test_old_names_of_weight_norm_are_read(tmp_path):
    model = write(tmp_path, "wavlm")
    old = {
        ".parametrizations.weight.original0": ".weight_g",
        ".parametrizations.weight.original1": ".weight_v",
    }
    state = {}
    for key, tensor in model.state_dict().items():
        for new, name in old.items():
            key = key.replace(new, name)
        state[f"wavlm.{key}"] = tensor
    assert any(key.endswith("weight_g") for key in state)
    (tmp_path / "model.safetensors").unlink()
    torch.save(state | {"lm_head.weight": torch.zeros(2, 16)}, tmp_path / "pytorch_model.bin")
    encoder, _ = load(tmp_path)
    for key, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key


def edited(folder, name, **changes):
    path = folder / name
    fields = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            fields.pop(key, None)
        else:
            fields[key] = value
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("case", "file", "changes", "named"),
    [
        ("hubert", "preprocessor_config.json", {"sampling_rate": 8000}, "sampling_rate=8000"),
        ("hubert", "preprocessor_config.json", {"do_normalize": "no"}, "do_normalize='no'"),
        ("hubert", "config.json", {"num_hidden_layers": 3}, "num_hidden_layers=3"),
        ("hubert", "config.json", {"num_hidden_layers": 1}, "num_hidden_layers=1"),
        ("hubert", "config.json", {"model_type": "clap"}, "'clap'"),
        ("hubert", "config.json", {"model_type": {"a": 1}}, "{'a': 1}"),
        ("hubert", "config.json", {"model_type": "audio-spectrogram-transformer"}, "wavlm"),
        ("hubert", "config.json", {"hidden_size": -4}, "hidden_size=-4"),
        ("hubert", "config.json", {"conv_dim": [8]}, "config.json"),
        ("parakeet", "preprocessor_config.json", {"feature_size": 128}, "128"),
        ("parakeet", "preprocessor_config.json", {"hop_length": 80}, "hop_length=80"),
        ("wav2vec2-bert", "preprocessor_config.json", {"stride": 4}, "stride=4"),
        ("voxtral", "preprocessor_config.json", {"n_fft": 512}, "n_fft=512"),
    ],
)
def test_files_that_are_not_supported_are_rejected_by_name(tmp_path, case, file, changes, named):
    write(tmp_path, case)
    edited(tmp_path, file, **changes)
    with pytest.raises(UserError) as caught:
        HfEncoder.read_pretrained(str(tmp_path))
    assert named in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_directory_without_a_feature_extractor_is_rejected(tmp_path):
    write(tmp_path, "hubert")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        HfEncoder.read_pretrained(str(tmp_path))
