"""A lock on a folder, which the kernel releases when the process dies, however it dies."""

from __future__ import annotations

import errno
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a system with such locks
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"


class Lock:
    """Held while the object is. Several processes of one run hold it together."""

    def __init__(self, number: int) -> None:
        self._number = number

    def share(self) -> bool:
        """Let the other processes of this run hold it too. False if another run took it meanwhile."""
        return _flock(self._number, exclusive=False)

    def release(self) -> None:
        """Let go."""
        if self._number >= 0:
            os.close(self._number)
            self._number = -1


def take(folder: Path, *, exclusive: bool) -> Lock | None:
    """Lock a folder, which is made if need be.

    Args:
        folder: to lock.
        exclusive: for one process alone.

    Returns:
        None if another run holds it.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    path = folder / NAME
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            # Another run has just ended and removed the folder.
            continue
        if not _flock(number, exclusive=exclusive):
            os.close(number)
            return None
        if _is(number, path):
            return Lock(number)
        os.close(number)


def _flock(number: int, *, exclusive: bool) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(number, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        # A file system that has no locks cannot be helped.
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _is(number: int, path: Path) -> bool:
    """Whether an open file still is the one of that name."""
    try:
        return os.path.samestat(os.fstat(number), path.stat())
    except FileNotFoundError:
        return False
