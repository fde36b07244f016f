"""Every example has a page, a configuration that composes, and scripts with valid commands.

The scripts run with stand-ins for the programs that they start. The stand-ins record the command
lines, which are then parsed and composed as the programs would do it.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import soundfile
import yaml

from asrllm.commands.dispatch import main, parse
from asrllm.data.prompts import TRANSLATE, read_prompts
from asrllm.evaluation.config import EvaluationRun
from asrllm.hydra_app import run_app
from asrllm.testing import tone_sentences
from asrllm.training.ds_config import find_ds_config
from asrllm.training.run_config import PlanRun, TrainRun
from tests.processes import REPOSITORY, assert_done, both_cores, clean_environment, run_forked

EXAMPLES = REPOSITORY / "examples"
FOLDERS = sorted(path.parent for path in EXAMPLES.glob("*/README.md"))
CONFIGS = sorted(
    path for path in EXAMPLES.glob("**/*.yaml") if path.read_text().find("\ndefaults:\n") >= 0
)
SCRIPTS = sorted(EXAMPLES.glob("**/*.sh"))
RUNS = {"train": TrainRun, "plan": PlanRun, "evaluate": EvaluationRun}
PROGRAMS = ("asrllm", "deepspeed", "lhotse", "sbatch", "srun", "torchrun")
# Records the command line, and writes what later commands of a script read.
STAND_IN = """#!/usr/bin/env bash
printf '%s\\0' "$(basename "$0")" "$@" >> "$COMMANDS"
printf '\\n\\0' >> "$COMMANDS"
for word in "$@"; do
  case $word in
  exp_dir=*)
    mkdir -p "${word#exp_dir=}"
    printf 'trainer:\\n  num_steps: 8\\n' > "${word#exp_dir=}/config.yaml"
    ;;
  esac
