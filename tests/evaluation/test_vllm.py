"""Models in vLLM: the plugin, the engine and both servers, in an environment of its own."""

import base64
import contextlib
import io
import json
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import numpy as np
import psutil
import pytest
import soundfile
import torch

from asrllm import AutoModel
from asrllm.evaluation.engine import TorchEngine
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.pretrained import with_lora
from asrllm.testing import data_config, tiny_llm, tone_sentences
from tests.conftest import REPOSITORY
from tests.models.asr_llm.test_generation import make_model
from tests.models.encoders.test_hf_model import model_of
from tests.models.portable.environments import DONE, name_of, requirements
from tests.processes import descendants, free_port, wait_for
from tests.test_cli import does, fails

(REQUIREMENT,) = requirements(REPOSITORY / "tests" / "evaluation" / "vllm_versions.txt")
ENVIRONMENT = REPOSITORY / ".venv-vllm" / name_of(REQUIREMENT)
PYTHON = ENVIRONMENT / "bin" / "python"
UTTERANCES = 200
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
OPTIONS = {"max_new_tokens": 12, "max_tokens_per_second": 3.0, "repetition_guard": 4}
LOADING = 240  # seconds for the imports of vLLM in several processes
SCRIPT = """
import json, sys
import numpy as np
from asrllm.evaluation.vllm.engine import load_vllm_engine

engine = load_vllm_engine(sys.argv[1], json.loads(sys.argv[3]), dtype="float32")
waves = list(np.load(sys.argv[2]).values())
answers = engine.answer(waves, ["Transcribe."] * len(waves))
engine.close()
print(json.dumps([[answer.text, answer.end] for answer in answers]))
"""
PER_REQUEST = """
import json, sys
import numpy as np
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

folder, waves, tokens = sys.argv[1:]
llm = LLM(folder, dtype="float32", max_model_len=512, enable_lora=True, max_lora_rank=8)
requests = [
    {"prompt_token_ids": json.loads(tokens), "multi_modal_data": {"audio": (wave, 16000)}}
    for wave in np.load(waves).values()
]
greedy = SamplingParams(temperature=0, max_tokens=12)


def tokens_of(adapter):
    answers = llm.generate(requests, greedy, lora_request=adapter)
    return [list(answer.outputs[0].token_ids) for answer in answers]


found = [tokens_of(None), tokens_of(LoRARequest("speech", 1, folder + "/adapter"))]
del llm  # whose processes print as they end
print("\\n" + json.dumps(found))
"""
DIVIDED = """
import json, sys
import numpy as np
from vllm import LLM, SamplingParams

if __name__ == "__main__":  # vLLM starts a process for each rank with this file
    folder, waves, tokens = sys.argv[1:]
    llm = LLM(folder, dtype="float32", max_model_len=512, tensor_parallel_size=2)
    requests = [
        {"prompt_token_ids": json.loads(tokens), "multi_modal_data": {"audio": (wave, 16000)}}
        for wave in np.load(waves).values()
    ]
    answers = llm.generate(requests, SamplingParams(temperature=0, max_tokens=12))
    found = [list(answer.outputs[0].token_ids) for answer in answers]
    del llm  # whose processes print as they end
    print("\\n" + json.dumps(found))
"""
in_vllm = pytest.mark.skipif(
    not (ENVIRONMENT / DONE).exists(), reason="make test-vllm makes the environment"
)
vllm_test = [
    in_vllm,
    pytest.mark.slow,
    pytest.mark.timeout(2 * LOADING),
    pytest.mark.longest(LOADING, reason="imports vLLM in up to four processes"),
]


@pytest.fixture(scope="module")
def tiny(world, tmp_path_factory):
    """An exported model whose audios have embeddings before and after them."""
    root = tmp_path_factory.mktemp("vllm")
    llm = tiny_llm(root / "llm", tied=False, head_dim=32)
    model = make_model(world, llm)
    model.config.tag_audio_boundary = True
    model = with_boundary(model)
    model.save_pretrained(root / "tiny")
    return SimpleNamespace(folder=root / "tiny", llm=llm, model=model)


