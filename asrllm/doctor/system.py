"""ffmpeg, disks, shared memory and the limit of open files."""

import os
import resource
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from asrllm.defaults import MIN_DESCRIPTORS
from asrllm.doctor.findings import Finding, ok, problem, warning

GIB = 1 << 30
SHARED_MEMORY = Path("/dev/shm")
USUAL_DESCRIPTORS = 1024  # the default of Linux
LOW_DISK = 10 * GIB  # room for a few checkpoints of adapters and a projector
LOW_TEMPORARY = 1 * GIB
# Docker's default is 64 MiB, and NCCL's documentation recommends --shm-size=1g. The reading
# processes of a rank also put several batches of audio there.
LOW_SHARED = 1 * GIB


def check_system(environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Check what training needs of the operating system."""
    return [
        check_ffmpeg(),
        check_disk(Path.cwd()),
        check_temporary(environment.get("TMPDIR")),
        check_shared_memory(SHARED_MEMORY),
        check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
    ]


def check_ffmpeg() -> Finding:
    """Look for ffmpeg and ffprobe, which open containers that libsndfile does not."""
    missing = [name for name in ("ffmpeg", "ffprobe") if not shutil.which(name)]
    if not missing:
        return ok("ffmpeg", f"ffmpeg is {shutil.which('ffmpeg')}")
    return warning(
        "ffmpeg",
        f"{' and '.join(missing)} not found on PATH, so m4a, mp4, webm and others cannot be read",
        "Install ffmpeg if the corpus has such files.",
    )


def check_disk(folder: Path) -> Finding:
    """Check the free space of the current directory, where runs write by default."""
    free = shutil.disk_usage(folder).free
    text = f"the current directory {str(folder)!r} has {amount(free)} free"
    if free < LOW_DISK:
        fix = "Free space, or set exp_dir to a directory on a larger disk."
        return warning("disk", text, fix)
    return ok("disk", text)


def check_temporary(variable: str | None) -> Finding:
    """Check the directory of temporary files.

    Args:
        variable: value of TMPDIR, or None if it is not set.
    """
    if variable and not os.access(variable, os.W_OK | os.X_OK):
        return warning(
            "temporary files",
            f"TMPDIR={variable!r} is not a directory that can be written, so it is ignored",
            "Create it, or unset TMPDIR.",
        )
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError:
        return problem(
            "temporary files",
            "no directory for temporary files can be written",
            "Set TMPDIR to a directory on a local disk.",
        )
    free = shutil.disk_usage(folder).free
    text = f"the directory of temporary files {folder!r} has {amount(free)} free"
    if free < LOW_TEMPORARY:
        return warning("temporary files", text, "Set TMPDIR to a directory on a larger disk.")
    return ok("temporary files", text)


def check_shared_memory(folder: Path) -> Finding:
    """Check the shared memory, which reading processes and NCCL use."""
    if not os.access(folder, os.W_OK):
        return problem(
            "shared memory",
            f"{str(folder)!r} is missing or cannot be written",
            "Mount it as tmpfs, or set data.num_workers=0 on a single GPU.",
        )
    free = shutil.disk_usage(folder).free
    text = f"{str(folder)!r} has {amount(free)} free"
    if free < LOW_SHARED:
        fix = "Start the container with --shm-size=16g or --ipc=host, or remove old files from it."
        return warning("shared memory", text, fix)
    return ok("shared memory", text)


def check_open_files(limit: int) -> Finding:
    """Check the soft limit of open files, which is negative if there is none."""
    if limit < 0:
        return ok("open files", "the number of open files is not limited")
    text = f"the limit of open files is {limit}"
    fix = "Raise it with 'ulimit -n 4096'."
    if limit < MIN_DESCRIPTORS:
        return problem("open files", text, fix)
    if limit < USUAL_DESCRIPTORS:
        return warning("open files", text, fix)
    return ok("open files", text)


def amount(size: int) -> str:
    """Return a number of bytes in GiB."""
    return f"{size / GIB:.1f} GiB"
