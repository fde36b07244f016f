"""The limit for the duration of a test, see conftest.py."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, clean_environment

# the limit of the run is 50 ms
TESTS = """
import time
import pytest

def test_long():
    time.sleep(0.6)

@pytest.fixture
def own():
    time.sleep(0.3)
    yield
    time.sleep(0.3)

def test_long_fixture(own):
    pass

@pytest.fixture(scope="module")
def shared():
    time.sleep(0.2)

@pytest.fixture(scope="session")
def of_the_session():
    time.sleep(0.2)

def test_shared_fixture(shared, of_the_session):
    pass

@pytest.mark.longest(60, reason="sleeps")
def test_marked():
    time.sleep(0.2)
"""


def run_tests(folder, code, *options):
    (folder / "test_tiny.py").write_text(code)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = longest: as in pyproject.toml\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "xdist", *options]
    environment = {"PYTHONPATH": str(REPOSITORY), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    clean = clean_environment(**environment)
    # this test may run in a worker of xdist
    own = {name: value for name, value in clean.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(
        command,
        cwd=folder,
        env=own,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.slow
def test_long_tests_fail_by_name_unless_they_are_marked(tmp_path):
    done = run_tests(tmp_path, TESTS, "--longest", "0.05", "-n", "1")
    failed = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("ERROR ")}
    assert failed == {"test_tiny.py::test_long", "test_tiny.py::test_long_fixture"}, done.stdout
    assert done.returncode == pytest.ExitCode.TESTS_FAILED


@pytest.mark.slow
def test_mark_without_a_reason_is_a_usage_error(tmp_path):
    code = "import pytest\n@pytest.mark.longest(60)\ndef test_marked(): pass\n"
    done = run_tests(tmp_path, code, "-n", "0")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "test_tiny.py::test_marked" in done.stderr
