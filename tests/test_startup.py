"""Start of the command line: imports, Ctrl-C, and the start-up times of a training run."""

import os
import re
import signal
import subprocess
import sys

import pytest

import asrllm
from asrllm.commands.arguments.verbs import VERBS
from asrllm.config_keys import check_override, meanings
from asrllm.training.startup import Startup, process_age
from tests.conftest import REPOSITORY
from tests.processes import clean_environment, descendants, started, wait_for
from tests.test_interruptions import losses

HEAVY = {"torch", "transformers", "deepspeed", "lhotse", "webdataset", "hydra"}
# prints the imported modules of a command line when it exits
IMPORTED = """
import atexit, sys
from asrllm.cli import console
atexit.register(lambda: print("imported:", *{module.partition(".")[0] for module in sys.modules}))
sys.argv = ["asrllm", *sys.argv[1:]]
console()
"""
# sends SIGINT to its own process when a module is about to be imported; the handler is set because
# the shell may have started the tests with SIGINT ignored
INTERRUPTED = """
import os, signal, sys

signal.signal(signal.SIGINT, {handler})
target_module = sys.argv[1]

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == target_module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
from asrllm.cli import console
sys.argv = ["asrllm", *sys.argv[2:]]
console()
"""


def run_python(code, *arguments, timeout=60):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=clean_environment(),
        cwd=REPOSITORY,
    )


def imported(*arguments, status=0):
    done = run_python(IMPORTED, *arguments)
    assert done.returncode == status, done.stderr
    return set(done.stdout.rpartition("imported:")[2].split())


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)], ids=" ".join
)
def test_help_imports_nothing_heavy(arguments):
    assert not imported(*arguments) & {*HEAVY, "numpy"}


@pytest.mark.parametrize(
    ("verb", "key"),
    [
        ("train", "trainer.lrr=1"),
        ("plan", "model.llm.lora.rank=8"),
        ("evaluate", "checkpoint.model.avgs=2"),
        ("warm-start", "data.sampler.batch_size=8"),
    ],
)
def test_unknown_key_is_reported_before_anything_heavy_is_imported(verb, key):
    assert not imported(verb, key, status=2) & HEAVY


@pytest.mark.parametrize(
    "word",
    ["trainer.lr=1", "mine=a", "+a.b=1", "~trainer.lr", "trainer@a=b", "hydra.x=1", "a.b=1", "c"],
)
def test_words_that_hydra_may_understand_are_left_to_it(word):
    check_override(word, meanings("train"))


@pytest.mark.parametrize("action", ["make", "index", "verify", "stats"])
def test_shard_verbs_work_without_torch(world, tmp_path, action):
    shards = world.root / "shards" / "test"
    arguments = {
        "make": [tmp_path / "out", "--kaldi", world.root / "kaldi" / "test"],
        "index": [shards / "shard-000000.tar", "--output", tmp_path],
        "verify": [shards],
        "stats": [shards],
    }[action]
    assert not imported("shards", action, *arguments) & HEAVY


def test_comparison_of_results_works_without_torch(tmp_path):
    recogs = tmp_path / "recogs-test.txt"
    recogs.write_text("a:\tref=['one', 'two']\na:\thyp=['one']\n")
    assert not imported("evaluate", "compare", recogs, recogs) & HEAVY


