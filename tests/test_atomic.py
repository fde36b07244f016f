"""Files appear complete, with concurrent writers and with killed writers."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from asrllm.atomic import (
    Terminated,
    check_output_file,
    check_output_folder,
    check_text_output,
    check_writable_folder,
    new_file,
    new_folder,
    sigterm_raises,
    write_whole,
)
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
def test_sigterm_leaves_nothing_and_remains_of_sigkill_are_removed_by_the_next_writer(
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


def test_remains_of_a_killed_writer_are_removed_by_the_next(tmp_path):
    for name in (".x.pt.0a_b1c2d.partial", ".x.pt.older", ".y.pt.0a_b1c2d.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.pt").touch()
    write_whole(tmp_path / "x.pt", "whole")
    assert names(tmp_path) == [".x.pt.older", ".y.pt.0a_b1c2d.partial", "x.pt"]


def test_concurrent_writers_of_one_file_do_not_interfere(tmp_path):
    with new_file(tmp_path / "x.pt") as one, new_file(tmp_path / "x.pt") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "x.pt").read_text() == "one"
    assert names(tmp_path) == ["x.pt"]


def test_failed_write_keeps_the_existing_file(tmp_path):
    write_whole(tmp_path / "x", "before")
    with pytest.raises(FileNotFoundError), new_file(tmp_path / "x"):
        pass  # the block writes nothing
    with (
        pytest.raises(UserError, match=f"'{tmp_path}/x/below'"),
        new_folder(tmp_path / "x" / "below"),
    ):
        pass
    assert (names(tmp_path), (tmp_path / "x").read_text()) == (["x"], "before")


def test_directory_in_place_of_a_file_is_named(tmp_path):
    path = tmp_path / "latest"
    path.mkdir()
    with pytest.raises(UserError, match=re.escape(repr(str(path)))):
        write_whole(path, "new")
    assert names(tmp_path) == ["latest"]


def test_output_directory_may_be_a_link_but_not_a_mount_point(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with new_folder(tmp_path / "link") as partial:
        (partial / "x").touch()
    assert (names(tmp_path), names(tmp_path / "there")) == (["link", "there"], ["x"])
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "disk")
    with (
        pytest.raises(UserError, match=f"--output '{tmp_path}/disk'"),
        new_folder(tmp_path / "disk"),
    ):
        pytest.fail("the mount point was not detected before writing")
    with new_folder(tmp_path / "disk" / "below"):
        pass


def test_writer_retries_if_its_directory_was_removed_as_stale(tmp_path, monkeypatch):
    make = tempfile.mkdtemp
    made = []

    def make_and_lose_the_first(**options):
        made.append(make(**options))
        if len(made) == 1:
            Path(made[0]).rmdir()
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_lose_the_first)
    write_whole(tmp_path / "x", "whole")
    assert len(made) == 2
    assert names(tmp_path) == ["x"]


def test_sigterm_raises_only_inside_the_block():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), sigterm_raises():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    with sigterm_raises():
        # Python has no signal handlers outside the main thread
        thread = threading.Thread(target=lambda: sigterm_raises().__enter__())
        thread.start()
        thread.join()


@pytest.mark.parametrize("write", [write_whole, lambda path, text: fill(path)])
def test_special_file_is_never_replaced(tmp_path, write):
    device = Path("/dev/null").stat().st_rdev
    for path in (Path("/dev/null"), Path("/dev/stdin")):
        with contextlib.suppress(UserError):
            write(path, "text")
    assert Path("/dev/null").stat().st_rdev == device
    assert Path("/dev/stdin").is_symlink()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with contextlib.suppress(UserError):
        write(fifo, "text")
    os.close(reader)
    assert fifo.is_fifo()


def fill(path):
    with new_file(path) as partial:
        partial.write_text("x")


def test_directory_and_special_file_are_no_output_file(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, Path("/dev/null"), tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=re.escape(repr(str(path)))), new_file(path):
            pytest.fail("the block began")


@pytest.mark.parametrize("name", ["file", "file/below", "fifo", "/dev/null", "/dev/null/below"])
def test_file_is_no_output_directory(tmp_path, name):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    path = tmp_path / name
    with pytest.raises(UserError) as caught, new_folder(path):
        pytest.fail("the block began")
    assert repr(str(path)) in str(caught.value)
    assert "not empty" not in str(caught.value)


@pytest.mark.timeout(10)
def test_fifo_that_nothing_reads_is_rejected_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match=f"'{tmp_path}/fifo'"):
        write_whole(tmp_path / "fifo", "text")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "fifo", "text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)


def test_socket_is_no_output(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for check in (check_text_output, check_output_file, check_output_folder):
            with pytest.raises(UserError, match=f"'{tmp_path}/socket'"):
                check(tmp_path / "socket")


@pytest.mark.parametrize("name", ["link", "link/below"])
@pytest.mark.parametrize("kind", [new_file, new_folder])
def test_link_that_leads_nowhere_is_no_output(tmp_path, kind, name):
    """Its disk may not be mounted, and the output would be written to another one."""
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "there")
    with pytest.raises(UserError, match=f"'{tmp_path}/link"), kind(tmp_path / name):
        pytest.fail("the block began")
    assert names(tmp_path) == ["link"]
    assert (tmp_path / "link").is_symlink()


def test_text_for_an_open_file_does_not_replace_what_was_printed(tmp_path):
    program = (
        "from asrllm.atomic import write_whole; from pathlib import Path; "
        "print('table'); write_whole(Path('/dev/stdout'), 'text')"
    )
    with open(tmp_path / "printed", "w") as file:
        command = [sys.executable, "-c", program]
        subprocess.run(command, stdout=file, check=True, cwd=REPOSITORY, timeout=30)
    assert (tmp_path / "printed").read_text() == "table\ntext"


def test_directory_without_permission_is_reported_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    for check in (check_output_file, check_text_output, check_writable_folder):
        with pytest.raises(UserError, match=f"'{tmp_path}/new' .* '{tmp_path}'"):
            check(tmp_path / "new")
