"""Whole models with encoders of transformers: texts, adapters, files and checkpoints."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoFeatureExtractor

from asrllm.checkpoints.export import export
from asrllm.errors import UserError
from asrllm.models.encoders.hf import HfEncoder
from asrllm.models.model_args import EncoderPart, LoraPart
from asrllm.models.portable.files import code_files
from asrllm.testing import tone_sentences
from asrllm.training.memory_estimate import SavedBytes, _encoder_bytes
from tests.models.asr_llm.test_modeling import batch_of, make_model, samples
from tests.models.encoders.test_hf import CASES, write

CHOSEN = [
    "wav2vec2",
    "wavlm large",
    "wav2vec2-bert adapter",
    "parakeet",
    "moonshine",
    "qwen3_asr",
    "voxtral",
]


def model_of(world, folder, case, *, lora=None, **changes):
    """Return a model whose encoder is a case of test_hf, in eval mode."""
    write(folder, case)
    part = EncoderPart(model_type="hf", pretrained_model=str(folder), lora=lora)
    changes = {"audio_encoder_projector_ds_rate": 2} | changes
    model = make_model(world, audio_encoder=part, **changes)
    last = [m for m in model.projector.modules() if isinstance(m, torch.nn.Linear)][-1]
    torch.nn.init.normal_(last.weight, std=1.0)  # large enough for the audio to change the text
    return model


def waves_of(count):
    return [wave for _, wave in tone_sentences(count)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CHOSEN)
def test_texts_do_not_depend_on_the_batch(world, tmp_path, case):
    model = model_of(world, tmp_path, case)
    waves = waves_of(4)
    together = model.transcribe(waves, max_new_tokens=6)
    assert len(set(together)) > 1
    assert together == [model.transcribe([wave], max_new_tokens=6)[0] for wave in waves]
    features = model.audio_encoder.extract_feature(waves)
    chats = [model.processor.renderer.user_messages("Transcribe.")] * len(waves)
    assert model.generate(features, chats, max_new_tokens=6) == model.generate(
        waves, chats, max_new_tokens=6
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", CHOSEN)
def test_saved_directory_has_the_same_texts(world, tmp_path, case):
    model = model_of(world, tmp_path / "encoder", case)
    waves = waves_of(3)
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert loaded.transcribe(waves, 6) == model.transcribe(waves, 6)


# `asrllm` cannot be imported: everything comes from the directories
SCRIPT = """
import json, sys
sys.modules["asrllm"] = None
import numpy as np
from transformers import AutoModel, AutoProcessor

waves, *folders = sys.argv[1:]
waves = [wave for wave in np.load(waves).values()]
found = {}
for folder in folders:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    inputs = processor.apply_transcription_request(audio=waves)
    rows = model.generate(**inputs, max_new_tokens=6, max_tokens_per_second=None)
    found[folder] = processor.batch_decode(rows, skip_special_tokens=True)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.longest(60, reason="imports transformers' classes of seven encoders in a new process")
def test_saved_directories_have_the_same_texts_without_the_package(world, tmp_path):
    waves = waves_of(3)
    np.savez(tmp_path / "waves.npz", *waves)
    expected = {}
    for number, case in enumerate(CHOSEN):
        model = model_of(world, tmp_path / f"encoder{number}", case, llm={"lora": None})
        folder = tmp_path / f"saved{number}"
        model.save_pretrained(folder)
        options = {"max_new_tokens": 6, "max_tokens_per_second": None}
        expected[str(folder)] = model.transcribe(waves, **options)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "waves.npz", *expected],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PATH": ""},
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_code_of_a_saved_directory_needs_no_package():
    for name, text in code_files("hf").items():
        compile(text, name, "exec")
        assert "asrllm." not in text.replace("transformers_modules", ""), name


@pytest.mark.parametrize("case", ["wavlm", "parakeet", "qwen3_asr", "voxtral"])
def test_exported_encoder_is_a_directory_of_transformers(world, tmp_path, case):
    lora = LoraPart(r=2, target_modules=["fc1"]) if case == "voxtral" else None
    model = model_of(world, tmp_path / "encoder", case, lora=lora)
    model.save_pretrained(tmp_path / "saved")
    export(tmp_path / "saved", tmp_path / "exported", dtype="float32", parts=True)
    folder = tmp_path / "exported" / "audio_encoder"
    theirs = transformers.AutoModel.from_pretrained(folder)
    assert theirs.config.model_type == CASES[case][0]
    assert AutoFeatureExtractor.from_pretrained(folder).sampling_rate == 16000
    values, state = HfEncoder.read_pretrained(str(folder))
    assert values["config"] == model.config.audio_encoder["config"]
    changed = []
    for name, tensor in theirs.state_dict().items():
        if name != "masked_spec_embed":
            assert torch.equal(tensor, state[f"model.{name}"])
            own = model.audio_encoder.state_dict()
            if not torch.equal(tensor, own.get(f"model.{name}", tensor.new_empty(0))):
                changed.append(name)
    assert all(".fc1." in name for name in changed)
    assert bool(changed) == (lora is not None)


