"""Freed memory returns to the system."""

import platform
import subprocess
import sys

import pytest

MEBIBYTE = 1 << 20
# every second block is freed, so that glibc keeps them all
PROGRAM = """
from pathlib import Path
from resource import getpagesize
from asrllm.processes import release_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])

blocks = [bytearray(b"x" * 100_000) for _ in range(2000)]
del blocks[::2]
before = resident()
release_freed_memory()
print((before - resident()) * getpagesize())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are not trimmed")
def test_freed_memory_between_blocks_in_use_is_released():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True
    )
    assert int(done.stdout) > 50 * MEBIBYTE
