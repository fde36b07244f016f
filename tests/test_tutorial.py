"""The commands of docs/tutorial.md, in their order."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import soundfile

from asrllm.testing import tone_sentences
from tests.conftest import REPOSITORY
from tests.processes import assert_done, clean_environment, run_forked

PAGE = REPOSITORY / "docs" / "tutorial.md"
BLOCKS = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Verbs that import torch. They are forked from a process with all imports.
HEAVY = re.compile(r"asrllm ((?:plan|train|evaluate|transcribe|export) .*)\n")
# what makes each command small
TINY = {
    "plan": "",
    "train": "trainer.num_epochs=null trainer.num_steps=4 trainer.valid_every=2"
    " trainer.save_every=2 trainer.warmup_steps=1 trainer.valid_decode=2 data.num_workers=1",
    "evaluate": "max_new_tokens=8 report_audio=1",
    "transcribe": "--max-new-tokens 8",
    "export": "",
}


def recordings(folder: Path) -> None:
    """Write 40 recordings with a transcript beside each."""
    folder.mkdir()
    for i, (text, wave) in enumerate(tone_sentences(40, seed=5)):
        soundfile.write(folder / f"{i:02d}.wav", wave, 16000)
        (folder / f"{i:02d}.txt").write_text(text)


def shell(script: str, folder: Path) -> str:
    """Run a script in a directory, and return its standard output."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        capture_output=True,
        text=True,
        cwd=folder,
        env=clean_environment(),
        timeout=120,
    )
    return assert_done(done).stdout


@pytest.mark.slow
@pytest.mark.longest(60, reason="runs every command of the tutorial")
def test_commands_run_in_their_order(world, tmp_path):
    recordings(tmp_path / "recordings")
    (tmp_path / "whisper").symlink_to(world.whisper)
    (tmp_path / "llm").symlink_to(world.llm)
    verbs = []
    output = ""
    for block in BLOCKS.findall(PAGE.read_text(encoding="utf-8")):
        heavy = HEAVY.fullmatch(block)
        if not heavy:
            shell(block, tmp_path)
            continue
        words = shell(f"printf '%s\\n' {heavy[1]}", tmp_path).split("\n")[:-1]
        verbs.append(words[0])
        script = REPOSITORY / "tests" / "in_folder.py"
        done = run_forked([script, tmp_path, *words, *TINY[words[0]].split()])
        output += assert_done(done).stdout
    assert verbs == list(TINY)
    results = json.loads((tmp_path / "exp/first/greedy_search/results.json").read_text())
    assert results["test"]["utterances"] == 4
    assert "test/09.wav" in output
    assert (tmp_path / "model" / "model.safetensors").exists()
