"""What a log record says beside the sums of the steps."""

from types import SimpleNamespace

import pytest
import torch

from asrllm.training.callbacks.meters import CorpusLosses, PeakMemory, Rate, Stragglers
from asrllm.training.callbacks.metric_names import METRICS
from asrllm.training.trainer import StepSums
from tests.conftest import REPOSITORY, assert_done, run_script
from tests.test_end_to_end import losses, metrics


def test_losses_are_shared_out_to_the_corpora_of_their_utterances():
    meter = CorpusLosses(["a", "b", "c"])
    batch = SimpleNamespace(
        cu_seqlens=torch.tensor([0, 4, 6, 9]).int(),
        target_positions=torch.tensor([2, 3, 4, 6, 8]),
        corpora=(1, 0, 1),
        keys=[],
    )
    steps = [
        torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]),
        torch.full((5,), torch.nan),
    ]  # the second is skipped
    for values in steps:
        meter.after_step(
            SimpleNamespace(losses=[values]), SimpleNamespace(micro_batches=[batch]), StepSums()
        )
    mine = meter.take()
    assert mine == [[4.0, 1.0], [27.0, 4.0], [0.0, 0.0]]
    assert meter.record([mine, [[8.0, 2.0], [0.0, 0.0], [0.0, 0.0]]], 1.0) == {
        "loss/a": 4.0,
        "loss/b": 6.75,
    }
    assert meter.take() == [[0.0, 0.0]] * 3


def test_who_lags_three_times_in_a_row_is_told_once(capsys):
    meter = Stragglers()
    for interval in range(7):
        waits = [0.1, 0.1, 2.0 if interval != 1 else 0.1, 0.1]
        values = meter.record(
            [(f"node{rank // 2}", wait, 5.0) for rank, wait in enumerate(waits)], 10.0
        )
        told = capsys.readouterr().err
        assert ("rank 2 on node1 waits for data longer than the others" in told) == (
            interval == 4
        ), interval
    assert values == {"data_wait_max": 0.2, "slowest_rank": 2}


def test_small_differences_are_noise(capsys):
    meter = Stragglers()
    for _ in range(5):
        meter.record([("a", 0.001, 5.0), ("b", 0.01, 5.5), ("c", 0.001, 5.0)], 10.0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("peak", "expected"), [(None, {"tflops": 1.5}), (6.0, {"tflops": 1.5, "mfu": 0.25})]
)
def test_a_rate_is_a_devices(peak, expected):
    assert Rate(None, peak).record([4e12, 2e12], 2.0) == expected


def test_memory_is_that_of_the_fullest():
    assert PeakMemory().take() > 0.01
    assert PeakMemory().record([1.0, 3.0, 2.0], 1.0) == {"memory_gb": 3.0}


def test_the_documentation_names_every_metric():
    text = (REPOSITORY / "docs" / "training.md").read_text()
    for name, (unit, meaning) in METRICS.items():
        assert f"| `{name}` | {unit} | {meaning} |" in text, name


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_corpora_have_losses_of_their_own_that_make_up_the_loss(world, tmp_path):
    (tmp_path / "two.yaml").write_text(
        f"- {{name: long, shards: {world.root / 'shards' / 'train'}}}\n- {{name: short, shards: {world.root / 'shards' / 'test'}}}\n"
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