done
"""


def name_of(path: Path) -> str:
    return path.relative_to(EXAMPLES).as_posix()


@pytest.fixture
def stand_ins(tmp_path):
    """Return a directory of stand-ins for the programs that scripts start."""
    folder = tmp_path / "stand_ins"
    folder.mkdir()
    for name in PROGRAMS:
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def copied(tmp_path):
    """Return a copy of the examples, in which scripts may write."""
    return Path(shutil.copytree(EXAMPLES, tmp_path / "examples"))


def commands_of(script: Path, *words: str, stand_ins: Path, **environment: str) -> list[list[str]]:
    """Run a script with stand-ins, and return the command lines that it starts."""
    log = stand_ins / "commands"
    log.unlink(missing_ok=True)
    environment |= {"PATH": f"{stand_ins}{os.pathsep}{os.environ['PATH']}", "COMMANDS": str(log)}
    done = subprocess.run(
        [str(script), *words], capture_output=True, text=True, env=os.environ | environment
    )
    assert_done(done)
    records = log.read_text().split("\n\0")[:-1]
    return [record.split("\0")[:-1] for record in records]


def asrllm_words(command: list[str]) -> list[str] | None:
    """Return the arguments of `asrllm` in a command line, or None if it starts something else."""
    program = command[0]
    if program == "asrllm":
        return command[1:]
    if program in ("torchrun", "deepspeed"):
        option = "-m" if program == "torchrun" else "--module"
        if option in command:
            at = command.index(option)
            assert command[at + 1] == "asrllm"
            return command[at + 2 :]
        script = next(word for word in command if word.endswith(".py"))
        return [Path(script).stem, *command[command.index(script) + 1 :]]
    return None


def check_command(words: list[str]) -> None:
    """Check the arguments of `asrllm` as far as possible without data and models."""
    arguments = parse(words)
    if arguments.verb in RUNS:
        found: list[object] = []
        run_app(arguments.verb, arguments, RUNS[arguments.verb], found.append)
        assert found
        for run in found:
            check_files(run)


def check_files(run: object) -> None:
    """Check the files of the repository that a run names."""
    if isinstance(run, TrainRun):
        read_prompts(run.prompt_file)
        find_ds_config(run.trainer.deepspeed_config)
        data = (run.data.train_data_config, run.data.valid_data_config)
    else:
        data = (run.data.test_data_config,)
    for path in data:
        if path is not None:
            assert all(
                "shards" in entry or "manifest" in entry
                for entry in yaml.safe_load(Path(path).read_text())
            )


def test_every_example_has_a_page_a_configuration_and_a_script():
    assert len(FOLDERS) >= 10
    for folder in FOLDERS:
        if folder.name in ("quickstart", "sentences"):  # a program each
            continue
        assert [path for path in CONFIGS if folder in path.parents], folder
        assert [path for path in SCRIPTS if folder in path.parents], folder


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_configuration_composes(config, capsys):
    words = ["--config-dir", str(config.parent), "--config-name", config.stem, "exp_dir=x"]
    assert main(["train", *words, "--cfg", "job"]) == 0
    composed = yaml.safe_load(capsys.readouterr().out)
    assert_same_where_given(composed, yaml.safe_load(config.read_text()))


def assert_same_where_given(composed: object, given: object, key: str = "") -> None:
    """Assert that a composed configuration has the values of a file."""
    if isinstance(given, dict):
        for name, value in given.items():
            if key or name not in ("defaults", "exp_dir"):
                assert_same_where_given(composed[name], value, f"{key}{name}.")
    else:
        assert composed == given, key


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_script_parses_and_stops_at_errors(script):
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text().splitlines()
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("folder", [f for f in FOLDERS if (f / "run.sh").exists()], ids=name_of)
def test_commands_of_run_sh_are_valid(folder, copied, stand_ins, monkeypatch):
    monkeypatch.chdir(copied / folder.name)
    script = Path("run.sh").absolute()
    for words in ((), ("seed=7",)):
        commands = commands_of(script, *words, stand_ins=stand_ins)
        found = [command for command in map(asrllm_words, commands) if command is not None]
        assert any(command[0] == "train" and {*words} <= {*command} for command in found)
        for command in found:
            check_command(command)


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "slurm"])
def test_commands_of_each_launcher_are_valid(launcher, copied, stand_ins, monkeypatch):
    monkeypatch.chdir(copied / "multi_node")
    commands = commands_of(
        Path("run.sh").absolute(),
        "seed=7",
        stand_ins=stand_ins,
        LAUNCHER=launcher,
        NODE="1",
        RANK0="node1",
    )
    if launcher == "slurm":
        (sbatch,) = commands
        commands = commands_of(Path(sbatch[1]).absolute(), *sbatch[2:], stand_ins=stand_ins)
    (command,) = commands
    check_command(command[command.index("asrllm") + 1 :])


@pytest.mark.slow
def test_scripts_of_asr_llm_are_valid(copied, stand_ins, monkeypatch):
    monkeypatch.chdir(copied / "asr_llm")
    for name, word in (("train", "exp_dir=exp/a"), ("evaluate", "exp_dir=exp/a")):
        script = Path(f"scripts/{name}.sh").absolute()
        verb, *words = asrllm_words(commands_of(script, word, stand_ins=stand_ins)[-1])
        configs = ["--config-dir", "configs", "--config-name", "train"] if verb == "train" else []
        check_command([verb, *configs, *words])


def test_lhotse_has_the_commands_of_the_recipes(copied, stand_ins, monkeypatch):
    from lhotse.bin.modes.cli_base import cli

    seen = set()
    scripts = [*copied.glob("*/run.sh"), copied / "asr_llm" / "scripts" / "prepare_aishell2.sh"]
    for script in scripts:
        if "lhotse" not in script.read_text():
            continue
        words = ["corpus"] if script.name != "run.sh" else []
        for program, *arguments in commands_of(script, *words, stand_ins=stand_ins):
            if program == "lhotse":
                mode, name, *rest = arguments
                command = cli.commands[mode].commands[name]
                command.make_context(name, rest, resilient_parsing=True)
                known = {option for parameter in command.params for option in parameter.opts}
                assert {word for word in rest if word.startswith("-")} <= known
                seen.add((mode, name))
    assert ("cut", "simple") in seen


def test_prompt_yaml_of_asr_llm_is_plain_text():
    prompts = read_prompts(EXAMPLES / "asr_llm" / "configs" / "prompt.yaml")
    assert [prompt.text for prompt in prompts] == [
        "Transcribe the audio in Chinese.",
        "Repeat the audio content verbatim.",
    ]


def test_prompts_of_multitask_prompts_fit_translations():
    prompts = read_prompts(EXAMPLES / "multitask_prompts" / "prompts.yaml")
    assert prompts
    for prompt in prompts:
        assert prompt.fits("zh", TRANSLATE)
        assert not prompt.fits("zh", None)


@pytest.mark.slow
@pytest.mark.longest(60, reason="trains and evaluates")
def test_asr_llm_trains_and_evaluates(world, tmp_path):
    folder = EXAMPLES / "asr_llm"
    prompts = folder / "configs" / "prompt.yaml"
    exp = tmp_path / "exp"
    keys = world.overrides(exp, prompt_file=prompts, data__use_infinite_dataset="false")
    assert_done(run_forked([folder / "train.py", *keys, "model.llm.lora.target_modules=[q_proj]"]))
    words = ["checkpoint.model.iter=8", "checkpoint.model.avg=2", "decoding_method=greedy_search"]
    data = f"data.test_data_config={world.root / 'test.yaml'}"
    assert_done(run_forked([folder / "evaluate.py", f"exp_dir={exp}", data, *words]))
    assert (exp / "greedy_search" / "recogs-test-iter-8-avg-2.txt").is_file()


@pytest.mark.slow
@pytest.mark.longest(60, reason="starts four commands in new interpreters")
def test_custom_data_runs(world, copied, tmp_path):
    data = tmp_path / "data"
    for part, count in (("train", 60), ("test", 7)):
        (data / part).mkdir(parents=True)
        for number, (text, wave) in enumerate(tone_sentences(count, seed=count)):
            soundfile.write(data / part / f"{number}.wav", wave, 16000)
            (data / part / f"{number}.txt").write_text(text)
    exp = tmp_path / "exp"
    leave_out = ("exp_dir", "data.train_data_config", "data.valid_data_config")
    more = {"trainer__num_steps": 2, "trainer__gradient_accumulation_steps": 1}
    keys = [key for key in world.overrides(exp, **more) if key.partition("=")[0] not in leave_out]
    with both_cores():
        done = subprocess.run(
            [str(copied / "custom_data" / "run.sh"), *keys],
            capture_output=True,
            text=True,
            env=clean_environment(
                STAGES="prepare train evaluate",
                DATA=str(data),
                EXP=str(exp),
                PYTHONPATH=str(REPOSITORY),
            ),
        )
    assert_done(done)
    assert (exp / "greedy_search" / "results.json").is_file()
