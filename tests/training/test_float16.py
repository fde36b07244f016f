"""Training in float16, on a processor that computes it without instructions for it."""

import json
import re
import shutil

import pytest

from tests.conftest import REPOSITORY
from tests.processes import assert_done, run_forked

MISBEHAVE = REPOSITORY / "tests" / "misbehave.py"

pytestmark = pytest.mark.slow


def train(world, exp, stage, *, resumed=False):
    overrides = world.overrides(
        exp,
        trainer__precision="fp16",
        trainer__deepspeed_config=f"ds_configs/zero{stage}.json",
        model__llm__lora__lora_dropout=0.1,
    )
    done = run_forked([MISBEHAVE, json.dumps({"what": "float16"}), *overrides])
    assert_done(done)
    if resumed:
        assert re.search("starts from .*/epoch-1\n", done.stderr)
    records = [json.loads(line) for line in (exp / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_float16_resumes_bitwise_with_its_loss_scale(world, tmp_path, stage):
    """ZeRO 2 and 3 find the loss scale by skipping steps. A resumed run has the scale it found."""
    whole = train(world, tmp_path / "whole", stage)
    assert len(whole) == 8
    skipped = [record["skipped"] for record in whole]
    assert sum(skipped[:4]) > 0 or stage == 0
    assert sum(skipped[4:]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoint-8")
    (tmp_path / "parts" / "pretrained.pt").unlink()
    parts = train(world, tmp_path / "parts", stage, resumed=True)
    for record, again in zip(whole, parts, strict=True):
        for name in ("step", "loss", "acc", "lr", "grad_norm", "skipped"):
            assert again[name] == record[name], (name, record["step"])
