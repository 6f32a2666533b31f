"""Reading and writing parts of files at a position, from several threads. Nothing here imports torch."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import OrderedDict
from pathlib import Path
from types import TracebackType

from wnconvert.errors import InputError
from wnconvert.files.raw import Raw

_OPEN = 64
"""Files of each kind that are kept open."""

_WRITTEN = 512 << 10
"""Bytes written at a time. For more, file systems take memory in large blocks, which a virtual machine that gives free
memory back to its host has to ask for again: to ext4 there, 2 GB by 1 MB at a time took three times as long. For less,
it is the lock of the interpreter that takes long: a thread must have it back after each write."""

_CANNOT_COPY = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}


class Files:
    """Open files by path, for as long as the context lasts. Inputs are only read, outputs must exist."""

    def __init__(self) -> None:
        self._open: dict[bool, OrderedDict[Path, _Handle]] = {False: OrderedDict(), True: OrderedDict()}
        self._lock = threading.Lock()
        self._kernel_copies = hasattr(os, "copy_file_range")

    def __enter__(self) -> Files:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for opened in self._open.values():
            opened.clear()

    def read(self, path: Path, start: int, target: memoryview) -> None:
        """Fill `target` from a position of an input.

        Raises:
            InputError: the input ends before that, or cannot be read.
        """
        handle = self._handle(path, output=False)
        while target.nbytes:
            try:
                count = os.preadv(handle.number, [target], start)
            except OSError as error:
                raise InputError(f"{path}: cannot be read ({error.strerror})") from error
            if not count:
                raise InputError(f"{path}: became shorter while it was read")
            target, start = target[count:], start + count

    def write(self, path: Path, start: int, data: memoryview) -> None:
        """Write to a position of an output."""
        handle = self._handle(path, output=True)
        with handle.writing:
            while data.nbytes:
                count = os.pwrite(handle.number, data[:_WRITTEN], start)
                data, start = data[count:], start + count

    def copy(self, source: Raw, path: Path, start: int, buffer: memoryview) -> None:
        """Copy bytes from an input to an output, by the kernel if it can, else through `buffer`."""
        done = self._copy_in_kernel(source, path, start) if self._kernel_copies else 0
        while done < source.size:
            part = buffer[: source.size - done]
            self.read(source.path, source.start + done, part)
            self.write(path, start + done, part)
            done += part.nbytes

    def _copy_in_kernel(self, source: Raw, path: Path, start: int) -> int:
        """Copy what the kernel can, and return how many bytes that was."""
        reader, writer = self._handle(source.path, output=False), self._handle(path, output=True)
        done = 0
        while done < source.size:
            try:
                with writer.writing:
                    count = os.copy_file_range(
                        reader.number, writer.number, source.size - done, source.start + done, start + done
                    )
            except OSError as error:
                if error.errno not in _CANNOT_COPY:
                    raise
                self._kernel_copies = False
                return done
            if not count:
                # Some file systems copy nothing without an error; the end of the file is found out by reading.
                return done
            done += count
        return done

    def _handle(self, path: Path, *, output: bool) -> _Handle:
        opened = self._open[output]
        with self._lock:
            handle = opened.get(path)
            if handle is None:
                handle = _Handle(path, output=output)
                opened[path] = handle
                if len(opened) > _OPEN:
                    opened.popitem(last=False)
            else:
                opened.move_to_end(path)
        return handle


class _Handle:
    """A descriptor that closes when nobody uses it any more, so that no thread loses one it is reading from."""

    def __init__(self, path: Path, *, output: bool) -> None:
        self.number = -1
        # The kernel lets one thread write to a file at a time, and the others spin meanwhile.
        self.writing = threading.Lock()
        try:
            self.number = os.open(path, os.O_RDWR | os.O_CLOEXEC if output else os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if output:
                raise
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error

    def __del__(self) -> None:
        if self.number >= 0:
            with contextlib.suppress(OSError):
                os.close(self.number)


def create(path: Path, size: int) -> None:
    """Make an output of this size, full of zeros, in whose parts several threads can write."""
    with path.open("wb") as file:
        file.truncate(size)
