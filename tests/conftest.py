"""Fixtures of the tests: tiny models and a tiny corpus. Limits for the duration of tests."""

import os

# before torch is imported: threads that wait for one another take minutes beside another job
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# otherwise every process that the tests start compiles asrllm again
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import gc
import shutil
import sys
import timeit
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from tests import processes
from tests.processes import REPOSITORY, assert_done, clean_environment, free_port, run_script

# otherwise each run compiles the tests and their assertions again, which takes 12 s
sys.dont_write_bytecode = False

__all__ = ["REPOSITORY", "World", "assert_done", "clean_environment", "free_port", "run_script"]


LONGEST = 20.0  # seconds that one test may take
SECONDS_OF_LOOP = 0.022  # of the loop in `slowness`, on the machine that LONGEST is chosen for
COUNTED = pytest.StashKey[float]()  # seconds of a test so far


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SharedFixtures())
    if "PYTEST_XDIST_TESTRUNUID" in os.environ:
        # a worker, whose temporary directory is below that of the run
        processes.share_cores(Path(config.option.basetemp).parent)
    else:
        config.pluginmanager.register(SlowestTests())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--soak", action="store_true", help="run tests with the mark 'soak' at their full size"
    )
    parser.addoption(
        "--longest",
        type=float,
        default=LONGEST,
        metavar="S",
        help="seconds after which a test fails unless its mark 'longest' allows more; multiplied "
        "by how much slower this machine is than that of CI; default: %(default)g",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        limit_of(item)  # checks the mark
    if config.getoption("--soak"):
        return
    for item in items:
        if (mark := item.get_closest_marker("soak")) and mark.kwargs.get("only"):
            item.add_marker(pytest.mark.skip(reason="make soak"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Do not look for garbage among the modules that the tests import, which takes 5 s."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture
def soak(request: pytest.FixtureRequest) -> bool:
    """Return whether a test runs at its full size."""
    return request.config.getoption("--soak")


class SharedFixtures:
    """Does not count fixtures of several tests, which would count for the first of these.

    It is a plugin, because pytest does not call a conftest's hook for fixtures of the session.
    """

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef) -> Iterator[object]:
        if fixturedef.scope == "function":
            return (yield)
        with processes.not_counted():
            return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """Fail a test whose setup, call and teardown take longer than its limit.

    These do not count: setting up fixtures of several tests, waiting for the other worker, and the
    imports of the server in `processes`. The teardown of a module's or session's fixtures counts
    for the last test, because pytest does not separate it.
    """
    report = yield
    seconds = item.stash.get(COUNTED, 0.0) + call.duration - processes.take_uncounted()
    item.stash[COUNTED] = seconds
    report.counted = seconds
    if call.when == "teardown" and report.passed and not item.config.getoption("--soak"):
        limit = limit_of(item)
        # measuring takes a quarter of a second, therefore only when it matters
        if seconds > limit and seconds > (scaled := limit * slowness()):
            report.outcome = "failed"
            report.longrepr = (
                f"{item.nodeid} took {seconds:.1f} s, which exceeds its limit of {scaled:.1f} s. "
                "Make it faster, split it, or mark it longest(seconds, reason=...)."
            )
    return report


def limit_of(item: pytest.Item) -> float:
    """Return the seconds that a test may take, on a machine like that of CI.

    Raises:
        UsageError: the mark `longest` does not have one number and a reason.
    """
    mark = item.get_closest_marker("longest")
    if mark is None:
        return item.config.getoption("--longest")
    if len(mark.args) != 1 or not mark.kwargs.get("reason"):
        raise pytest.UsageError(
            f"{item.nodeid} has a mark 'longest' without a reason. Write longest(seconds, "
            "reason=...)."
        )
    return mark.args[0]


class SlowestTests:
    """Prints the tests that took the longest."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if hasattr(report, "counted"):  # otherwise a worker has crashed
            self.seconds[report.nodeid] = report.counted

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("slowest 20 tests, seconds without waiting and shared fixtures")
        for name, seconds in sorted(self.seconds.items(), key=lambda item: -item[1])[:20]:
            terminalreporter.write_line(f"{seconds:6.2f} {name}")


def slowness() -> float:
    """Return how much slower this machine is at present than the one that LONGEST is chosen for.

    Returns:
        A ratio of the seconds of a fixed computation, at least 1.
    """
    seconds = timeit.timeit(lambda: sum(i * i for i in range(400_000)), number=10) / 10
    return max(1.0, seconds / SECONDS_OF_LOOP)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Run each test and its fixtures on one core. Its time-out starts when it has the core."""
    with processes.one_core():
        processes.take_uncounted()
        return (yield)


@dataclass(frozen=True)
class World:
    """Paths of the tiny models and corpora of a test session."""

    root: Path

    @property
    def whisper(self) -> Path:
        return self.root / "whisper"

    @property
    def zipformer(self) -> Path:
        return self.root / "zipformer"

    @property
    def llm(self) -> Path:
        return self.root / "llm"

    @property
    def shards(self) -> Path:
        return self.root / "shards" / "train"

    def overrides(self, exp: Path, **more: object) -> list[str]:
        """Return the overrides of a training run of 8 steps with the tiny models.

        Args:
            exp: the run's directory.
            more: further keys, with double underscores in place of dots; None removes a key.
        """
        keys = {
            "exp_dir": exp,
            "model.audio_encoder.model_type": "whisper",
            "model.audio_encoder.pretrained_model": self.whisper,
            "model.llm.model_type": "qwen2",
            "model.llm.pretrained_model": self.llm,
            "model.llm.lora.r": 4,
            "model.projector_hidden_size": 32,
            "data.train_data_config": self.root / "train.yaml",
            "data.valid_data_config": self.root / "valid.yaml",
            "data.sampler.max_tokens": 150,
            "data.filter.min_duration": 0.1,
            "data.filter.max_chars_per_second": 100,
            "data.num_workers": 1,
            "trainer.num_steps": 8,
            "trainer.num_epochs": "null",
            "trainer.log_every": 1,
            "trainer.save_every": 4,
            "trainer.valid_every": 8,
            "trainer.valid_decode": 0,
            "trainer.warmup_steps": 2,
            "trainer.lr": 0.001,
            "trainer.sinks": "[wandb]",
        }
        keys |= {key.replace("__", "."): value for key, value in more.items()}
        return [f"{key}={value}" for key, value in keys.items() if value is not None]


def made_once(
    tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]
) -> Path:
    """Return a directory that the first worker writes and all workers read."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / f"made-{name}"
    lock = FileLock(shared / f"{name}.lock")
    with processes.no_core():
        lock.acquire()
    with lock:
        if not (folder / ".done").exists():
            shutil.rmtree(folder, ignore_errors=True)  # remains of a worker that failed
            folder.mkdir()
            make(folder)
            (folder / ".done").touch()
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Return tiny models and corpora, which tests must not change."""
    return World(made_once(tmp_path_factory, "world", make_world))


def make_world(root: Path) -> None:
    """Write tiny models, and corpora of 60, 7 and 9 utterances."""
    # imported here, because the process that distributes the tests does not need asrllm
    from asrllm.data.shards import write_shards
    from asrllm.data.sources import read_kaldi
    from asrllm.testing import (
        data_config,
        kaldi_directory,
        tiny_llm,
        tiny_whisper,
        tiny_zipformer,
        tone_sentences,
    )

    tiny_whisper(root / "whisper")
    tiny_zipformer(root / "zipformer")
    tiny_llm(root / "llm")
    for name, count, seed in (("train", 60, 0), ("valid", 7, 1), ("test", 9, 2)):
        write_shards(
            root / "shards" / name,
            read_kaldi(kaldi_directory(root / "kaldi" / name, tone_sentences(count, seed=seed))),
            utterances_per_shard=25,
        )
        data_config(root / f"{name}.yaml", [{"name": name, "shards": str(root / "shards" / name)}])
    (root / "prompts.txt").write_text("Transcribe.\nRepeat what you hear.\n写下来。\n")
