"""Files that appear whole, whoever else writes them and whatever ends the writer."""

import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from asrllm.atomic import Terminated, new_file, new_folder, sigterm_raises, write_whole
from asrllm.errors import UserError
from tests.conftest import REPOSITORY, clean_environment

WRITER = """
import sys, time
from pathlib import Path
from asrllm.atomic import new_file, new_folder, sigterm_raises

with sigterm_raises(), {kind}(Path(sys.argv[1])) as partial:
    (partial / "x" if {kind} is new_folder else partial).write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def start_writer(kind, path):
    command = [sys.executable, "-c", WRITER.format(kind=kind), str(path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=clean_environment()
    )
    assert process.stdout.readline() == "writing\n"
    return process


def end(process, number):
    process.send_signal(number)
    try:
        return process.wait(60)
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["new_file", "new_folder"])
def test_sigterm_leaves_nothing_and_what_sigkill_leaves_is_removed_by_the_next_writer(
    tmp_path, kind
):
    path = tmp_path / "out"
    assert end(start_writer(kind, path), signal.SIGTERM) == 143
    assert names(tmp_path) == []
    (tmp_path / ".out-of-somebody").mkdir()
    assert end(start_writer(kind, path), signal.SIGKILL) == -signal.SIGKILL
    assert len(names(tmp_path)) == 2
    alive = start_writer(kind, path)
    try:
        assert len(names(tmp_path)) == 2
        write_whole(path, "whole")
        assert len(names(tmp_path)) == 3
        assert path.read_text() == "whole"
    finally:
        end(alive, signal.SIGTERM)
    assert names(tmp_path) == [".out-of-somebody", "out"]


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    for name in (".x.pt.0a_b1c2d.partial", ".x.pt.older", ".y.pt.0a_b1c2d.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.pt").touch()
    write_whole(tmp_path / "x.pt", "whole")
    assert names(tmp_path) == [".x.pt.older", ".y.pt.0a_b1c2d.partial", "x.pt"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with new_file(tmp_path / "x.pt") as one, new_file(tmp_path / "x.pt") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "x.pt").read_text() == "one"
    assert names(tmp_path) == ["x.pt"]


def test_what_fails_leaves_what_was_there(tmp_path):
    write_whole(tmp_path / "x", "before")
    with pytest.raises(FileNotFoundError), new_file(tmp_path / "x"):
        pass  # and nothing is written
    with pytest.raises(UserError, match="cannot be written"), new_folder(tmp_path / "x" / "below"):
        pass
    assert (names(tmp_path), (tmp_path / "x").read_text()) == (["x"], "before")


def test_a_folder_may_be_given_by_a_link_and_is_no_mount_point(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with new_folder(tmp_path / "link") as partial:
        (partial / "x").touch()
    assert (names(tmp_path), names(tmp_path / "there")) == (["link", "there"], ["x"])
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "disk")
    with pytest.raises(UserError, match="disk' is a mount point"), new_folder(tmp_path / "disk"):
        pytest.fail("the mount point was not detected before writing")
    with new_folder(tmp_path / "disk" / "below"):
        pass


def test_a_writer_whose_folder_was_taken_for_a_stale_one_makes_another(tmp_path, monkeypatch):
    make, made = tempfile.mkdtemp, []

    def make_and_lose_the_first(**options):
        made.append(make(**options))
        if len(made) == 1:
            Path(made[0]).rmdir()
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_lose_the_first)
    write_whole(tmp_path / "x", "whole")
    assert len(made) == 2
    assert names(tmp_path) == ["x"]


def test_sigterm_is_an_exception_inside_the_block_alone():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), sigterm_raises():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    with sigterm_raises():
        thread = threading.Thread(
            target=lambda: sigterm_raises().__enter__()
        )  # where Python has no signals
        thread.start()
        thread.join()
