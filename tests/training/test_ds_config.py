import dataclasses
import json
import re

import pytest
import torch

from asrllm.config import build, compose_config
from asrllm.errors import UserError
from asrllm.training import ds_config
from asrllm.training.config import OptimizerConfig, TrainerConfig
from asrllm.training.ds_config import read_ds_config
from asrllm.training.schedule import warmup_cosine
from tests.conftest import REPOSITORY

SHIPPED = sorted((REPOSITORY / "ds_configs").rglob("*.json"))


def make_config(path, **changes):
    config = build(TrainerConfig, compose_config("train", [])["trainer"])
    return dataclasses.replace(config, deepspeed_config=str(path), **changes)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_every_shipped_file_is_filled_from_the_run(path, precision, monkeypatch):
    monkeypatch.setattr(ds_config, "disks_work", lambda: True)
    changes = {"optimizer": OptimizerConfig(name="deepspeed_adamw"), "nvme_path": "/disk"} if path.stem.endswith("nvme") else {}
    ds = read_ds_config(make_config(path, precision=precision, gradient_accumulation_steps=3, **changes), world_size=4)
    assert ds["zero_optimization"]["stage"] == int(re.search(r"zero(\d)", path.stem).group(1))
    assert (ds["train_batch_size"], ds["gradient_accumulation_steps"], ds["gradient_clipping"]) == (12, 3, 1.0)
    assert (ds["bf16"]["enabled"], ds["fp16"]["enabled"]) == (precision == "bf16", False)
    assert "auto" not in json.dumps(ds)


def test_the_stages_are_shipped():
    assert {"zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_nvme"} <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("stage2.json", {}, "is named for ZeRO stage 2, but its zero_optimization.stage is 0"),
        ("zero3_mine.json", {"zero_optimization": {"stage": 1}}, "is named for ZeRO stage 3"),
        ("mine.json", {"zero_optimization": {"stage": 4}}, "must be 0, 1, 2 or 3"),
        ("mine.json", {"gradient_clipping": 5.0}, r"gradient_clipping=5\.0 contradicts the run, which has 1\.0"),
        ("mine.json", {"fp16": {"enabled": True}}, r"fp16\.enabled=True contradicts"),
        ("mine.json", "{", "is not valid JSON"),
        ("mine.json", {"zero_optimization": {"round_robin_gradients": True}}, "round_robin_gradients writes checkpoints that"),
        ("mine.json", {"zero_optimization": {"offload_param": {"device": "nvme"}}}, "offload_param is on a disk: give its directory"),
        ("mine.json", {"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, r"optimizer\.params\.lr=1\.0 contradicts the run"),
        ("mine.json", {"zero_optimization": {"zero_hpz_partition_size": "auto"}}, r'zero_hpz_partition_size="auto" is not filled'),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_ds_config(make_config(tmp_path / name), world_size=1)


def test_a_users_own_file_is_filled(tmp_path):
    """As they are written for transformers' Trainer."""
    own = {
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
        },
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "sub_group_size": 1e9,
        },
        "gradient_clipping": "auto",
    }
    (tmp_path / "mine.json").write_text(json.dumps(own))
    ds = read_ds_config(make_config(tmp_path / "mine.json"), world_size=2)
    expected = {"lr": 1e-4, "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 0.0, "torch_adam": True}
    assert ds["optimizer"]["params"] == expected
    assert ds["zero_optimization"]["reduce_bucket_size"] == 50_000_000


@pytest.mark.skipif(torch.cuda.is_available(), reason="float16 works on a GPU")
def test_fp16_is_refused_where_it_cannot_run(tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(UserError, match=r"trainer\.precision=fp16 cannot run on this device \(cpu\)"):
        read_ds_config(make_config(tmp_path / "mine.json", precision="fp16"), world_size=1)


def test_the_schedule_warms_up_and_falls():
    factors = [warmup_cosine(step, total=110, warmup=10, floor=0.1) for step in range(120)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0
    assert factors[60] == pytest.approx(0.55)
    assert factors[110:] == pytest.approx([0.1] * 10)
    assert warmup_cosine(0, total=10, warmup=0) == 1.0
