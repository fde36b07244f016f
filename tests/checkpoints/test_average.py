"""Averages of checkpoints; adapters are averaged as products."""

import threading
import tracemalloc

import pytest
import torch
from filelock import FileLock
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from asrllm.checkpoints.average import (
    CheckpointSelection,
    average,
    mean_between,
    mean_weights,
    resolve_weights,
)
from asrllm.checkpoints.consolidate import consolidate
from asrllm.errors import CorruptedError, UserError
from asrllm.models.asr_llm.checks import read_config
from asrllm.models.auto import read_state
from asrllm.tensor_files import PIECE
from asrllm.training.checkpoint.manifest import find_checkpoint, newest_checkpoint
from asrllm.training.checkpoint.resume import corruption
from tests.checkpoints.made import write_checkpoint


class Part(nn.Module):
    def __init__(self, rank: int, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.llm = nn.ModuleDict(
            {"embed": nn.Embedding(11, 6), "up": nn.Linear(6, 9), "conv": nn.Conv1d(9, 4, 3)}
        )
        self.projector = nn.Linear(4, 4)
        config = LoraConfig(
            r=rank,
            lora_alpha=5,
            target_modules=["embed", "up", "conv"],
            init_lora_weights=False,
            **options,
        )
        inject_adapter_in_model(config, self.llm)

    def trained(self) -> dict[str, torch.Tensor]:
        return {
            name: p.detach()
            for name, p in self.named_parameters()
            if "lora_" in name or name.startswith("projector")
        }

    def changes(self) -> dict[str, torch.Tensor]:
        return {
            name: layer.get_delta_weight("default")
            for name, layer in self.named_modules()
            if isinstance(layer, LoraLayer)
        }


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_are_averaged_as_products(tmp_path, rslora):
    checkpoints = []
    models = []
    for step in (1, 2, 3):
        model = Part(rank=2, use_rslora=rslora)
        with torch.no_grad():
            for tensor in model.trained().values():
                tensor.copy_(
                    torch.randn(
                        tensor.shape, generator=torch.Generator().manual_seed(step + tensor.numel())
                    )
                )
        models.append(model)
        checkpoints.append(
            write_checkpoint(tmp_path / f"checkpoint-{step}", model.trained(), step=step)
        )
    source = mean_weights(checkpoints, rslora=("llm",) if rslora else ())
    averaged = Part(rank=6, use_rslora=rslora)
    state = source.load()
    assert averaged.load_state_dict(state, strict=False).unexpected_keys == []
    for name, change in averaged.changes().items():
        torch.testing.assert_close(change, sum(model.changes()[name] for model in models) / 3)
    torch.testing.assert_close(
        averaged.projector.weight, sum(model.projector.weight for model in models) / 3
    )
    assert source.about["lora"] == "product"
    assert [part["checkpoint"] for part in source.about["sources"]] == [
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-3",
    ]

    factors = mean_weights(checkpoints, lora="factors")
    for name, tensor in factors.load().items():
        torch.testing.assert_close(tensor, sum(model.trained()[name] for model in models) / 3)
    assert factors.about["lora"] == "factors"


def test_average_of_one_checkpoint_is_its_weights(tmp_path):
    state = Part(rank=2).trained()
    found = mean_weights([write_checkpoint(tmp_path / "checkpoint-1", state)]).load()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_checkpoints_of_different_runs_are_rejected(tmp_path):
    one = write_checkpoint(tmp_path / "checkpoint-1", Part(rank=2).trained())
    other = write_checkpoint(tmp_path / "checkpoint-2", Part(rank=3).trained())
    with pytest.raises(UserError, match=f"'{other}' .*'{one}' .*'llm.*lora_A"):
        mean_weights([one, other])


def test_running_averages_of_different_runs_are_rejected(tmp_path):
    one = write_checkpoint(
        tmp_path / "checkpoint-1", {"projector.a": torch.ones(3, 2)}, averaged=True
    )
    other = write_checkpoint(
        tmp_path / "checkpoint-2", {"projector.a": torch.ones(2, 3)}, step=2, averaged=True
    )
    with pytest.raises(UserError, match=rf"'{other}' .*'{one}' .*'projector\.a'"):
        mean_between(one, other)


def test_record_names_the_lora_method_only_with_adapters(tmp_path):
    plain = {"projector.a": torch.ones(3, 2)}
    adapted = {"llm.up.lora_A.default.weight": torch.ones(2, 3)}
    for name, state, method in (("plain", plain, None), ("adapted", adapted, "product")):
        checkpoints = [
            write_checkpoint(
                tmp_path / name / f"checkpoint-{step}", state, step=step, ranks=0, averaged=True
            )
            for step in (1, 2)
        ]
        assert mean_weights(checkpoints).about.get("lora") == method
        assert mean_between(*checkpoints).about.get("lora") == (method and "factors")


def test_large_factors_are_concatenated_piece_by_piece(tmp_path):
    rank = 3
    states = []
    for seed in (1, 2, 3):
        generator = torch.Generator().manual_seed(seed)
        shapes = {"A": (rank, PIECE), "B": (PIECE, rank)}
        states.append(
            {
                f"llm.up.lora_{side}.default.weight": torch.randn(shape, generator=generator)
                for side, shape in shapes.items()
            }
        )
    source = mean_weights(
        [
            write_checkpoint(tmp_path / f"checkpoint-{i}", state, step=i, ranks=2)
            for i, state in enumerate(states)
        ]
    )
    for side, dim in (("A", 0), ("B", 1)):
        name = f"llm.up.lora_{side}.default.weight"
        assert max(piece.numel() for piece in source.pieces(name)) <= PIECE
        found = torch.cat([*source.pieces(name)]).view(source.specs[name].shape)
        assert torch.equal(found, torch.cat([state[name] for state in states], dim=dim))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_checkpoints(tmp_path):
    state = {f"llm.layers.{i}.weight": torch.ones(2, 3) for i in range(272)}
    checkpoints = [
        write_checkpoint(tmp_path / f"checkpoint-{step}", state, ranks=2, step=step)
        for step in range(9)
    ]
    taken = {}
    tracemalloc.start()
    for count in (2, 9):
        source = mean_weights(checkpoints[:count])
        taken[count] = tracemalloc.get_traced_memory()[0]
        del source
    tracemalloc.stop()
    assert taken[9] - taken[2] < 7 * 30_000


@pytest.fixture
def exp(tmp_path, monkeypatch):
    """A run with checkpoints of an adapter, two steps apart."""
    monkeypatch.setattr("asrllm.checkpoints.average.adapters_with_rslora", lambda exp_dir: ())
    exp = tmp_path / "exp"
    for step in (2, 4, 6, 8):
        write_checkpoint(
            exp / f"checkpoint-{step}",
            {"llm.up.lora_A.default.weight": torch.full((2, 3), float(step))},
            step=step,
        )
    return exp


def resolve(exp, avg=3, **how):
    return resolve_weights(
        exp, filename=None, selection=CheckpointSelection(iteration=8, avg=avg, **how)
    )


def test_product_and_factors_have_separate_files(exp):
    assert resolve(exp).name == "averaged-iter-8-avg-3.pt"
    assert resolve(exp, lora="factors").name == "averaged-iter-8-avg-3-lora-factors.pt"
    assert [
        torch.load(path, weights_only=True).about["lora"]
        for path in (resolve(exp), resolve(exp, lora="factors"))
    ] == [
        "product",
        "factors",
    ]


def test_reason_for_averaging_again_is_logged(exp, caplog):
    made = resolve(exp)
    assert caplog.text == ""
    manifest = exp / "checkpoint-4" / "asrllm.json"
    manifest.write_text(manifest.read_text() + "\n")
    assert resolve(exp) == made
    assert "averaged-iter-8-avg-3.pt" in caplog.text
    write_checkpoint(
        exp / "checkpoint-7", {"llm.up.lora_A.default.weight": torch.ones(2, 3)}, step=7
    )
    resolve(exp)
    assert "checkpoint-4, checkpoint-6, checkpoint-8" in caplog.text
    assert "checkpoint-6, checkpoint-7, checkpoint-8" in caplog.text
    made.write_bytes(made.read_bytes()[:-100])
    resolve(exp)
    assert "incomplete" in caplog.text


@pytest.mark.parametrize("choice", [{"iteration": 8}, {"epoch": 2}])
def test_last_checkpoint_without_their_number_is_rejected_with_both_ways_out(exp, choice):
    with pytest.raises(UserError) as error:
        resolve_weights(exp, filename=None, selection=CheckpointSelection(avg=0, **choice))
    (key, number), *_ = choice.items()
    for part in (f"{key[:4]}", f"={number} ", "avg=1 ", f"{exp / 'pretrained.pt'}"):
        assert part in str(error.value)


def test_flipped_bit_of_an_averaged_file_is_reported(exp):
    made = resolve(exp)
    content = bytearray(made.read_bytes())
    place = content.index(torch.full((2, 3), 6.0).numpy().tobytes())
    content[place + 3] ^= 1
    made.write_bytes(content)
    assert resolve(exp) == made
    with pytest.raises(CorruptedError, match=made.name):
        read_state(made)


@pytest.mark.parametrize(
    "make", [resolve, lambda exp: average(exp, CheckpointSelection(iteration=8, avg=3))]
)
def test_average_that_cannot_be_made_again_is_not_overwritten(exp, make):
    content = resolve(exp).read_bytes()
    (exp / "checkpoint-4").rename(exp / "aside")
    with pytest.raises(
        UserError,
        match=r"checkpoint-6, checkpoint-8, .* checkpoint-4 "
        r".*checkpoint\.model\.filename=averaged-iter-8-avg-3\.pt",
    ):
        make(exp)
    (exp / "checkpoint-8").rename(exp / "aside-too")
    with pytest.raises(
        UserError,
        match=r"iter=8.*checkpoint\.model\.filename=averaged-iter-8-avg-3\.pt",
    ):
        make(exp)
    assert (exp / "averaged-iter-8-avg-3.pt").read_bytes() == content
    (exp / "aside").rename(exp / "checkpoint-4")
    (exp / "aside-too").rename(exp / "checkpoint-8")
    torch.save({"x": torch.ones(1)}, exp / "averaged-iter-8-avg-3.pt")
    with pytest.raises(
        UserError,
        match=r"'.*averaged-iter-8-avg-3\.pt' "
        r".*checkpoint\.model\.filename=averaged-iter-8-avg-3\.pt",
    ):
        make(exp)


def rename_newest(exp):
    (exp / "checkpoint-8").rename(exp / "checkpoint-10")
    return "checkpoint-10", "step 8", "checkpoint-8"


def swap_two(exp):
    (exp / "checkpoint-8").rename(exp / "aside")
    (exp / "checkpoint-2").rename(exp / "checkpoint-8")
    (exp / "aside").rename(exp / "checkpoint-2")
    return "checkpoint-8", "step 2", "checkpoint-2"


def rename_epoch(exp):
    write_checkpoint(exp / "epoch-1", {"projector.a": torch.ones(3)}, step=4)
    (exp / "epoch-1").rename(exp / "epoch-2")
    return "epoch-2", "epoch 1", "epoch-1"


@pytest.mark.parametrize("change", [rename_newest, swap_two, rename_epoch])
def test_renamed_checkpoints_are_named_wherever_they_are_read(exp, change):
    name, number, own_name = change(exp)
    before = sorted(path.name for path in exp.iterdir())
    unit, _, last = name.rpartition("-")
    key = {"checkpoint": "iteration", "epoch": "epoch"}[unit]
    uses = (
        lambda: resolve_weights(
            exp, filename=None, selection=CheckpointSelection(**{key: int(last)}, avg=1)
        ),
        lambda: consolidate(find_checkpoint(exp, name), exp / "w.pt"),
        lambda: corruption(exp / name),  # how a run verifies the checkpoint to resume from
    )
    for use in uses:
        with pytest.raises(UserError) as caught:
            use()
        assert not isinstance(caught.value, CorruptedError)  # a resumed run would set it aside
        for part in (repr(str(exp / name)), number, own_name):
            assert part in str(caught.value)
    if unit == "epoch":  # the checkpoints of steps remain usable
        assert newest_checkpoint(exp) == exp / "checkpoint-8"
    assert sorted(path.name for path in exp.iterdir() if path.name[0] != ".") == before


@pytest.mark.slow
def test_averaging_waits_for_another_averaging_process(exp):
    with FileLock(exp / ".averaging.lock"):
        thread = threading.Thread(
            target=average, args=(exp, CheckpointSelection(iteration=8, avg=3)), daemon=True
        )
        thread.start()
        thread.join(0.5)
        assert not list(exp.glob("averaged-*"))
    thread.join(30)
    assert (exp / "averaged-iter-8-avg-3.pt").is_file()


def test_choices_that_are_not_weights_files_are_rejected(exp, tmp_path):
    def message_of(folder, filename=None, **what):
        with pytest.raises(UserError) as error:
            resolve_weights(
                folder, filename=filename, selection=CheckpointSelection(**{"avg": 0} | what)
            )
        return str(error.value)

    message = message_of(exp, "checkpoint-8")
    assert "checkpoint.model.filename='checkpoint-8'" in message
    assert "checkpoint.model.iter=8 checkpoint.model.avg=1" in message
    assert f"'asrllm consolidate {exp} --tag checkpoint-8'" in message
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "model.safetensors").touch()
    for choice in (
        {"iteration": 8, "avg": 1},
        {"epoch": 1, "avg": 1},
        {"avg": 2},
        {"avg": 0, "running": True},
    ):
        message = message_of(tmp_path / "exported", **choice)
        assert f"exp_dir={str(tmp_path / 'exported')!r}" in message
        assert "checkpoint.model.iter" in message
    assert (
        resolve_weights(tmp_path / "exported", filename=None, selection=CheckpointSelection(avg=0))
        == tmp_path / "exported" / "model.safetensors"
    )
    with pytest.raises(
        UserError, match=f"'{exp}/checkpoint-8' .*'asrllm consolidate {exp} --tag checkpoint-8'"
    ):
        read_state(exp / "checkpoint-8")
    (exp / "short.pt").write_bytes(resolve(exp).read_bytes()[:-100])
    with pytest.raises(CorruptedError, match=rf"'{exp}/short\.pt'"):
        read_state(exp / "short.pt")


