"""Locks between processes."""

import errno
from typing import Any

import filelock

from asrllm.errors import UserError

# errors of flock(2) on file systems without locks: NFS without its lock daemon, Lustre by its mount
# options
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FileLock(filelock.FileLock):
    """filelock.FileLock that raises UserError on a file system without locks."""

    def acquire(self, *arguments: Any, **options: Any) -> Any:
        """Take the lock. Arguments and results are those of filelock.FileLock.

        Raises:
            UserError: the file system does not support locks.
        """
        try:
            return super().acquire(*arguments, **options)
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            raise UserError(
                f"{str(self.lock_file)!r} cannot be locked: its file system does not support "
                "locks. Use a directory on another file system, or mount this one with locks "
                "(Lustre: -o flock)."
            ) from error
