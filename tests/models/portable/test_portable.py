"""A saved directory in an environment without this package."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from asrllm import AutoModel
from asrllm.errors import UserError
from asrllm.models.portable.bundle import Bundle
from asrllm.models.portable.files import code_files
from tests.models.asr_llm.test_generation import make_model, waves_of
from tests.models.asr_llm.test_serialization import lora_model

# `asrllm` cannot be imported: everything comes from the directory
SCRIPT = """
import json, sys
sys.modules["asrllm"] = None
import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

folder, waves = sys.argv[1:]
waves = [wave for wave in np.load(waves).values()]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
inputs = processor.apply_transcription_request(audio=waves)
options = {"max_new_tokens": 10, "max_tokens_per_second": None}
texts = processor.batch_decode(model.generate(**inputs, **options), skip_special_tokens=True)
alone = processor(audio=waves[0])
first = processor(waves[0], sampling_rate=16000, return_tensors="pt")  # as transformers serve
chat = processor(text="<|AUDIO|> Say.", audio=waves[0])
parts = [{"type": "audio", "audio": waves[0]}, {"type": "text", "text": "Say."}]
messages = [{"role": "user", "content": parts}]
inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
both = processor.apply_chat_template([messages, messages], tokenize=True)
BAD_CONTENTS = [None, ["x"], [{"type": "audio"}], [{"type": "audio", "audio": None}], 5]


def rejected(content):
    try:
        processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True)
    except Exception as error:
        return type(error).__name__


transcribe = pipeline("automatic-speech-recognition", model=folder, trust_remote_code=True)
results = {
    "texts": texts,
    "piped": [transcribe(dict(raw=w, sampling_rate=16000), **options)["text"] for w in waves[:2]],
    "logits": model(**alone).logits[0, -1].tolist(),
    "prompt": chat["input_ids"][0].tolist(),
    "chat": inputs["input_ids"][0].tolist(),
    "same features": bool((inputs["input_features"] == chat["input_features"]).all()),
    "same inputs": all(bool((first[name] == alone[name]).all()) for name in alone),
    "rows": len(both),
    "rejected": [rejected(content) for content in BAD_CONTENTS],
    "text": processor.apply_chat_template(messages),
    "type": type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__,
}
print(json.dumps(results))
"""

# applies the separate adapter of a saved directory, without this package
WITH_ADAPTER = """
import json, sys
sys.modules["asrllm"] = None
import numpy as np
from peft import PeftModel
from transformers import AutoModel, AutoProcessor

