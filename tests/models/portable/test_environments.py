"""Saved models in environments that have torch and transformers, but not this package."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from asrllm.testing import tone_sentences
from tests.conftest import REPOSITORY, made_once
from tests.models.asr_llm.test_generation import make_model
from tests.models.portable.environments import DONE, name_of, requirements

ENVIRONMENTS = REPOSITORY / ".venv-portable"
UTTERANCES = 200
BATCH = 20
BATCH_SECONDS = 20.0  # larger batches in float64 spend more time in page faults than in layers
ENCODERS = ("whisper", "zipformer")
# the texts of each model directory, by the way to load it
SCRIPT = """
import json, sys
import numpy as np
import torch
import transformers
from importlib.util import find_spec
from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor, pipeline

assert find_spec("asrllm") is None
waves = list(np.load(sys.argv[1]).values())
count, batch = map(int, sys.argv[2:4])
trusted = {"trust_remote_code": True}

def texts_of(folder):
    processor = AutoProcessor.from_pretrained(folder, **trusted)
    results = {}
    for auto, number in ((AutoModel, count), (AutoModelForMultimodalLM, batch)):
        model = auto.from_pretrained(folder, dtype=torch.float64, **trusted)
        texts = []
        for i in range(0, number, batch):
            audio = waves[i : i + batch]
            inputs = processor.apply_transcription_request(audio=audio).to(torch.float64)
            texts += processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)
        results[auto.__name__] = texts
    transcribe = pipeline(
        "automatic-speech-recognition", model=folder, dtype=torch.float64, **trusted
    )
    audio = [{"raw": w, "sampling_rate": 16000} for w in waves[:batch]]
    results["pipeline"] = [transcribe(item)["text"] for item in audio]
    return results

results = {folder: texts_of(folder) for folder in sys.argv[4:]}
print(json.dumps({"version": transformers.__version__, "results": results}))
"""


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory) -> Path:
    """Return a directory with waveforms, saved models, and this package's texts of them."""

    def save(folder: Path) -> None:
        waves = [wave for _, wave in tone_sentences(UTTERANCES, seed=7)]
        np.savez(folder / "waves.npz", *waves)
        for encoder in ENCODERS:
            model = make_model(world, world.llm, encoder=encoder)
            model.save_pretrained(folder / encoder)
            # a text of random weights depends on rounding in float32
            texts = model.double().transcribe(waves, batch_seconds=BATCH_SECONDS)
            (folder / f"{encoder}.json").write_text(json.dumps(texts))

    return made_once(tmp_path_factory, "portable", save)


@pytest.mark.slow
@pytest.mark.longest(120, reason="imports torch in another environment")
@pytest.mark.parametrize("requirement", requirements())
def test_texts_are_those_of_the_package(saved, tmp_path, requirement):
    """The first environment decodes all utterances, the others one batch of them."""
    environment = ENVIRONMENTS / name_of(requirement)
    if not (environment / DONE).exists():
        pytest.skip("make test-portable makes the environments")
    count = UTTERANCES if requirement == requirements()[0] else BATCH
    folders = [str(saved / encoder) for encoder in ENCODERS]
    python = environment / "bin" / "python"
    done = subprocess.run(
        [python, "-c", SCRIPT, saved / "waves.npz", str(count), str(BATCH), *folders],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert f"transformers=={found['version']}" in requirement
    for encoder, folder in zip(ENCODERS, folders, strict=True):
        texts = json.loads((saved / f"{encoder}.json").read_text())
        assert len(set(texts)) > UTTERANCES // 5
        assert len(found["results"][folder]) == 3
        for way, theirs in found["results"][folder].items():
            same = sum(map(str.__eq__, theirs, texts))
            assert same == len(theirs), f"{encoder}, {way}: {same} of {len(theirs)} texts are equal"
            assert len(theirs) == (count if way == "AutoModel" else BATCH)
