"""Training runs whose projector starts from its fit to the training speech, in real processes."""

import json
import shutil

import pytest
import torch

from asrllm.commands.dispatch import main
from asrllm.data.corpora import read_corpora
from asrllm.data.shards import write_shards
from asrllm.data.sources import read_kaldi
from asrllm.models.projector_fit import SpeechBatch
from asrllm.testing import data_config, kaldi_directory, tone_sentences
from asrllm.training.warm_start import choose_utterances, number_tokens
from tests.conftest import REPOSITORY, assert_done, run_script
from tests.test_stages_end_to_end import losses

ALIGNED = {
    "model__projector_init": "aligned",
    "model__audio_encoder_projector_ds_rate": 2,
    "trainer__precision": "fp32",
    "data__valid_data_config": "null",
}
# the first step changes the weights by less than their rounding
UNTRAINED = ALIGNED | {"trainer__num_steps": 1, "trainer__lr": 1e-30, "trainer__weight_decay": 0}


def projector_of(exp):
    state = torch.load(exp / "pretrained.pt", weights_only=True)
    return {name: tensor for name, tensor in state.items() if name.startswith("projector.")}


def train(world, exp, settings, launcher="python"):
    return assert_done(run_script("train", *world.overrides(exp, **settings), launcher=launcher))


def test_tokens_of_all_ranks_are_numbered(monkeypatch):
    other_rank = {0, 3, 8}
    monkeypatch.setattr("asrllm.distributed.gather_objects", lambda own: [own, other_rank])
    batch = SpeechBatch(
        frames=torch.zeros(3, 1),
        counts=torch.tensor([2, 1]),
        tokens=torch.tensor([[5, 9], [9, 0]]),
        token_counts=torch.tensor([2, 1]),
        alignment=torch.tensor([5, 9, 9]),
        held_out=False,
    )
    assert number_tokens([batch]) == [0, 3, 5, 8, 9]
    assert batch.tokens.tolist() == [[2, 4], [4, 0]]
    assert batch.alignment.tolist() == [2, 4, 4]


@pytest.mark.slow
@pytest.mark.longest(60, reason="trains four times, once on two ranks")
@pytest.mark.parametrize("kind", ["mlp", "normed"])
def test_fit_is_the_same_on_two_ranks_with_zero3(world, tmp_path, kind):
    """The sums add up over the ranks, whatever ZeRO partitions."""
    ds = json.loads((REPOSITORY / "ds_configs" / "zero3.json").read_text())
    ds["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    settings = UNTRAINED | {"model__projector": kind}
    train(world, tmp_path / "one", settings)
    train(world, tmp_path / "again", settings)
    zero3 = settings | {"trainer__deepspeed_config": tmp_path / "ds.json"}
    train(world, tmp_path / "two", zero3, launcher="ranks")
    one, again, two = (projector_of(tmp_path / name) for name in ("one", "again", "two"))
    random = train(world, tmp_path / "random", settings | {"model__projector_init": "random"})
    assert "warm start" not in random.stderr
    for name, tensor in one.items():
        assert torch.equal(again[name], tensor), name
    # components have no sign, so the maps are compared and not the weights
    frames = torch.randn(50, one["projector.mlp.linear1.weight"].shape[1])
    torch.testing.assert_close(apply(one, frames), apply(two, frames), atol=1e-3, rtol=1e-3)
    difference = apply(projector_of(tmp_path / "random"), frames) - apply(one, frames)
    assert difference.abs().max() > 0.01


def apply(state, frames):
    """Apply the two linear layers of a projector with ReLU; the fit is the same map with GELU."""
    state = {name.removeprefix("projector.mlp."): tensor for name, tensor in state.items()}
    hidden = frames @ state["linear1.weight"].T + state["linear1.bias"]
    return hidden.relu() @ state["linear2.weight"].T + state["linear2.bias"]


@pytest.mark.slow
@pytest.mark.longest(60, reason="trains twice")
def test_resumed_run_keeps_its_warm_start_and_has_the_same_losses(world, tmp_path):
    exp = tmp_path / "exp"
    done = train(world, exp, ALIGNED)
    assert "held-out" in done.stderr
    whole = losses(exp)
    manifest = json.loads((exp / "checkpoint-4" / "asrllm.json").read_text())
    fit = manifest["warm_start"]
    assert fit["utterances"] + fit["short"] == 60
    assert fit["tokens"] > 5
    assert 0 <= fit["scores"][-1]["top1"] <= fit["scores"][-1]["top5"] <= 1
    shutil.rmtree(exp / "checkpoint-8")
    (exp / "pretrained.pt").unlink()
    resumed = train(world, exp, ALIGNED)
    assert "warm start" not in resumed.stderr
    assert losses(exp) == whole
    last = json.loads((exp / "checkpoint-8" / "asrllm.json").read_text())
    assert last["warm_start"] == fit


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whisper", "zipformer"])
@pytest.mark.parametrize("tagged", ["false", "true"])
def test_warm_start_shows_the_fit_and_writes_nothing(world, tmp_path, capsys, kind, tagged):
    keys = world.overrides(
        tmp_path / "exp",
        model__audio_encoder__model_type=kind,
        model__audio_encoder__pretrained_model=world.root / kind,
        model__audio_encoder_projector_ds_rate=2 if kind == "whisper" else 1,
        model__tag_audio_boundary=tagged,
    )
    assert main(["warm-start", *keys]) == 0
    assert "60 utterances" in capsys.readouterr().out
    assert not (tmp_path / "exp").exists()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (
            {"model__projector_init": "aligned", "init_from": "earlier"},
            ["model.projector_init=aligned", "init_from='earlier'"],
        ),
        (
            {"model__projector_init": "aligned", "model__projector_hidden_size": 1},
            ["model.projector_hidden_size=1", "model.projector_init=aligned"],
        ),
        ({"init_from": "earlier"}, ["init_from='earlier'"]),
        ({"model__projector_init": "alligned"}, ["model.projector_init", "'aligned'"]),
        ({"model__projector_init_hours": 0}, ["model.projector_init_hours=0"]),
    ],
)
def test_wrong_settings_are_named(world, tmp_path, capsys, change, names):
    assert main(["warm-start", *world.overrides(tmp_path / "exp", **change)]) == 2
    error = capsys.readouterr().err
    for name in names:
        assert name in error


