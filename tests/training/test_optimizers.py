"""Parameter groups, their learning rates, and reading checkpoints with several groups."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from asrllm.errors import UserError
from asrllm.schema import build
from asrllm.training.checkpoint.manifest import read_manifest
from asrllm.training.engine import set_lr
from asrllm.training.optimizers import make_optimizer, parameter_groups, part_of
from asrllm.training.run_config import PeakRates, TrainerConfig
from tests.training.small_engine import start, train_step

RATES = PeakRates(projector=None, lora=None, audio_encoder=None, llm=None)


def parts() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.audio_encoder = nn.Linear(7, 5)
    model.projector = nn.Linear(5, 13)
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


def test_parameters_are_grouped_by_part_and_decay():
    model = parts()
    groups = groups_of(model, projector=5e-4, lora=2e-3)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = []
    for group in groups:
        members = [names[parameter] for parameter in group["params"]]
        found.append((members, group["lr_ratio"], group["weight_decay"]))
    assert found == [
        (["projector.weight"], 0.5, 0.1),
        (["projector.bias"], 0.5, 0.0),
        (["llm.lora_A.weight", "llm.lora_B.weight"], 2.0, 0.1),
        (["audio_encoder.weight"], 1.0, 0.1),
        (["audio_encoder.bias"], 1.0, 0.0),
    ]
    optimizer = make_optimizer(
        "adamw", groups, lr=1e-3, betas=(0.9, 0.98), device=torch.device("cpu"), offload=False
    )
    set_lr(SimpleNamespace(optimizer=optimizer), 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("part", ["llm", "audio_encoder"])
def test_adapters_of_every_part_belong_to_lora(part):
    assert part_of(f"{part}.layers.0.q.lora_A.weight") == "lora"
    assert part_of(f"{part}.layers.0.q.weight") == part


@pytest.mark.slow
def test_error_if_an_operator_cannot_be_compiled(monkeypatch, tmp_path):
    compiler = tmp_path / "bin" / "broken-compiler"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    stale_lock = tmp_path / "built" / "cpu_adam" / "lock"  # left by a killed build
    stale_lock.parent.mkdir(parents=True)
    stale_lock.touch()
    with pytest.raises(UserError, match=r"cpu_adam.*C\+\+ compiler"):
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
def test_deepspeed_adamw_matches_torch(monkeypatch, tmp_path):
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


def test_settings_without_an_effect_are_rejected():
    with pytest.raises(UserError, match=r"trainer\.lr_of\.llm=0\.001 .* llm "):
        groups_of(parts(), llm=1e-3)
    with pytest.raises(UserError, match=r"trainer\.lr_of\.lora=-1 "):
        build(PeakRates, {"lora": -1}, group="trainer.lr_of.")
    config = TrainerConfig()
    optimizer = dataclasses.replace(config.optimizer, name="scaled_adam")
    with pytest.raises(
        UserError, match=r"trainer\.weight_decay=0\.1 .*trainer\.optimizer\.name=scaled_adam"
    ):
        dataclasses.replace(config, weight_decay=0.1, optimizer=optimizer)


def save_whole(out: str) -> None:
    """Save a checkpoint at every stage and in both precisions. This runs in every process.

    whole.pt has the master weights as the engine itself gathers them.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    from asrllm import distributed
    from tests.training.checkpoint.test_partitions import save
    from tests.training.small_engine import engine_of

    for stage in range(4):
        for precision in ("fp32", "bf16"):
            engine = engine_of(stage, precision)
            folder = Path(out) / f"{stage}-{precision}"
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
def test_checkpoints_with_several_groups_are_read_exactly(tmp_path):
    from asrllm.checkpoints.consolidate import checkpoint_weights

    start("training.test_optimizers:save_whole", 2, out=str(tmp_path))
    for folder in tmp_path.iterdir():
        checkpoint = folder / "checkpoint-3"
        assert [len(group) for group in read_manifest(checkpoint)["param_groups"]] == [3, 3]
        found = checkpoint_weights(checkpoint).load()
        expected = torch.load(folder / "whole.pt")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            whole = tensor.view(found[name].shape)
            assert torch.equal(found[name].float(), whole), (folder.name, name)
