"""Batches that are decoded at the same time give the texts of one after the other."""

import threading

import pytest
import torch

from asrllm.models.asr_llm import generation
from asrllm.models.asr_llm.parallel_batches import PARALLEL, map_batches, parallel_batches
from asrllm.testing import tiny_llm
from tests.models.asr_llm.test_generation import make_model, waves_of


@pytest.fixture
def cores():
    """Let torch use as many threads as there are parallel batches."""
    before = torch.get_num_threads()
    torch.set_num_threads(PARALLEL)
    yield
    torch.set_num_threads(before)


def test_batches_run_at_the_same_time_and_results_are_in_order(cores):
    barrier = threading.Barrier(PARALLEL, timeout=20)

    def decode(i):
        barrier.wait()
        return i, torch.get_num_threads()

    count = 4 * PARALLEL
    assert list(map_batches(decode, range(count), PARALLEL)) == [(i, 1) for i in range(count)]
    assert torch.get_num_threads() == PARALLEL


def test_batches_may_be_more_than_the_cores_that_are_left(cores):
    torch.set_num_threads(1)  # since the engine chose how many batches
    assert list(map_batches(str, range(3), PARALLEL)) == ["0", "1", "2"]
    assert torch.get_num_threads() == 1


def test_few_batches_are_taken_ahead(cores):
    taken = []
    results = map_batches(str, iter(lambda: taken.append(0) or len(taken), 100), PARALLEL)
    assert next(results) == "1"
    assert len(taken) == PARALLEL + 1
    results.close()
    assert torch.get_num_threads() == PARALLEL


def test_error_of_a_batch_ends_the_others(cores):
    begun = []

    def decode(i):
        begun.append(i)
        if i == 1:
            raise MemoryError(i)
        return i

    results = map_batches(decode, range(100), PARALLEL)
    assert next(results) == 0
    with pytest.raises(MemoryError, match="1"):
        list(results)
    assert len(begun) <= 2 * PARALLEL + 1
    assert torch.get_num_threads() == PARALLEL


def test_only_batches_on_several_cores_of_the_cpu_are_parallel(cores):
    assert parallel_batches(torch.device("cpu"), samples=False) == PARALLEL
    assert parallel_batches(torch.device("cuda"), samples=False) == 1
    torch.set_num_threads(1)
    assert parallel_batches(torch.device("cpu"), samples=False) == 1


@pytest.mark.slow
def test_texts_do_not_depend_on_the_threads(world, tmp_path, cores, monkeypatch):
    model = make_model(world, tiny_llm(tmp_path / "llm", tied=False))
    waves = waves_of(12)
    threads = set()
    decode = generation.decode

    def noted(*arguments):
        threads.add(threading.current_thread().name)
        assert not torch.is_grad_enabled()
        return decode(*arguments)

    monkeypatch.setattr(generation, "decode", noted)
    together = model.transcribe(waves, 12, batch_seconds=3.0)
    assert len(threads) == PARALLEL
    torch.set_num_threads(1)
    assert model.transcribe(waves, 12, batch_seconds=3.0) == together
    assert len(set(together)) > 6


@pytest.mark.slow
def test_state_of_the_thread_holds_for_every_batch(world, tmp_path, cores, monkeypatch):
    model = make_model(world, tiny_llm(tmp_path / "llm", tied=False))
    waves = waves_of(12)

    def sampled():
        torch.manual_seed(0)
        return model.transcribe(waves, 12, batch_seconds=3.0, do_sample=True)

    dtypes = set()
    decode = generation.decode

    def noted(model, embeddings, *arguments):
        dtypes.add(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return decode(model, embeddings, *arguments)

    assert sampled() == sampled() == sampled()
    monkeypatch.setattr(generation, "decode", noted)
    with torch.autocast("cpu", torch.bfloat16):
        model.transcribe(waves, 12, batch_seconds=3.0)
    assert dtypes == {torch.bfloat16}


@pytest.mark.slow
def test_batches_do_not_share_options_that_they_change(world, tmp_path, cores, monkeypatch):
    model = make_model(world, tiny_llm(tmp_path / "llm", tied=False))
    configs = []
    generate = model.llm.generate

    def noted(**arguments):
        configs.append(arguments["generation_config"])
        return generate(**arguments)

    monkeypatch.setattr(model.llm, "generate", noted)
    model.transcribe(waves_of(12), 12, batch_seconds=3.0, num_beams=2)
    assert len({id(config) for config in configs}) == len(configs) > PARALLEL
