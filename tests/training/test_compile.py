"""trainer.compile: the same losses, and one sentence where it cannot be."""

import json
import shutil

import pytest

from tests.conftest import assert_done, run_script

pytestmark = pytest.mark.slow


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.timeout(400)
def test_compiled_layers_have_the_same_losses(world, tmp_path):
    seen = {}
    for compiled in ("false", "true"):
        exp = tmp_path / compiled
        keys = {"trainer__num_steps": 3, "trainer__precision": "fp32", "data__valid_data_config": "null", "trainer__compile": compiled}
        run = run_script("train", *world.overrides(exp, **keys), timeout=300, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
        assert_done(run)
        seen[compiled] = [json.loads(line)["loss"] for line in (exp / "metrics.jsonl").read_text().splitlines()]
    assert list((tmp_path / "cache").rglob("*.cpp")), "nothing was compiled"
    assert seen["true"] == pytest.approx(seen["false"], rel=1e-5)


def test_not_with_zero_3(world, tmp_path):
    keys = {"trainer__compile": "true", "trainer__deepspeed_config": "ds_configs/zero3.json"}
    done = run_script("train", *world.overrides(tmp_path / "exp", **keys))
    assert done.returncode == 2
    assert "trainer.compile=true does not go with ZeRO-3" in done.stderr