@pytest.mark.slow
def test_too_many_stacked_frames_are_reported(world, tmp_path, capsys):
    keys = world.overrides(tmp_path / "exp", model__audio_encoder_projector_ds_rate=2000)
    assert main(["warm-start", *keys]) == 2
    error = capsys.readouterr().err
    for name in ("16384", "model.audio_encoder_projector_ds_rate", "model.projector_init=random"):
        assert name in error


@pytest.mark.slow
def test_speech_without_words_is_reported(world, tmp_path, capsys):
    silent = [("...", wave) for _, wave in tone_sentences(3)]
    source = read_kaldi(kaldi_directory(tmp_path / "kaldi", silent))
    write_shards(tmp_path / "shards", source)
    data_config(tmp_path / "data.yaml", [{"shards": str(tmp_path / "shards")}])
    keys = world.overrides(tmp_path / "exp", data__train_data_config=tmp_path / "data.yaml")
    assert main(["warm-start", *keys]) == 2
    error = capsys.readouterr().err
    for name in ("among 3", "3 have no text token", "model.projector_init=random"):
        assert name in error


@pytest.mark.parametrize("ratio", [0.1, 0.5, 3])
def test_utterances_are_chosen_up_to_the_hours(world, tmp_path, ratio):
    """Corpora are read in proportion to their hours."""
    shards = [str(world.root / "shards" / name) for name in ("train", "valid")]
    data_config(tmp_path / "data.yaml", [{"shards": path} for path in shards])
    corpora = read_corpora(
        str(tmp_path / "data.yaml"), filters=None, shards_dir=tmp_path, cache=None
    )
    total = sum(corpus.usable_hours for corpus in corpora)
    items = choose_utterances(corpora, ratio * total)
    assert len(set(items)) == len(items)
    for number, corpus in enumerate(corpora):
        rows = [item.row for item in items if item.corpus == number]
        hours = corpus.index.rows["samples"][rows].sum() / 16000 / 3600
        wanted = min(ratio, 1) * corpus.usable_hours
        assert hours == pytest.approx(wanted, rel=0.3, abs=2 / 3600)
        if ratio > 1:
            assert rows == list(range(len(corpus.index)))
