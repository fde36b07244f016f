"""Locks between processes, whose failures name the file and the fix."""

import errno
from typing import Any

import filelock

from asrllm.errors import UserError

# what flock(2) fails with on file systems without locks: NFS without its lock daemon, some of Lustre
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FileLock(filelock.FileLock):
    """filelock.FileLock that reports a file system without locks as an error of the user's."""

    def acquire(self, *arguments: Any, **options: Any) -> Any:
        """Take the lock. Arguments and results are those of filelock.FileLock.

        Raises:
            UserError: the file system does not support locks.
        """
        try:
            return super().acquire(*arguments, **options)
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in UNSUPPORTED:
                raise
            raise UserError(
                f"{str(self.lock_file)!r} cannot be locked: its file system does not support locks. "
                "Use a directory on another file system, or mount this one with locks (Lustre: -o flock)."
            ) from error
