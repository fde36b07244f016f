"""The mean of checkpoints' weights, adapters' in what they do."""

import tracemalloc

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from asrllm.checkpoints.average import mean_between, mean_weights
from asrllm.errors import UserError
from asrllm.tensor_files import PIECE
from tests.checkpoints.made import write_checkpoint


class Part(nn.Module):
    def __init__(self, rank: int, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.llm = nn.ModuleDict({"embed": nn.Embedding(11, 6), "up": nn.Linear(6, 9), "conv": nn.Conv1d(9, 4, 3)})
        self.projector = nn.Linear(4, 4)
        config = LoraConfig(r=rank, lora_alpha=5, target_modules=["embed", "up", "conv"], init_lora_weights=False, **options)
        inject_adapter_in_model(config, self.llm)

    def trained(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.named_parameters() if "lora_" in name or name.startswith("projector")}

    def changes(self) -> dict[str, torch.Tensor]:
        return {name: layer.get_delta_weight("default") for name, layer in self.named_modules() if isinstance(layer, LoraLayer)}


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_are_averaged_in_what_they_do(tmp_path, rslora):
    checkpoints, models = [], []
    for step in (1, 2, 3):
        model = Part(rank=2, use_rslora=rslora)
        with torch.no_grad():
            for tensor in model.trained().values():
                tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(step + tensor.numel())))
        models.append(model)
        checkpoints.append(write_checkpoint(tmp_path / f"checkpoint-{step}", model.trained(), step=step))
    source = mean_weights(checkpoints, rslora=("llm",) if rslora else ())
    averaged = Part(rank=6, use_rslora=rslora)
    state = source.load()
    assert averaged.load_state_dict(state, strict=False).unexpected_keys == []
    for name, change in averaged.changes().items():
        torch.testing.assert_close(change, sum(model.changes()[name] for model in models) / 3)
    torch.testing.assert_close(averaged.projector.weight, sum(model.projector.weight for model in models) / 3)
    assert source.about["lora"] == "product"
    assert [part["checkpoint"] for part in source.about["sources"]] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]

    factors = mean_weights(checkpoints, lora="factors")
    for name, tensor in factors.load().items():
        torch.testing.assert_close(tensor, sum(model.trained()[name] for model in models) / 3)
    assert factors.about["lora"] == "factors"


def test_one_checkpoint_is_taken_as_it_is(tmp_path):
    state = Part(rank=2).trained()
    found = mean_weights([write_checkpoint(tmp_path / "checkpoint-1", state)]).load()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_checkpoints_of_different_runs_are_refused(tmp_path):
    one = write_checkpoint(tmp_path / "checkpoint-1", Part(rank=2).trained())
    other = write_checkpoint(tmp_path / "checkpoint-2", Part(rank=3).trained())
    with pytest.raises(UserError, match="differ in 'llm"):
        mean_weights([one, other])


def test_running_averages_of_different_runs_are_refused(tmp_path):
    one = write_checkpoint(tmp_path / "checkpoint-1", {"projector.a": torch.ones(3, 2)}, averaged=True)
    other = write_checkpoint(tmp_path / "checkpoint-2", {"projector.a": torch.ones(2, 3)}, step=2, averaged=True)
    with pytest.raises(UserError, match=r"differ in 'projector\.a'"):
        mean_between(one, other)


def test_of_adapters_is_said_only_where_there_are_some(tmp_path):
    plain, adapted = {"projector.a": torch.ones(3, 2)}, {"llm.up.lora_A.default.weight": torch.ones(2, 3)}
    for name, state, said in (("plain", plain, None), ("adapted", adapted, "product")):
        checkpoints = [
            write_checkpoint(tmp_path / name / f"checkpoint-{step}", state, step=step, ranks=0, averaged=True) for step in (1, 2)
        ]
        assert mean_weights(checkpoints).about.get("lora") == said
        assert mean_between(*checkpoints).about.get("lora") == (said and "factors")


def test_large_factors_are_put_together_piece_by_piece(tmp_path):
    rank, states = 3, []
    for seed in (1, 2, 3):
        generator = torch.Generator().manual_seed(seed)
        shapes = {"A": (rank, PIECE), "B": (PIECE, rank)}
        states.append({f"llm.up.lora_{side}.default.weight": torch.randn(shape, generator=generator) for side, shape in shapes.items()})
    source = mean_weights([write_checkpoint(tmp_path / f"checkpoint-{i}", state, step=i, ranks=2) for i, state in enumerate(states)])
    for side, dim in (("A", 0), ("B", 1)):
        name = f"llm.up.lora_{side}.default.weight"
        assert max(piece.numel() for piece in source.pieces(name)) <= PIECE
        found = torch.cat([*source.pieces(name)]).view(source.specs[name].shape)
        assert torch.equal(found, torch.cat([state[name] for state in states], dim=dim))


def test_a_further_checkpoint_takes_next_to_no_memory(tmp_path):
    state = {f"llm.layers.{i}.weight": torch.ones(2, 3) for i in range(272)}
    checkpoints = [write_checkpoint(tmp_path / f"checkpoint-{step}", state, ranks=2, step=step) for step in range(9)]
    taken = {}
    tracemalloc.start()
    for count in (2, 9):
        source = mean_weights(checkpoints[:count])
        taken[count] = tracemalloc.get_traced_memory()[0]
        del source
    tracemalloc.stop()
    assert taken[9] - taken[2] < 7 * 30_000


def test_dora_has_no_exact_mean(tmp_path):
    state = {"llm.up.lora_magnitude_vector.default.weight": torch.ones(3)}
    checkpoints = [write_checkpoint(tmp_path / f"checkpoint-{step}", state) for step in (1, 2)]
    with pytest.raises(UserError, match="--lora factors"):
        mean_weights(checkpoints)