def test_dora_has_no_exact_mean(tmp_path):
    state = {"llm.up.lora_magnitude_vector.default.weight": torch.ones(3)}
    checkpoints = [write_checkpoint(tmp_path / f"checkpoint-{step}", state) for step in (1, 2)]
    with pytest.raises(
        UserError, match=r"lora_magnitude_vector.*--lora factors.*checkpoint\.model\.lora=factors"
    ):
        mean_weights(checkpoints)


def test_checkpoints_that_a_named_file_makes_useless_are_named_in_a_warning(exp, caplog):
    (exp / "pretrained.pt").touch()
    resolve_weights(
        exp, filename="pretrained.pt", selection=CheckpointSelection(iteration=8, avg=3)
    )
    assert "checkpoint.model.iter" in caplog.text
    assert "'pretrained.pt'" in caplog.text
    caplog.clear()
    resolve_weights(exp, filename="pretrained.pt", selection=CheckpointSelection(avg=0))
    assert not caplog.text


def test_checkpoint_given_as_the_run_is_answered_with_the_run(exp):
    with pytest.raises(UserError, match=f"'{exp}/checkpoint-8' .* '{exp}'"):
        resolve_weights(exp / "checkpoint-8", filename=None, selection=CheckpointSelection(avg=0))


def test_checkpoint_given_as_a_model_is_answered_with_its_conversion(exp):
    with pytest.raises(UserError, match=f"'asrllm consolidate {exp} --tag checkpoint-8'"):
        read_config(exp / "checkpoint-8")