def with_boundary(model):
    """Return a model with the same weights, and embeddings before and after each audio."""
    processor = model.processor
    boundary = AsrLlmModel(model.config, model.audio_encoder, model.llm).eval()
    boundary.projector.mlp = model.projector.mlp
    torch.nn.init.normal_(boundary.projector.boundary)
    boundary.processor = processor
    return boundary


def environment(tmp_path, **more):
    """Return the environment variables of a process with vLLM."""
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "VLLM_CACHE_ROOT": str(ENVIRONMENT / "cache"),  # what vLLM learned about the model's class
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        **more,
    }


def run(tmp_path, *words, **more):
    """Run a Python command with vLLM, and return its standard output."""
    done = subprocess.run(
        [str(word) for word in (PYTHON, *words)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(tmp_path, **more),
        timeout=LOADING,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout


def with_adapters(world, llm):
    """Return a model with a Zipformer and adapters that change its texts."""
    model = make_model(world, llm, encoder="zipformer")
    model.llm = with_lora(model.llm, LORA)
    model.config.lora = LORA
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize(
    "kind", ["whisper with boundaries", "zipformer with adapters", "wav2vec2-bert with Q-Former"]
)
class TestEngine:
    pytestmark = vllm_test

    def test_answers_are_those_of_our_own_engine(self, world, tiny, tmp_path, kind):
        model, folder = tiny.model, tiny.folder
        if kind == "zipformer with adapters":  # which the engine merges
            model, folder = with_adapters(world, tiny.llm), tmp_path / "adapted"
            model.save_pretrained(folder)
        if kind == "wav2vec2-bert with Q-Former":
            parts = {"projector": "qformer", "projector_hidden_size": 64}
            parts["llm"] = {"pretrained_model": str(tiny.llm), "lora": None}
            case = "wav2vec2-bert adapter"
            model, folder = model_of(world, tmp_path / "encoder", case, **parts), tmp_path / "hf"
            model.save_pretrained(folder)
        waves = [wave for _, wave in tone_sentences(UTTERANCES, seed=7)]
        np.savez(tmp_path / "waves.npz", *waves)
        output = run(tmp_path, "-c", SCRIPT, folder, tmp_path / "waves.npz", json.dumps(OPTIONS))
        found = json.loads(output.splitlines()[-1])
        ours = TorchEngine(model, OPTIONS).answer(waves, ["Transcribe."] * UTTERANCES)
        expected = [[answer.text, answer.end] for answer in ours]
        assert len({text for text, _ in expected}) > UTTERANCES // 5
        assert len({end for _, end in expected}) > 1
        same = sum(map(list.__eq__, found, expected))
        assert same >= 0.99 * UTTERANCES  # float32 sums in another order may swap equal logits


class TestTensorParallel:
    pytestmark = vllm_test

    def test_llm_of_a_model_that_keeps_silence_is_divided_over_two_ranks(
        self, world, tiny, tmp_path
    ):
        model = make_model(world, tiny.llm, pad_to_30s="keep_silence")
        model.save_pretrained(tmp_path / "model")
        # 12 s or more each: with less the text would be that of the silence
        sentences = [wave for _, wave in tone_sentences(200, seed=7)]
        waves = [np.concatenate(sentences[i : i + 20]) for i in range(0, 200, 20)]
        np.savez(tmp_path / "waves.npz", *waves)
        renderer = model.processor.renderer
        tokens = renderer.encode_prompt(renderer.user_messages("Transcribe."), [1])
        (tmp_path / "divided.py").write_text(DIVIDED)
        arguments = [tmp_path / "model", tmp_path / "waves.npz", json.dumps(tokens)]
        # by default vLLM puts each rank on a memory node of its own
        cores = "|".join(map(str, (sorted(os.sched_getaffinity(0)) * 2)[:2]))
        output = run(tmp_path, tmp_path / "divided.py", *arguments, VLLM_CPU_OMP_THREADS_BIND=cores)
        found = json.loads(output.splitlines()[-1])
        options = {"max_new_tokens": 12, "max_tokens_per_second": None, "repetition_guard": None}
        expected = model.transcribe(waves, **options)
        assert len(set(expected)) > len(waves) // 5
        texts = model.processor.tokenizer.batch_decode(found, skip_special_tokens=True)
        same = sum(text.strip() == own for text, own in zip(texts, expected, strict=True))
        assert same >= len(waves) - 1  # float32 sums in another order may swap equal logits


class TestEvaluation:
    pytestmark = vllm_test

    def test_results_are_those_of_our_own_engine(self, world, tiny, tmp_path, capsys):
        data_config(
            tmp_path / "test.yaml", [{"name": "test", "shards": str(world.root / "shards/test")}]
        )
        words = ["whisper_baseline=false", "precision=fp32", "max_new_tokens=8", "step_timeout=0"]
        words.append(f"data.test_data_config={tmp_path / 'test.yaml'}")
        results = {}
        for engine in ("torch", "vllm"):
            folder = tmp_path / engine
            tiny.model.save_pretrained(folder)
            command = ["evaluate", f"exp_dir={folder}", f"engine={engine}", *words]
            if engine == "vllm":
                run(tmp_path, "-m", "asrllm", *command)
            else:
                does(capsys, *command)
            results[engine] = (folder / "greedy_search" / "recogs-test-model.txt").read_text()
        assert results["vllm"] == results["torch"]


@contextlib.contextmanager
def served(tmp_path, *words):
    """Start a server with vLLM on a free port, and yield its address and process."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(word) for word in (PYTHON, *words, "--port", port)]
    log = tmp_path / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=tmp_path, env=environment(tmp_path)
        )

        def is_ready():
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(f"{url}/health").status_code == 200
            return server.poll() is not None

        try:
            wait_for(is_ready, LOADING)
            assert server.poll() is None, log.read_text()[-3000:]
            yield url, server
        finally:
            everything = descendants(server.pid)
            server.kill()
            server.wait()
            for child in everything:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()


def wav(wave):
    """Return the bytes of a recording with the same samples."""
    file = io.BytesIO()
    soundfile.write(file, wave, 16000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def transcribe(url, content, **fields):
    """Send a request for a transcript."""
    return httpx.post(
        f"{url}/v1/audio/transcriptions",
        files={"file": ("a.wav", content)},
        data={"model": "tiny", **fields},
        timeout=60,
    )


class TestServers:
    pytestmark = vllm_test

    def test_plugin_serves_transcripts_and_chats_in_vllm(self, tiny, tmp_path):
        waves = [wave for _, wave in tone_sentences(8, seed=3)]
        options = {"max_new_tokens": 12}
        expected = TorchEngine(tiny.model, options).answer(waves, ["Transcribe."] * len(waves))
        words = ["-m", "vllm.entrypoints.openai.api_server", "--model", tiny.folder]
        words += ["--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", 1024]
        with served(tmp_path, *words, "--enforce-eager") as (url, _):
            with ThreadPoolExecutor(8) as threads:
                answers = list(
                    threads.map(
                        lambda wave: transcribe(url, wav(wave), max_completion_tokens=12), waves
                    )
                )
            texts = [answer.json()["text"] for answer in answers]
            # vLLM leaves out an incomplete character at the end
            assert texts == [a.text.rstrip("\ufffd") for a in expected]
            chat = chat_tokens(url, waves[0], "Write this.")
            samples = len(waves[0])
            count = tiny.model.config.num_audio_tokens(samples)
            renderer = tiny.model.processor.renderer
            assert chat == renderer.encode_prompt(renderer.user_messages("Write this."), [count])
            assert transcribe(url, wav(waves[0][:100])).status_code == 400
            for fields in ({"hotwords": "@a"}, {"hotwords": "a"}, {"language": "en"}):
                (name,) = fields
                assert name in rejection(transcribe(url, wav(waves[0]), **fields))
            translation = httpx.post(
                f"{url}/v1/audio/translations",
                files={"file": ("a.wav", wav(waves[0]))},
                data={"model": "tiny"},
                timeout=60,
            )
            assert "translate" in rejection(translation)

    def test_our_server_runs_vllm(self, tiny, tmp_path):
        waves = [wave for _, wave in tone_sentences(8, seed=3)]
        options = {"max_new_tokens": 12, "max_tokens_per_second": 12, "repetition_guard": 32}
        expected = TorchEngine(tiny.model, options).answer(waves, ["Transcribe."] * len(waves))
        words = ["-m", "asrllm", "serve", tiny.folder, "--engine", "vllm", "--no-vad"]
        with served(tmp_path, *words, "--max-new-tokens", 12) as (url, server):
            with ThreadPoolExecutor(8) as threads:
                answers = list(threads.map(lambda wave: transcribe(url, wav(wave)), waves))
            assert [answer.json()["text"] for answer in answers] == [a.text for a in expected]
            server.terminate()
            assert server.wait(60) == 0
        assert "Traceback" not in (tmp_path / "log").read_text()


def chat_tokens(url, wave, text):
    """Return the tokens of the prompt that vLLM makes of a chat's audio and text."""
    audio = {"data": base64.b64encode(wav(wave)).decode(), "format": "wav"}
    content = [{"type": "input_audio", "input_audio": audio}, {"type": "text", "text": text}]
    answer = httpx.post(
        f"{url}/v1/chat/completions",
        json={
            "model": "tiny",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 1,
            "return_token_ids": True,
        },
        timeout=60,
    )
    return answer.json()["prompt_token_ids"]


def rejection(answer):
    """Return the message of a request that was rejected."""
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]["message"]


def test_missing_vllm_is_reported_before_the_model_loads(tiny, capsys, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(16000, dtype=np.float32), 16000)
    error = fails(capsys, "transcribe", tiny.folder, tmp_path / "a.wav", "--engine", "vllm")
    assert "engine=vllm" in error
    assert re.search(r"vLLM \d", error)


def test_options_that_vllm_does_not_have_are_reported(tiny, capsys, tmp_path):
    data_config(tmp_path / "test.yaml", [])
    words = [f"exp_dir={tiny.folder}", f"data.test_data_config={tmp_path / 'test.yaml'}"]
    words += ["engine=vllm", "decoding_method=beam_search"]
    error = fails(capsys, "evaluate", *words)
    assert "decoding_method=beam_search" in error
    assert "engine=vllm" in error


@pytest.mark.slow
def test_exported_adapters_are_merged_texts_do_not_change(tiny, world, tmp_path):
    """The engine of vLLM saves a model with adapters in this way."""
    model = with_adapters(world, tiny.llm)
    waves = [wave for _, wave in tone_sentences(4)]
    expected = model.transcribe(waves)
    model.save_pretrained(tmp_path / "merged", merge_adapter=True)
    assert AutoModel.from_pretrained(tmp_path / "merged").transcribe(waves) == expected


class TestAdapter:
    pytestmark = vllm_test

    def test_separate_adapter_is_applied_per_request(self, world, tiny, tmp_path):
        model = with_adapters(world, tiny.llm)
        model.save_pretrained(tmp_path / "model", separate_adapter=True)
        waves = [wave for _, wave in tone_sentences(20, seed=7)]
        np.savez(tmp_path / "waves.npz", *waves)
        renderer = model.processor.renderer
        tokens = renderer.encode_prompt(renderer.user_messages("Transcribe."), [1])
        arguments = [tmp_path / "model", tmp_path / "waves.npz", json.dumps(tokens)]
        found = json.loads(run(tmp_path, "-c", PER_REQUEST, *arguments).splitlines()[-1])
        texts = [model.processor.tokenizer.batch_decode(r, skip_special_tokens=True) for r in found]
        options = {"max_new_tokens": 12, "max_tokens_per_second": None, "repetition_guard": None}
        with model.llm.disable_adapter():
            expected = [model.transcribe(waves, **options)]
        expected.append(model.transcribe(waves, **options))
        assert expected[0] != expected[1]
        for theirs, own in zip(texts, expected, strict=True):
            same = sum(text.strip() == expected for text, expected in zip(theirs, own, strict=True))
            assert same >= len(waves) - 1  # float32 sums in another order may swap equal logits
