"""`asrllm doctor key=value ...`: checks of a planned run, with planted faults."""

import json

import pytest
import torch

from asrllm.commands.dispatch import main
from asrllm.doctor import planned_run
from asrllm.doctor.adapters import fault_of_gradients
from asrllm.testing import data_config
from tests.doctor_cases import FAULTS, GOOD, PAGE, Bench, english, make_shards, page, plain
from tests.test_cli import fails
from tests.test_doctor import LAUNCHER_VARIABLES

# warnings about the machine
MACHINE = {"accelerator", "bfloat16", "operators", "ffmpeg", "disk", "attention"}
MACHINE |= {"temporary files", "shared memory", "launcher"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Return a directory of shards in English."""
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder / "train", plain(english(60)), seed=1)
    make_shards(folder / "valid", plain(english(8, seed=1)), seed=2)
    for name in ("train", "valid"):
        data_config(folder / f"{name}.yaml", [{"name": name, "shards": str(folder / name)}])
    return folder


@pytest.fixture
def bench(world, shards, tmp_path, monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "case"
    folder.mkdir()
    return Bench(world=world, shards=shards, folder=folder, patch=monkeypatch)


@pytest.fixture
def examine(bench, capsys):
    """Return a function that runs `asrllm doctor`, and returns the findings that are not ok.

    It takes what `Fault.plant` returns. Findings about the machine are left out for a run.
    """

    def run(planted):
        arguments = planted
        exp = bench.folder / "exp"
        if isinstance(planted, dict):
            data = {
                f"data.{name}_data_config": bench.shards / f"{name}.yaml"
                for name in ("train", "valid")
            }
            changed = {key.replace(".", "__"): value for key, value in (data | planted).items()}
            arguments = bench.world.overrides(exp, **changed)
        capsys.readouterr()
        status = main(["doctor", "--json", *map(str, arguments)])
        rows = json.loads(capsys.readouterr().out)["findings"]
        faults = [row for row in rows if row["level"] != "ok"]
        assert status == (2 if any(row["level"] == "problem" for row in faults) else 0)
        assert not exp.exists()
        if isinstance(planted, dict):
            faults = [row for row in faults if row["check"] not in MACHINE]
        return faults

    return run


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_planted_faults_are_named(bench, examine, fault):
    planted = fault.plant(bench)
    files = sorted(bench.folder.rglob("*"))
    found = examine(planted)
    assert sorted(bench.folder.rglob("*")) == files
    named = [row for row in found if row["check"] == fault.check]
    assert {row["level"] for row in named} == {fault.level}, found
    assert fault.says in f"{named[0]['text']} {named[0]['fix']}"
    assert found == named or isinstance(planted, list)


@pytest.mark.slow
@pytest.mark.parametrize("good", GOOD, ids=lambda good: good.what)
def test_good_runs_have_no_fault(bench, examine, good):
    assert examine({**good.keys, **good.make(bench)}) == []


def test_page_has_the_table_of_these_cases():
    assert len(FAULTS) >= 25
    assert len(GOOD) >= 20
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.doctor_cases"


@pytest.mark.slow
def test_unknown_key_is_an_error(world, tmp_path, capsys):
    overrides = world.overrides(tmp_path / "exp", trainer__lrr=1)
    assert "'trainer.lrr'" in fails(capsys, "doctor", *overrides)


# --- adapters ---


@pytest.mark.slow
def test_only_adapters_and_the_projector_get_a_gradient(examine, monkeypatch):
    models = []
    check = planned_run.check_adapters

    def recorded(model, batch):
        models.append(model)
        return check(model, batch)

    monkeypatch.setattr(planned_run, "check_adapters", recorded)
    assert examine({"model.llm.lora.r": 0, "model.llm.frozen": "false"}) == []
    (model,) = models
    reached = {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"projector"}


@pytest.mark.parametrize(
    ("gradients", "named"),
    [
        ({"llm.lora_A": [0.0, 1.0], "projector.a": [0.0], "projector.b": [1.0]}, ""),
        ({"llm.lora_A": [0.0, 0.0], "projector.a": [1.0]}, "'llm.lora_A'"),
        ({"llm.lora_A": None, "projector.a": [1.0]}, "'llm.lora_A'"),
        ({"llm.lora_A": [1.0], "projector.a": [float("nan")]}, "'projector.a'"),
        ({"llm.lora_A": [1.0], "projector.a": [0.0], "projector.b": None}, "the projector"),
        ({}, ""),
    ],
)
def test_faults_of_gradients(gradients, named):
    tensors = {name: value and torch.tensor(value) for name, value in gradients.items()}
    fault = fault_of_gradients(tensors)
    assert named in fault
    assert bool(fault) == bool(named)
