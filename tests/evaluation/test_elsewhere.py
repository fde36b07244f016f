"""Evaluation of runs whose base models moved, and of exported directories."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from asrllm.evaluation.config import EvaluationRun
from asrllm.integrity import write_checksums
from asrllm.testing import data_config, kaldi_directory, tone_sentences
from tests.checkpoints.made import write_checkpoint
from tests.checkpoints.test_merge import run_of
from tests.composing import load_config
from tests.evaluation.test_run import whole_whisper
from tests.models.asr_llm.test_modeling import make_model
from tests.test_cli import does, fails

pytestmark = pytest.mark.slow

QUICK = (
    "step_timeout=0",
    "max_new_tokens=8",
    "precision=fp32",
    "report_audio=0",
    "decoding_method=greedy_search",
)
VARYING = ("rtfx", "weights", "generations")


@pytest.fixture(scope="module")
def places(world, tmp_path_factory):
    """A run whose base models moved from `old` to `new`, and its results before they moved."""
    root = tmp_path_factory.mktemp("elsewhere")
    old, new = root / "old", root / "new"
    old.mkdir()
    shutil.copytree(world.llm, old / "llm")
    base = SimpleNamespace(
        root=old, whisper=whole_whisper(old / "whisper"), zipformer=world.zipformer, llm=old / "llm"
    )
    model = make_model(base)
    # otherwise the texts do not depend on the audio
    torch.nn.init.normal_(model.projector.mlp.linear2.weight, std=1.0)
    exp = run_of(model, root / "exp")
    tests = root / "test.yaml"
    data_config(tests, [{"name": "test", "shards": str(world.root / "shards" / "test")}])
    expected = root / "expected"
    shutil.copytree(exp, expected)
    evaluate(expected, tests)
    old.rename(new)
    words = [
        f"model.audio_encoder.pretrained_model={new / 'whisper'}",
        f"model.llm.pretrained_model={new / 'llm'}",
    ]
    return SimpleNamespace(
        root=root, old=old, new=new, exp=exp, expected=expected, tests=tests, words=words
    )


def evaluate(exp, tests, *more):
    from asrllm.commands.evaluate import evaluate as run

    overrides = [f"exp_dir={exp}", f"data.test_data_config={tests}", *QUICK, *more]
    return run(load_config("evaluate", overrides, EvaluationRun))


def results_of(exp, suffix):
    found = json.loads((exp / "greedy_search" / f"results-{suffix}.json").read_text())["test"]
    baseline = found.get("baseline", {})
    baseline.pop("rtfx", None)
    return {name: value for name, value in found.items() if name not in VARYING}


def texts_of(exp, suffix):
    return (exp / "greedy_search" / f"generations-test-{suffix}.jsonl").read_text()


def test_run_is_evaluated_with_base_models_at_new_paths(places, tmp_path, capsys):
    exp = tmp_path / "exp"
    shutil.copytree(places.exp, exp)
    given = ("evaluate", f"exp_dir={exp}", f"data.test_data_config={places.tests}", *QUICK)
    error = fails(capsys, *given)
    assert str(places.old / "llm") in error
    assert "model.audio_encoder.pretrained_model=" in error
    assert "model.llm.pretrained_model=" in error
    printed = does(capsys, *given, *places.words)
    assert "Whisper: test: WER" in printed
    assert texts_of(exp, "pretrained") == texts_of(places.expected, "pretrained")
    assert results_of(exp, "pretrained") == results_of(places.expected, "pretrained")
    assert "baseline" in results_of(exp, "pretrained")
    assert len({json.loads(line)["hyp"] for line in texts_of(exp, "pretrained").splitlines()}) > 1


def test_a_changed_tokenizer_is_reported_before_checkpoints_are_averaged(places, tmp_path, capsys):
    exp = tmp_path / "exp"
    shutil.copytree(places.exp, exp)
    state = torch.load(exp / "pretrained.pt", weights_only=True)
    for step in (1, 2):
        write_checkpoint(exp / f"checkpoint-{step}", state, averaged=True)
    write_checksums(exp)
    tokenizer = exp / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    before = digests(exp)
    arguments = [f"exp_dir={exp}", f"data.test_data_config={places.tests}"]
    for name, value in {"iter": 2, "avg": 1, "use_averaged_model": "true"}.items():
        arguments.append(f"checkpoint.model.{name}={value}")
    error = fails(capsys, "evaluate", *arguments)
    assert repr(str(tokenizer)) in error
    assert digests(exp) == before


def digests(folder):
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.iterdir()
        if file.is_file()
    }


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_exported_directory_has_the_results_of_its_run(places, tmp_path, capsys, size):
    model = tmp_path / "model"
    does(
        capsys,
        "export",
        places.exp,
        *places.words,
        "--output",
        model,
        "--keep-adapters",
        "--dtype",
        "float32",
        "--max-shard-size",
        size,
    )
    assert (model / "model.safetensors").is_file() == (size == "5GB")
    before = digests(model)
    does(capsys, "evaluate", f"exp_dir={model}/", f"data.test_data_config={places.tests}", *QUICK)
    assert texts_of(model, "model") == texts_of(places.expected, "pretrained")
    assert results_of(model, "model") == results_of(places.expected, "pretrained")
    assert digests(model) == before
    error = fails(
        capsys,
        "evaluate",
        f"exp_dir={model}",
        f"data.test_data_config={places.tests}",
        "checkpoint.model.iter=4",
        "checkpoint.model.avg=1",
    )
    assert f"exp_dir={str(model)!r}" in error
    assert "checkpoint.model.iter" in error


def test_merged_export_needs_no_base_models(places, tmp_path, capsys):
    model = tmp_path / "model"
    does(
        capsys,
        "export",
        places.exp,
        *places.words,
        "--output",
        model,
        "--dtype",
        "float32",
    )
    given = ("evaluate", f"exp_dir={model}", f"data.test_data_config={places.tests}", *QUICK)
    error = fails(capsys, *given, places.words[1])
    assert "model.llm.pretrained_model=" in error
    assert str(model) in error
    does(capsys, *given)
    assert texts_of(model, "model") == texts_of(places.expected, "pretrained")


def test_transcripts_do_not_depend_on_the_paths_of_base_models(places, tmp_path, capsys):
    kaldi_directory(tmp_path / "kaldi", tone_sentences(3, seed=4))
    audio = sorted((tmp_path / "kaldi").rglob("*.wav"))
    assert audio
    options = ("--no-vad", "--max-new-tokens", 8)
    encoder, llm = places.words
    found = does(capsys, "transcribe", encoder, places.exp, *audio, *options, llm)
    does(
        capsys,
        "export",
        places.exp,
        *places.words,
        "--output",
        tmp_path / "model",
        "--dtype",
        "float32",
    )
    assert found == does(capsys, "transcribe", tmp_path / "model", *audio, *options)
    assert len({line.partition("\t")[2] for line in found.splitlines()}) > 1
    error = fails(capsys, "transcribe", places.exp, *audio, *options, encoder)
    assert "model.llm.pretrained_model=" in error
    assert "model.audio_encoder.pretrained_model=" not in error


def test_weights_file_without_base_models_is_evaluated(places, tmp_path):
    """`asrllm consolidate --output EXP/model.safetensors` writes only what was trained."""
    exp = tmp_path / "exp"
    shutil.copytree(places.exp, exp)
    save_file(torch.load(exp / "pretrained.pt", weights_only=True), exp / "model.safetensors")
    (exp / "pretrained.pt").unlink()
    choice = ("checkpoint.model.filename=model.safetensors", "whisper_baseline=false")
    evaluate(exp, places.tests, *choice, *places.words)
    assert texts_of(exp, "model") == texts_of(places.expected, "pretrained")
