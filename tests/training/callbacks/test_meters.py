"""Measurements that a log record adds to the sums of the steps."""

from types import SimpleNamespace

import pytest
import torch

from asrllm.training.callbacks.meters import CorpusLosses, PeakMemory, Rate, Stragglers
from asrllm.training.trainer import StepSums
from tests.conftest import assert_done, run_script
from tests.test_end_to_end import losses, metrics


def test_losses_are_assigned_to_the_corpora_of_their_utterances():
    meter = CorpusLosses(["a", "b", "c"])
    batch = SimpleNamespace(
        cu_seqlens=torch.tensor([0, 4, 6, 9]).int(),
        target_positions=torch.tensor([2, 3, 4, 6, 8]),
        corpora=(1, 0, 1),
        keys=[],
    )
    finite = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    skipped = torch.full((5,), torch.nan)
    loaded = SimpleNamespace(micro_batches=[batch])
    for values in (finite, skipped):
        meter.after_step(SimpleNamespace(losses=[values]), loaded, StepSums())
    own = meter.take()
    other = [[8.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    assert own == [[4.0, 1.0], [27.0, 4.0], [0.0, 0.0]]
    assert meter.record([own, other], 1.0) == {"loss/a": 4.0, "loss/b": 6.75}
    assert meter.take() == [[0.0, 0.0]] * 3


def test_rank_that_is_slow_three_times_in_a_row_is_reported_once(capsys):
    meter = Stragglers()
    for interval in range(7):
        waits = [0.1, 0.1, 2.0 if interval != 1 else 0.1, 0.1]
        values = meter.record(
            [(f"node{rank // 2}", wait, 5.0) for rank, wait in enumerate(waits)], 10.0
        )
        reported = "rank 2 on node1 waits for data" in capsys.readouterr().err
        assert reported == (interval == 4), interval
    assert values == {"data_wait_max": 0.2, "slowest_rank": 2}


def test_small_differences_are_not_reported(capsys):
    meter = Stragglers()
    for _ in range(5):
        meter.record([("a", 0.001, 5.0), ("b", 0.01, 5.5), ("c", 0.001, 5.0)], 10.0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("peak", "expected"), [(None, {"tflops": 1.5}), (6.0, {"tflops": 1.5, "mfu": 0.25})]
)
def test_rate_is_per_device(peak, expected):
    assert Rate(None, peak).record([4e12, 2e12], 2.0) == expected


def test_memory_is_that_of_the_rank_with_the_most():
    assert PeakMemory().take() > 0.01
    assert PeakMemory().record([1.0, 3.0, 2.0], 1.0) == {"memory_gb": 3.0}


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_losses_of_the_corpora_enclose_the_loss(world, tmp_path):
    shards = world.root / "shards"
    (tmp_path / "two.yaml").write_text(
        f"- {{name: long, shards: {shards / 'train'}}}\n"
        f"- {{name: short, shards: {shards / 'test'}}}\n"
    )
    settings = {
        "data__train_data_config": tmp_path / "two.yaml",
        "data__valid_data_config": "null",
        "trainer__peak_tflops": 0.5,
    }
    assert_done(
        run_script(
            "train",
            *world.overrides(tmp_path / "exp", trainer__log_every=2, **settings),
            launcher="ranks",
        )
    )
    for record in metrics(tmp_path / "exp"):
        parts = [record[f"loss/{name}"] for name in ("long", "short") if f"loss/{name}" in record]
        assert min(parts) - 1e-4 <= record["loss"] <= max(parts) + 1e-4
        assert record["slowest_rank"] in (0, 1)
        assert record["data_wait_max"] >= record["data_wait"]
        assert record["mfu"] == pytest.approx(record["tflops"] / 0.5, rel=1e-2)
    assert any("loss/short" in record for record in metrics(tmp_path / "exp"))
    assert len(losses(tmp_path / "exp")) == 4
