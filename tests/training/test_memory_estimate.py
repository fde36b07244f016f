"""The memory estimate of `asrllm plan` against measurements of real steps and processes."""

import json
from pathlib import Path

import pytest
import torch

from asrllm.collator.batch import Collator
from asrllm.errors import UserError
from asrllm.testing import tiny_llm, tiny_whisper
from asrllm.training.memory_estimate import (
    Memory,
    SavedBytes,
    Sizes,
    measure_activations,
    on_meta,
    state_memory,
)
from tests.training.small_engine import Small, engine_of, start, train_step

DS = {"stage3_param_persistence_threshold": 20}


def measure(out: str, kinds: list) -> None:
    """Write the bytes of weights, masters and moments. This runs in every process."""
    from asrllm import distributed
    from asrllm.training.checkpoint.partitions import partitions

    report = {}
    for stage, precision in kinds:
        engine = engine_of(stage, precision, width=200)
        train_step(engine, 0)
        vectors = [vector for vector, _ in partitions(engine)]
        inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        states = []
        for vector in vectors:
            values = inner.state[vector].values()
            states += [value for value in values if torch.is_tensor(value) and value.ndim]
        weights = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
        masters = [] if stage == 0 and precision == "fp32" else vectors
        sizes = []
        for tensors in (weights, masters, states):
            sizes.append(sum(tensor.nbytes for tensor in tensors))
        report[f"{stage}-{precision}"] = sizes
    (Path(out) / f"{distributed.rank()}.json").write_text(json.dumps(report))


@pytest.mark.slow
def test_weights_masters_and_moments_match_two_processes(tmp_path):
    kinds = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]
    start("training.test_memory_estimate:measure", 2, out=str(tmp_path), kinds=kinds)
    model = Small()
    widths = [5, 200, 200, 200, 200, 200, 13]
    model.second = torch.nn.Sequential(*map(torch.nn.Linear, widths[:-1], widths[1:]))
    parameters = list(model.parameters())
    sizes = Sizes(
        weights=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        largest=200 * 201,
        persistent=sum(p.numel() for p in parameters if p.numel() < 20),
    )
    for rank in range(2):
        for kind, found in json.loads((tmp_path / f"{rank}.json").read_text()).items():
            stage, precision = int(kind[0]), kind[2:]
            ds = {"zero_optimization": {"stage": stage, **DS}}
            width = 4 if precision == "fp32" else 2
            memory = state_memory(sizes, ds, ranks=2, width=width, activations=0)
            estimated = [memory.weights, memory.masters, memory.moments]
            assert estimated == pytest.approx(found, rel=0.15), kind


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("memory")
    return tiny_whisper(root / "whisper"), tiny_llm(root / "llm")


