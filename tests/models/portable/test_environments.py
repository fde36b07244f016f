"""Saved models in environments that have torch and transformers, but not this package."""

import json
import subprocess

import numpy as np
import pytest

from asrllm.testing import tone_sentences
from tests.conftest import REPOSITORY
from tests.models.asr_llm.test_generation import make_model
from tests.models.portable.environments import DONE, name_of, requirements

ENVIRONMENTS = REPOSITORY / ".venv-portable"
UTTERANCES = 200
BATCH = 20
SCRIPT = """
import json, sys
import numpy as np
import torch
import transformers
from importlib.util import find_spec
from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor, pipeline

assert find_spec("asrllm") is None
folder, waves, batch = sys.argv[1], list(np.load(sys.argv[2]).values()), int(sys.argv[3])
trusted = {"trust_remote_code": True}
processor = AutoProcessor.from_pretrained(folder, **trusted)
results = {"version": transformers.__version__}
for auto, count in ((AutoModel, len(waves)), (AutoModelForMultimodalLM, batch)):
    model = auto.from_pretrained(folder, dtype=torch.float64, **trusted)
    texts = []
    for i in range(0, count, batch):
        inputs = processor.apply_transcription_request(audio=waves[i : i + batch]).to(torch.float64)
        texts += processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)
    results[auto.__name__] = texts
transcribe = pipeline("automatic-speech-recognition", model=folder, dtype=torch.float64, **trusted)
audio = [{"raw": w, "sampling_rate": 16000} for w in waves[:batch]]
results["pipeline"] = [transcribe(item)["text"] for item in audio]
print(json.dumps(results))
"""


@pytest.mark.slow
@pytest.mark.longest(120, reason="imports torch in another environment")
@pytest.mark.parametrize("encoder", ["whisper", "zipformer"])
@pytest.mark.parametrize("requirement", requirements())
def test_texts_are_those_of_the_package(world, tmp_path, requirement, encoder):
    environment = ENVIRONMENTS / name_of(requirement)
    if not (environment / DONE).exists():
        pytest.skip("make test-portable makes the environments")
    waves = [wave for _, wave in tone_sentences(UTTERANCES, seed=7)]
    model = make_model(world, world.llm, encoder=encoder)
    model.save_pretrained(tmp_path / "saved")
    np.savez(tmp_path / "waves.npz", *waves)
    python = environment / "bin" / "python"
    done = subprocess.run(
        [python, "-c", SCRIPT, tmp_path / "saved", tmp_path / "waves.npz", str(BATCH)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert f"transformers=={found.pop('version')}" in requirement
    # a text of random weights depends on rounding in float32
    texts = model.double().transcribe(waves)
    assert len(set(texts)) > UTTERANCES // 5
    for way, theirs in found.items():
        same = sum(map(str.__eq__, theirs, texts))
        assert same == len(theirs), f"{way}: {same} of {len(theirs)} texts are equal"
        assert len(theirs) == (UTTERANCES if way == "AutoModel" else BATCH)
