"""Parameter groups: what is in them, at which rate, and that checkpoints with several are read right."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from asrllm.config import build, compose_config
from asrllm.errors import UserError
from asrllm.training.checkpoint.manifest import read_manifest
from asrllm.training.engine import set_lr
from asrllm.training.optimizers import make_optimizer, parameter_groups, part_of
from asrllm.training.run_config import PeakRates, TrainerConfig
from tests.training.small_engine import start, train_step

RATES = PeakRates(projector=None, lora=None, audio_encoder=None, llm=None)


def parts() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.audio_encoder, model.projector = nn.Linear(7, 5), nn.Linear(5, 13)
    model.llm = nn.ModuleDict(
        {
            "base": nn.Linear(13, 3),
            "lora_A": nn.Linear(13, 2, bias=False),
            "lora_B": nn.Linear(2, 3, bias=False),
        }
    )
    model.llm["base"].requires_grad_(False)
    return model


def groups_of(model: nn.Module, **rates: float):
    return parameter_groups(
        dict(model.named_parameters()),
        lr=1e-3,
        lr_of=dataclasses.replace(RATES, **rates),
        weight_decay=0.1,
    )


def test_groups_are_parts_by_decay():
    model = parts()
    found = groups_of(model, projector=5e-4, lora=2e-3)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert [([names[p] for p in g["params"]], g["lr_ratio"], g["weight_decay"]) for g in found] == [
        (["projector.weight"], 0.5, 0.1),
        (["projector.bias"], 0.5, 0.0),
        (["llm.lora_A.weight", "llm.lora_B.weight"], 2.0, 0.1),
        (["audio_encoder.weight"], 1.0, 0.1),
        (["audio_encoder.bias"], 1.0, 0.0),
    ]
    optimizer = make_optimizer(
        "adamw", found, lr=1e-3, betas=(0.9, 0.98), device=torch.device("cpu"), offload=False
    )
    set_lr(SimpleNamespace(optimizer=optimizer), 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125, 0.5, 0.25, 0.25]


def test_adapters_of_the_encoder_are_lora():
    assert [
        part_of(f"{part}.layers.0.{kind}")
        for part in ("llm", "audio_encoder")
        for kind in ("q.lora_A.weight", "q.weight")
    ] == [
        "lora",
        "llm",
        "lora",
        "audio_encoder",
    ]


@pytest.mark.slow
def test_an_operator_that_cannot_be_compiled_is_one_sentence(monkeypatch, tmp_path):
    compiler = tmp_path / "bin" / "broken-compiler"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    left = tmp_path / "built" / "cpu_adam" / "lock"  # by a build that was killed
    left.parent.mkdir(parents=True)
    left.touch()
    with pytest.raises(
        UserError, match=r"operator cpu_adam cannot be compiled in .*install a C\+\+ compiler"
    ):
        make_optimizer(
            "deepspeed_adamw",
            groups_of(parts()),
            lr=1e-3,
            betas=(0.9, 0.98),
            device=torch.device("cpu"),
            offload=False,
        )


@pytest.mark.slow
@pytest.mark.soak(only=True)
@pytest.mark.timeout(400)
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_deepspeeds_adamw_steps_as_torchs(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    found = []
    for name in ("adamw", "deepspeed_adamw"):
        model = parts()
        optimizer = make_optimizer(
            name,
            groups_of(model),
            lr=1e-2,
            betas=(0.9, 0.98),
            device=torch.device("cpu"),
            offload=False,
        )
        for step in range(3):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.full_like(parameter, 0.1 * (step + 1))
            optimizer.step()
        found.append(model.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, msg=name)


def test_a_rate_that_means_nothing_is_refused():
    with pytest.raises(
        UserError, match=r"trainer\.lr_of\.llm=0\.001, but nothing of llm is trained"
    ):
        groups_of(parts(), llm=1e-3)
    with pytest.raises(UserError, match=r"trainer\.lr_of\.lora=-1 must be a number above 0"):
        dataclasses.replace(RATES, lora=-1)
    config = build(TrainerConfig, compose_config("train", [])["trainer"])
    with pytest.raises(
        UserError, match=r"weight_decay=0\.1 is not read with trainer\.optimizer\.name=scaled_adam"
    ):
        dataclasses.replace(
            config,
            weight_decay=0.1,
            optimizer=dataclasses.replace(config.optimizer, name="scaled_adam"),
        )


def save_whole(out: str) -> None:
    """In every process, at every stage and in both precisions: a checkpoint, and the masters as the engine itself gathers them."""
    from deepspeed.utils import safe_get_full_fp32_param

    from asrllm import distributed
    from tests.training.checkpoint.test_partitions import save
    from tests.training.small_engine import engine_of

    for stage in range(4):
        for precision in ("fp32", "bf16"):
            engine, folder = engine_of(stage, precision), Path(out) / f"{stage}-{precision}"
            for step in range(3):
                train_step(engine, step)
            save(engine, SimpleNamespace(files=dict), folder, "checkpoint-3", [])
            trained = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
            if stage:
                whole = {n: safe_get_full_fp32_param(p).clone() for n, p in trained.items()}
            else:
                from asrllm.training.checkpoint.partitions import partitions

                whole = {
                    segments[0].name: vector.detach().clone()
                    for vector, segments in partitions(engine)
                }
            if distributed.rank() == 0:
                torch.save(whole, folder / "whole.pt")


@pytest.mark.slow
def test_checkpoints_of_several_groups_are_read_right(tmp_path):
    from asrllm.checkpoints.consolidate import checkpoint_weights

    start("training.test_optimizers:save_whole", 2, out=str(tmp_path))
    for folder in tmp_path.iterdir():
        checkpoint = folder / "checkpoint-3"
        assert [len(group) for group in read_manifest(checkpoint)["param_groups"]] == [3, 3]
        found, expected = checkpoint_weights(checkpoint).load(), torch.load(folder / "whole.pt")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name].float(), tensor.view(found[name].shape)), (
                folder.name,
                name,
            )