def described(parts, **changes):
    from asrllm.models.build import build_processor
    from asrllm.training.run_config import TrainRun
    from tests.composing import load_config

    keys = {
        "exp_dir": "x",
        "data.train_data_config": "x",
        "model.audio_encoder.pretrained_model": parts[0],
        "model.audio_encoder.model_type": "whisper",
        "model.llm.pretrained_model": parts[1],
        "model.projector_hidden_size": 32,
        "model.llm.lora.r": 4,
        "trainer.precision": "fp32",
    } | changes
    config = load_config("train", [f"{key}={value}" for key, value in keys.items()], TrainRun)
    return config, build_processor(config.model, pad_to_30s=False, prompts=("Transcribe.",))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.llm.lora.r": 0, "model.llm.frozen": "false"},
        {"model.audio_encoder.frozen": "false"},
    ],
)
@pytest.mark.parametrize("seconds", [(1.0, 2.0, 0.7), (5.0, 4.0, 6.0, 7.0)])
def test_activations_match_a_training_step(parts, changes, seconds):
    from asrllm.audio.reader import Sample
    from asrllm.data.prompts import Prompt
    from asrllm.models.build import build_model

    config, processor = described(parts, **changes)
    model = build_model(processor, frozen=config.model.frozen_parts, dtype=torch.float32).train()
    samples = []
    for number, duration in enumerate(seconds):
        wave = torch.randn(round(duration * 16000)).numpy()
        text = "one two three " * round(4 * duration)
        samples.append(Sample(key=str(number), wave=wave, text=text))
    collate = Collator(
        processor.renderer,
        [Prompt(text="Transcribe.")],
        num_audio_tokens=processor.config.num_audio_tokens,
        seed=0,
    )
    batch = collate(samples)
    counter = SavedBytes(model)
    with counter:
        inputs = (
            "waves",
            "wave_lengths",
            "input_ids",
            "position_ids",
            "cu_seqlens",
            "target_positions",
            "targets",
        )
        model(**{name: getattr(batch, name) for name in inputs})
    tokens = batch.input_ids.shape[1]
    is_audio = batch.input_ids == processor.renderer.audio_token_id
    described_model = on_meta(processor.config, config.model, torch.float32)
    predicted = measure_activations(
        described_model, dtype=torch.float32, recompute=False, audio=float(is_audio.float().mean())
    )
    assert predicted.bytes(tokens) - predicted.chunk == pytest.approx(counter.total, rel=0.15)


def planned(world, tmp_path, *overrides):
    from asrllm.commands.plan import plan
    from asrllm.training.run_config import PlanRun
    from tests.composing import load_config

    common = world.overrides(tmp_path / "exp", trainer__num_epochs=1)
    return plan(load_config("plan", [*common, *overrides], PlanRun))


@pytest.mark.slow
def test_plan_counts_the_data_and_estimates_every_stage(world, tmp_path):
    found = planned(world, tmp_path, "gpus=2", "gpu_memory=10")
    assert found["data"]["utterances"] == 60
    assert 1 < found["data"]["steps per epoch"] < 60
    assert 0 < found["data"]["ratio of audio tokens"] < 1
    assert not (tmp_path / "exp").exists(), "nothing is written"
    by_stage = found["memory"]
    weights = [by_stage[f"ds_configs/zero{stage}.json"]["weights"] for stage in range(4)]
    assert weights[0] == weights[1] == weights[2] > 1.9 * weights[3]
    assert by_stage["ds_configs/zero2_offload.json"]["host"] > 0
    assert all(memory["fits"] for memory in by_stage.values())
    small = planned(world, tmp_path, "gpu_memory=1.0001")["memory"]
    assert not any(memory["fits"] for memory in small.values())


@pytest.mark.slow
def test_largest_budget_is_where_the_run_stops_fitting(world, tmp_path):
    at = "ds_configs/zero1.json"
    most = planned(world, tmp_path, "gpu_memory=2")["memory"][at]["largest data.sampler.max_tokens"]
    assert most > 1000

    def device(tokens):
        found = planned(world, tmp_path, "gpu_memory=2")
        ratio = tokens / found["data.sampler.max_tokens"]
        row = ratio * found["data"]["tokens of the largest row"]
        measured = found["activations"]
        activations = int(measured["fixed"] + measured["each"] * row) + measured["chunk"]
        keys = ("weights", "masters", "moments", "gradients", "gathered")
        state = {key: found["memory"][at][key] for key in keys}
        return Memory(**state, activations=activations).device, found["gpu"]["usable"]

    for tokens, fits in ((most * 0.97, True), (most * 1.06, False)):
        used, usable = device(tokens)
        assert (used <= usable) is fits


@pytest.mark.slow
def test_invalid_numbers_of_gpus_and_memory_are_rejected(world, tmp_path):
    with pytest.raises(UserError, match="gpus=0 "):
        planned(world, tmp_path, "gpus=0")
    with pytest.raises(UserError, match="gpu_memory=-1"):
        planned(world, tmp_path, "gpu_memory=-1.0")