def test_public_names_are_listed_and_imported_on_first_use():
    listed = run_python("import sys, asrllm; print(*dir(asrllm)); sys.exit('torch' in sys.modules)")
    assert listed.returncode == 0
    assert set(asrllm.__all__) <= set(listed.stdout.split())
    for name in asrllm.__all__:
        assert getattr(asrllm, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = asrllm.no_such_name


def test_entry_point_imports_nothing_slow_before_it_handles_ctrl_c():
    code = """
import _signal, sys
handler = _signal.getsignal(_signal.SIGINT)
before = set(sys.modules)
import asrllm.cli
assert _signal.getsignal(_signal.SIGINT) is handler, "an import must not change the handler"
print(*set(sys.modules) - before)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= {"asrllm", "asrllm.cli", "asrllm.interrupts", "atexit"}


@pytest.mark.parametrize(
    "module", ["argparse", "asrllm.commands.arguments.verbs", "asrllm.commands.shards", "numpy"]
)
def test_ctrl_c_during_the_import_of_a_light_verb(module, tmp_path):
    done = run_python(
        INTERRUPTED.format(handler="signal.default_int_handler"),
        module,
        "shards",
        "stats",
        tmp_path,
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    ["torch", "torch.nn", "deepspeed", "transformers.modeling_utils", "asrllm.training.trainer"],
)
def test_ctrl_c_during_the_import_of_training(module, tmp_path):
    done = run_python(
        INTERRUPTED.format(handler="signal.default_int_handler"),
        module,
        "train",
        f"exp_dir={tmp_path / 'exp'}",
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "exp").exists()


def test_ctrl_c_with_closed_standard_error(tmp_path):
    """With `2>&1 | tee log`, Ctrl-C ends tee too."""
    reader, writer = os.pipe()
    os.close(reader)
    code = INTERRUPTED.format(handler="signal.default_int_handler")
    command = [sys.executable, "-c", code, "numpy", "shards", "stats", str(tmp_path)]
    done = subprocess.run(
        command, stderr=writer, timeout=60, env=clean_environment(), cwd=REPOSITORY
    )
    os.close(writer)
    assert done.returncode == 130


def test_ignored_sigint_stays_ignored(tmp_path):
    """A shell starts background jobs with SIGINT ignored."""
    done = run_python(
        INTERRUPTED.format(handler="signal.SIG_IGN"),
        "asrllm.commands.shards",
        "shards",
        "stats",
        tmp_path,
    )
    assert done.returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_during_training_ends_every_process_without_a_traceback(world, tmp_path, ranks):
    exp = tmp_path / "exp"
    command = [
        REPOSITORY / "launch" / "train.py",
        *world.overrides(exp, trainer__num_steps=4000, data__valid_data_config="null"),
    ]
    with started(tmp_path / "logs", *[command] * ranks) as processes:
        wait_for(lambda: len(losses(exp)) >= 3)
        readers = [child for process in processes for child in descendants(process.pid)]
        # a terminal sends SIGINT to all of its processes; here each has its own session
        for process in processes:
            os.killpg(process.pid, signal.SIGINT)
        assert [process.wait(30) for process in processes] == [130] * ranks
        wait_for(lambda: not any(reader.is_running() for reader in readers), 15)
    logs = [(tmp_path / "logs" / str(rank)).read_text() for rank in range(ranks)]
    assert not any("Traceback" in log for log in logs), logs
    assert sum(log.count("interrupted") for log in logs) == 1
    assert re.search(r"imports \d+\.\d.*data \d+\.\d", logs[0])


def test_startup_parts_add_up_to_the_age_of_the_process(monkeypatch):
    monkeypatch.setattr(Startup, "_is_first", True)
    before = process_age()
    startup = Startup()
    startup.finish("imports")
    startup.finish("data")
    assert list(startup.seconds) == ["imports", "data"]
    assert before <= sum(startup.seconds.values()) <= process_age() + 0.1  # a clock tick is 10 ms
    assert startup.seconds["imports"] > startup.seconds["data"]
    assert "imports" in startup.summary()
    of_next_run = Startup()
    of_next_run.finish("imports")
    assert of_next_run.seconds["imports"] < before / 2


def test_process_age_matches_the_operating_system(tmp_path):
    code = "from asrllm.training.startup import process_age; print(process_age())"
    assert 0 < float(run_python(code).stdout) < 30


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("verb", ["stats", "verify"])
def test_closed_standard_streams_are_no_error(world, verb, closed):
    script = f'exec "$0" -m asrllm shards {verb} "$1" {closed}'
    done = subprocess.run(
        ["sh", "-c", script, sys.executable, str(world.shards)],
        capture_output=True,
        text=True,
        timeout=60,
        env=clean_environment(),
        cwd=REPOSITORY,
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_interruption_that_python_drops_in_a_finalizer_ends_the_process():
    code = """
import signal
from asrllm.interrupts import RaiseOnInterrupt, exit_interrupted

class Finalized:
    def __del__(self):
        raise KeyboardInterrupt

signal.signal(signal.SIGINT, exit_interrupted)
with RaiseOnInterrupt(lambda: print("reported", flush=True)):
    Finalized()
    print("continued")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=REPOSITORY,
        env=clean_environment(),
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "reported\n", "")
