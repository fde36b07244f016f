"""The benchmarks run; their results are not asserted.

`make soak` runs each benchmark but startup.py, whose commands are those of tests/test_startup.py.
Otherwise parts of them run once with the smallest sizes.
"""

import json
import sys

import psutil
import pytest
import torch

from tests.processes import REPOSITORY, assert_done, both_cores, run_forked
from tests.serving.test_api import audio, engine, running, text_alone  # noqa: F401 (a fixture)

BENCHMARKS = sorted((REPOSITORY / "benchmarks").glob("*.py"))


def run_benchmark(script, *arguments):
    with both_cores():  # some start ranks
        assert_done(run_forked([REPOSITORY / "benchmarks" / script, *arguments], timeout=250))


@pytest.fixture
def benchmark(monkeypatch):
    """Return a function that imports a benchmark by its name, like running it does."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))

    def load(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        module = __import__(name)
        monkeypatch.delitem(sys.modules, name)
        return module

    return load


@pytest.mark.slow
@pytest.mark.parametrize("script", BENCHMARKS, ids=lambda path: path.stem)
def test_every_benchmark_has_help(script):
    assert "--rounds" in assert_done(run_forked([script, "--help"])).stdout


@pytest.mark.slow
def test_compared_training_steps_agree_and_run(benchmark):
    module = benchmark("train_step")
    cpu = torch.device("cpu")
    assert module.agreement(module.FEW, cpu) < 1e-4
    for make_step in (
        module.variants(module.FEW, cpu) | module.loss_steps(cpu, module.FEW.loss_vocabulary)
    ).values():
        assert make_step()() > 0


@pytest.mark.slow
def test_compared_data_pipelines_read_the_same_utterances(benchmark, tmp_path):
    module = benchmark("data")
    module.make_corpus_files(tmp_path, 24)
    for pipeline in (module.bare, module.reading, *module.PIPELINES.values()):
        assert sum(batch.utterances for batch in pipeline(tmp_path, 0, 0.0)) == 24


@pytest.mark.slow
def test_no_corruption_is_silent_or_a_traceback(benchmark, tmp_path):
    """A part of the fault campaign."""
    table = benchmark("faults").damages(12, 0, tmp_path)
    assert len(table) == 6
    for what, outcomes in table.items():
        assert outcomes.keys() <= {"detected", "harmless"}, (what, outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(13))
def test_hostile_files_of_the_campaign_are_detected(benchmark, tmp_path, number):
    module = benchmark("faults")
    commands = [command for _, command in module.hostile(tmp_path)]
    assert len(commands) == 13
    assert module.try_hostile(commands[number], tmp_path / "ran") == "detected"


@pytest.mark.slow
def test_kill_of_the_campaign_is_harmless(benchmark, tmp_path):
    assert +benchmark("faults").kills(1, 0, tmp_path) == {"harmless": 1}


@pytest.mark.slow
@pytest.mark.soak(only=True)
def test_fault_campaign_has_no_bad_outcome(tmp_path):
    run_benchmark("faults.py", "--damages", 100, "--kills", 5, "--output", tmp_path / "r.json")


@pytest.mark.slow
def test_decoding_benchmark_runs(tmp_path):
    run_benchmark("decode.py", "--tiny", "--rounds", 1, "--output", tmp_path / "r.json")
    results = json.loads((tmp_path / "r.json").read_text())
    assert set(results["texts that differ"].values()) == {0}
    assert results["speed to others"]["one by one"] > 0


@pytest.mark.slow
def test_concurrent_clients_are_compared_with_one(benchmark, engine):  # noqa: F811
    module = benchmark("serve")
    files = [audio(1, seed=i) for i in range(3)]
    with running(engine, engine.model.config) as (url, _):
        server = module.Server(psutil.Process(), url, "tiny")
        speed, texts = module.compare_speed(server, files, 3.0, clients=3, rounds=1)
        memory = module.measure_memory(server, files, clients=2, requests=10)
    assert texts == [text_alone(engine, file) for file in files]
    assert speed["texts that differ from those alone"] == 0
    assert speed["latency p50 in s"] <= speed["latency p95 in s"]
    assert memory["memory ratio"] > 0


@pytest.mark.slow
@pytest.mark.soak(only=True)
def test_serving_benchmark_loses_no_request(tmp_path):
    run_benchmark("serve.py", "--tiny", "--output", tmp_path / "r.json")
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["texts that differ from those alone"] == 0
    assert results["SIGTERM under load"]["lost"] == 0
    assert results["SIGTERM under load"]["exit status"] == 0


@pytest.mark.slow
@pytest.mark.soak(only=True)
def test_training_step_benchmark_runs(tmp_path):
    run_benchmark("train_step.py", "--tiny", "--rounds", 1, "--output", tmp_path / "r.json")
    results = json.loads((tmp_path / "r.json").read_text())
    assert set(results["steps"]) > {"padded to 30 s, float32", "packed, float32", "packed, bf16"}
    for step in results["steps"].values():
        assert step["seconds"] > 0
        assert step["MFU"] > 0


@pytest.mark.slow
@pytest.mark.soak(only=True)
def test_saving_benchmark_runs(tmp_path):
    run_benchmark(
        "saving.py",
        "--tiny",
        "--rounds",
        1,
        "--steps",
        13,
        "--every",
        4,
        "--output",
        tmp_path / "r.json",
    )
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["ratios to it"]["beside training"]["saves"] > 0


@pytest.mark.slow
@pytest.mark.soak(only=True)
def test_data_benchmark_runs(tmp_path):
    run_benchmark(
        "data.py",
        "--utterances",
        64,
        "--rounds",
        1,
        "--rows",
        6400,
        "--output",
        tmp_path / "r.json",
    )
    results = json.loads((tmp_path / "r.json").read_text())
    assert "one worker to the bare loop" in results["reading"]["ratios"]
    assert results["index of 6400 rows of 24 bytes"]["milliseconds to plan a step"] > 0


@pytest.mark.slow
@pytest.mark.soak(only=True)
def test_checkpoint_tools_benchmark_runs(tmp_path):
    run_benchmark("checkpoints.py", "--tiny", "--rounds", 1, "--output", tmp_path / "r.json")
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["peak MiB"].keys() == results["seconds"].keys()
    assert min(results["seconds per GB"].values()) >= 0
    assert results["ratios"]["consolidate to deepspeed, peak"] > 0


@pytest.mark.slow
@pytest.mark.soak(only=True)
def test_warm_start_benchmark_runs(world, tmp_path):
    keys = world.overrides(tmp_path / "exp", trainer__precision="fp32")
    (tmp_path / "keys").write_text("\n".join(keys))
    arguments = ["--rounds", 1, "--steps", 4, "--every", 2, "--output", tmp_path / "r.json"]
    run_benchmark("warm_start.py", tmp_path / "keys", *arguments)
    results = json.loads((tmp_path / "r.json").read_text())
    for kind in ("random", "aligned"):
        assert [point["step"] for point in results["curves"][kind][0]] == [2, 4]


@pytest.mark.slow
@pytest.mark.soak(only=True)
def test_encoders_benchmark_runs(tmp_path):
    arguments = ["--rounds", 1, "--layers", 1, "--output", tmp_path / "r.json"]
    run_benchmark("encoders.py", *arguments)
    results = json.loads((tmp_path / "r.json").read_text())
    for name, encoder in results["encoders"].items():
        assert encoder["leak of ours"] < 1e-4, name
        assert encoder["seconds of ours"] > 0, name