folder, waves = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
inputs = processor.apply_transcription_request(audio=list(np.load(waves).values())[:1])
before = base(**inputs).logits[0, -1].tolist()
model = PeftModel.from_pretrained(base, folder + "/adapter").eval()
print(json.dumps({"before": before, "after": model(**inputs).logits[0, -1].tolist()}))
"""


@pytest.fixture(params=[("whisper", "mlp"), ("zipformer", "qformer")], ids=" ".join)
def model(world, request):
    encoder, projector = request.param
    return make_model(world, world.llm, encoder=encoder, projector=projector)


@pytest.mark.slow
def test_kept_silence_gives_the_same_texts_without_the_package(world, tmp_path):
    model = make_model(world, world.llm, projector="voxtral", pad_to_30s="keep_silence")
    waves = waves_of(2)
    model.save_pretrained(tmp_path / "saved")
    np.savez(tmp_path / "waves.npz", *waves)
    done = run_without_package(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["texts"] == model.transcribe(waves, max_new_tokens=10, max_tokens_per_second=None)
    assert found["prompt"].count(model.config.audio_token_id) == 375


@pytest.mark.slow
def test_saved_directory_gives_the_same_texts_without_the_package(model, tmp_path):
    waves = waves_of(5)
    model.save_pretrained(tmp_path / "saved")
    np.savez(tmp_path / "waves.npz", *waves)
    done = run_without_package(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    texts = model.transcribe(waves, max_new_tokens=10, max_tokens_per_second=None)
    assert found["texts"] == texts
    assert found["piped"] == texts[:2]
    assert found["type"] == "AsrLlmHubConfig"
    chat = [{"role": "user", "content": "<|AUDIO|> Say."}]
    _, samples = model.processor.load_waves(waves[:1])
    counts = model.config.num_audio_tokens(samples).tolist()
    assert found["prompt"] == model.processor.encode_prompts([chat], [1], counts)[0]
    assert found["chat"] == found["prompt"]
    assert (found["same features"], found["same inputs"], found["rows"]) == (True, True, 2)
    assert found["text"].count("<|AUDIO|>") == 1
    assert found["rejected"] == [*["UserError"] * 2, *["ValueError"] * 2, "UserError"]
    logits = first_logits(model, waves[0])
    torch.testing.assert_close(torch.tensor(found["logits"]), logits, atol=1e-4, rtol=1e-4)


def first_logits(model, wave):
    """Return the logits (vocabulary,) of the first token of a transcription."""
    seen = []
    hook = model.llm.register_forward_hook(lambda _, __, output: seen.append(output.logits[0, -1]))
    model.transcribe([wave], max_new_tokens=1)
    hook.remove()
    return seen[0]


@pytest.mark.slow
def test_separate_adapter_is_applied_by_peft(world, tmp_path):
    model = lora_model(world, rank_pattern={"q_proj": 2}, use_rslora=True)
    waves = waves_of(1)
    model.save_pretrained(tmp_path / "saved", separate_adapter=True)
    np.savez(tmp_path / "waves.npz", *waves)
    done = run_without_package(tmp_path, WITH_ADAPTER)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    with model.llm.disable_adapter():
        before = first_logits(model, waves[0])
    after = first_logits(model, waves[0])
    assert (before - after).abs().max() > 0.1
    for logits, expected in ((found["before"], before), (found["after"], after)):
        torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match=r"saved.*'adapter'.*--separate-adapter"):
        AutoModel.from_pretrained(tmp_path / "saved")


def test_only_an_adapter_of_a_stored_llm_is_separated(world, model, tmp_path):
    with pytest.raises(UserError, match="adapter"):
        model.save_pretrained(tmp_path / "saved", separate_adapter=True)
    adapted = lora_model(world)
    adapted.config.exclude_from_checkpoint = ["llm"]
    with pytest.raises(UserError, match=r"exclude_from_checkpoint.* llm"):
        adapted.save_pretrained(tmp_path / "saved", separate_adapter=True)
    assert not (tmp_path / "saved").exists()


@pytest.mark.slow
def test_code_of_another_version_is_rejected(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    path.write_text(path.read_text().replace('"code_version": "', '"code_version": "9'))
    np.savez(tmp_path / "waves.npz", *waves_of(1))
    done = run_without_package(tmp_path)
    assert done.returncode == 1
    assert "ValueError" in done.stderr
    assert str(config_of(path)["code_version"]) in done.stderr


def config_of(path):
    return json.loads(path.read_text())


def run_without_package(folder, script=SCRIPT):
    """Run a script on folder/saved and folder/waves.npz."""
    return subprocess.run(
        [sys.executable, "-c", script, folder / "saved", folder / "waves.npz"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "PATH": ""},
        timeout=150,
    )


def test_saved_directory_has_no_path_of_this_machine(model, tmp_path, world):
    model.save_pretrained(tmp_path / "saved")
    for path in (tmp_path / "saved").iterdir():
        if path.suffix in (".json", ".py", ".jinja"):
            assert str(world.root) not in path.read_text(), path.name


def test_code_is_complete_and_uses_nothing_else():
    for encoder in ("whisper", "zipformer"):
        for name, text in code_files(encoder).items():
            compile(text, name, "exec")
            assert "asrllm." not in text.replace("transformers_modules", ""), name


def test_bundle_has_what_an_entry_point_uses_and_no_more():
    bundle = Bundle([("asrllm.audio.features", "whisper_frames")])
    names = {}
    exec(bundle.text("test"), names)
    assert names["whisper_frames"](16000) == 100
    assert "KaldiFeatures" not in names