def test_exported_encoder_of_an_encoder_and_decoder_is_read_again(world, tmp_path):
    model = model_of(world, tmp_path / "encoder", "moonshine")
    model.save_pretrained(tmp_path / "saved")
    export(tmp_path / "saved", tmp_path / "exported", dtype="float32", parts=True)
    values, state = HfEncoder.read_pretrained(str(tmp_path / "exported" / "audio_encoder"))
    assert values["config"] == model.config.audio_encoder["config"]
    own = model.audio_encoder.state_dict()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[name], own[name]) for name in own)


def test_adapters_of_the_encoder_are_trained(world, tmp_path):
    lora = LoraPart(r=2, target_modules=["q_proj", "intermediate_dense"])
    model = model_of(world, tmp_path, "hubert", lora=lora).train()
    model.freeze("audio_encoder", "llm")
    model(**batch_of(model, samples())).loss.backward()
    adapted = [n for n, p in model.audio_encoder.named_parameters() if p.requires_grad]
    assert len(adapted) == 2 * 2 * 2
    for name in adapted:
        assert model.audio_encoder.get_parameter(name).grad.abs().max() > 0, name


def test_adapters_without_an_effect_are_rejected(world, tmp_path):
    with pytest.raises(UserError) as caught:
        model_of(world, tmp_path, "wavlm", lora=LoraPart(r=2, target_modules=["q_proj"]))
    assert "model.audio_encoder.lora.target_modules" in str(caught.value)
    assert "q_proj" in str(caught.value)


def test_trained_encoder_has_the_gradients_of_single_utterances(world, tmp_path):
    model = model_of(world, tmp_path, "wav2vec2", frozen=("llm",))
    together = model(**batch_of(model, samples()))
    together.loss.backward()
    packed = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    sum(model(**batch_of(model, [sample])).loss for sample in samples()).backward()
    trained = [n for n in packed if n.startswith("audio_encoder.")]
    assert len(trained) > 40
    for name in trained:
        gradient = model.get_parameter(name).grad
        scale = gradient.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(packed[name] / scale, gradient / scale, rtol=1e-3, atol=1e-4)


def test_features_of_raw_waveforms_are_masked_in_time_only(world, tmp_path):
    model = model_of(world, tmp_path, "wav2vec2")
    inputs = batch_of(model, samples(2))
    inputs["masks"] = torch.tensor([[[0.25, 0.5], [0.0, 1.0]]]).expand(2, -1, -1)
    inputs["time_masks"] = 1
    seen = []
    model.audio_encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(**inputs)
    (features,) = seen
    length = int(inputs["wave_lengths"][0])
    masked = features[0, :length, 0] == features[0, int(0.3 * length), 0]
    assert masked.float().mean() == pytest.approx(0.25, abs=0.02)


def test_a_new_run_names_the_encoder_by_its_directory(world, tmp_path):
    write(tmp_path, "wavlm")
    part = EncoderPart(model_type=str(tmp_path), pretrained_model=str(tmp_path))
    assert part.kind == "hf"
    model = make_model(world, audio_encoder=part)
    assert model.config.audio_encoder["config"]["model_type"] == "wavlm"


@pytest.mark.slow
@pytest.mark.longest(60, reason="encodes 9 s of audio with gradients")
@pytest.mark.parametrize("case", ["wav2vec2", "wav2vec2-bert", "parakeet"])
def test_the_estimate_of_memory_is_what_the_encoder_saves_for_9_s(world, tmp_path, case):
    model = model_of(world, tmp_path, case, frozen=("llm",)).train()
    counter = SavedBytes(model)
    with counter:
        waves = torch.randn(1, 144000)
        lengths = torch.tensor([144000])
        _, frames = model.audio_encoder(*model.audio_encoder.features(waves, lengths))
    estimate = int(frames.sum()) * _encoder_bytes(model.config, torch.float32, False)
    assert estimate == pytest.approx(counter.total, rel=0.15)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("config", "model_type"), "clap", "clap"),
        (("config", "num_hidden_layers"), -1, "num_hidden_layers"),
        (("config", "conv_stride"), "five", "config.json"),
        (("config",), None, "config.json"),
    ],
)
def test_damaged_fields_of_a_saved_model_are_rejected(world, tmp_path, path, value, named):
    model = model_of(world, tmp_path / "encoder", "wavlm")
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "asrllm.sha256").unlink(missing_ok=True)
    file = tmp_path / "saved" / "config.json"
    fields = json.loads(file.read_text())
    place = fields["audio_encoder"]
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    file.write_text(json.dumps(fields))
    with pytest.raises(UserError) as caught:
        type(model).from_pretrained(tmp_path / "saved")
    assert named in str(caught.value)
