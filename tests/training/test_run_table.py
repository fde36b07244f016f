import pytest
import torch
from torch import nn

from asrllm.training.run_config import TrainRun
from asrllm.training.run_table import millions, part_sizes, print_rows, run_rows
from tests.composing import load_config
from tests.test_config import GIVEN

COMMON = {"ranks": 2, "stage": 3, "total_steps": 900, "max_tokens": 500}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.audio_encoder = nn.Linear(30, 10, bias=False)
        self.projector = nn.Linear(10, 20, bias=False)
        self.llm = nn.ModuleDict({"q_proj": nn.Linear(20, 20), "lora_A": nn.Linear(20, 2)})
        self.audio_encoder.requires_grad_(False)
        self.llm["q_proj"].requires_grad_(False)


def test_parameters_are_counted_by_part():
    model = Model()
    model.projector.weight.ds_shape = torch.Size([20, 10])  # as ZeRO-3 marks what it partitions
    model.projector.weight.data = torch.empty(0)
    found = {size.name: (size.trained, size.total) for size in part_sizes(model)}
    assert found == {
        "audio_encoder": (0, 300),
        "projector": (200, 200),
        "llm": (0, 420),
        "adapters": (42, 42),
    }


def test_table_has_the_start_of_the_run_and_the_size_of_a_step(tmp_path, capsys):
    config = load_config(
        "train",
        [*GIVEN, "trainer.gradient_accumulation_steps=3", "trainer.use_averaged_model=true"],
        TrainRun,
    ).trainer
    rows = run_rows(
        config,
        part_sizes(Model()),
        checkpoint=tmp_path / "checkpoint-70",
        init_from="exp/earlier",
        step=70,
        **COMMON,
    )
    values = dict(rows)
    assert values["starts from"] == str(tmp_path / "checkpoint-70")
    assert "70 of 900" in values["steps"]
    assert "3000" in values["tokens per step"]
    assert "ZeRO stage 3" in values["processes"]
    assert "use_averaged_model" in values["evaluated weights"]
    assert values["adapters"] == f"{millions(42)} of {millions(42)} trained"
    print_rows(rows)
    printed = capsys.readouterr().err
    for label, value in rows:
        assert label in printed
        assert value in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("init_from", "start"),
    [(None, "new weights"), ("exp/earlier", "the weights of exp/earlier")],
)
def test_table_names_the_run_whose_weights_a_new_run_starts_with(init_from, start):
    config = load_config("train", GIVEN, TrainRun).trainer
    rows = run_rows(config, [], checkpoint=None, init_from=init_from, step=0, **COMMON)
    assert dict(rows)["starts from"] == start


def test_sizes_have_three_digits():
    assert [millions(n) for n in (0, 1234, 56_700, 1_234_000, 134_515_008, 7_615_616_512)] == [
        "0", "0.0012M", "0.0567M", "1.23M", "135M", "7616M"
    ]  # fmt: skip
