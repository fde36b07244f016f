"""trainer.compile: the same losses, and an error at ZeRO stage 3."""

import json
import shutil

import pytest

from tests.conftest import REPOSITORY, assert_done, run_script
from tests.processes import run_forked

LAUNCH = REPOSITORY / "launch"
MISBEHAVE = REPOSITORY / "tests" / "misbehave.py"

pytestmark = pytest.mark.slow


@pytest.mark.longest(60, reason="torch.compile traces the model")
@pytest.mark.soak
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.timeout(400)
def test_compiled_layers_have_the_same_losses(world, tmp_path, soak):
    """Without --soak the layers are only traced, because C++ code takes 20 s to build."""
    seen = {}
    for compiled in ("false", "true"):
        exp = tmp_path / compiled
        keys = {
            "trainer__num_steps": 3,
            "trainer__precision": "fp32",
            "data__valid_data_config": "null",
            "trainer__compile": compiled,
        }
        overrides = world.overrides(exp, **keys)
        command = [LAUNCH / "train.py", *overrides]
        if not soak:
            how = json.dumps({"what": "trace", "log": str(exp)})
            command = [MISBEHAVE, how, *overrides]
        cache = str(tmp_path / "cache")
        assert_done(run_forked(command, timeout=300, TORCHINDUCTOR_CACHE_DIR=cache))
        lines = (exp / "metrics.jsonl").read_text().splitlines()
        seen[compiled] = [json.loads(line)["loss"] for line in lines]
    if soak:
        assert list((tmp_path / "cache").rglob("*.cpp")), "nothing was compiled"
    else:
        assert int((tmp_path / "true" / "traced").read_text()) > 0, "nothing was traced"
        assert not (tmp_path / "false" / "traced").exists()
    assert seen["true"] == pytest.approx(seen["false"], rel=1e-5)


def test_compile_with_zero_3_is_rejected(world, tmp_path):
    keys = {"trainer__compile": "true", "trainer__deepspeed_config": "ds_configs/zero3.json"}
    done = run_script("train", *world.overrides(tmp_path / "exp", **keys))
    assert done.returncode == 2
    assert "trainer.compile=true" in done.stderr
    assert "ZeRO stage 3" in done.stderr
