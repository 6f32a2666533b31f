"""Measure whole processes: wall time, processor time and peak memory.

What imports this must stay small. The peak of a process includes that of its parent at the moment it was started.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from timing import in_turns

MEGABYTE = 1e6
PYTHON = sys.executable
WNCONVERT = (PYTHON, "-m", "wnconvert")
IMPORT_TORCH = (PYTHON, "-c", "import torch")
HERE = Path(__file__).parent

_TOUCHED = 2.5
"""Bytes of memory touched for each that is to be written."""

_MOST = 0.8
"""The part of the available memory that is touched at most."""


class Failed(SystemExit):
    """A command failed. Ends the program with what the command said, unless it is caught."""


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One process, from its start to its end."""

    seconds: float
    cpu: float
    peak: float


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """Several runs of one command: medians, the fastest and the slowest, and the largest peak in megabytes."""

    seconds: float
    fastest: float
    slowest: float
    cpu: float
    peak: float

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Summary:
        """Summarise."""
        seconds = [run.seconds for run in runs]
        cpu = statistics.median(run.cpu for run in runs)
        return cls(statistics.median(seconds), min(seconds), max(seconds), cpu, max(run.peak for run in runs))


def run(command: Sequence[str | Path], accepted: Sequence[int] = (0,)) -> Run:
    """Run a command to its end, without its output.

    Raises:
        Failed: it did, and the message ends with what it wrote to standard error.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in accepted:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip()
            raise Failed(f"exit code {process.returncode}: {' '.join(words)}\n{said[-2000:]}")
    # Linux counts in kilobytes, macOS in bytes.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Run(seconds, usage.ru_utime + usage.ru_stime, peak / MEGABYTE)


def compare(
    commands: Mapping[str, Sequence[str | Path]],
    runs: int,
    clean: Callable[[], None] = lambda: None,
    *,
    memory: int = 0,
) -> dict[str, Summary]:
    """Run commands in turns.

    Args:
        commands: by name.
        runs: rounds that count; one before them does not.
        clean: called before every command, to remove what the last one wrote.
        memory: bytes that each of them writes, see `prime`.
    """

    def once(command: Sequence[str | Path]) -> Run:
        clean()
        prime(memory)
        return run(command)

    functions = {name: functools.partial(once, command) for name, command in commands.items()}
    return {name: Summary.of(samples) for name, samples in in_turns(functions, runs).items()}


def prime(size: int) -> None:
    """Touch memory for a command that writes so many bytes and give it back, in a process of its own.

    A virtual machine hands memory that was freed back to its host, about a gigabyte in a second, and asking for it
    again takes up to three times as long as copying into it. Without this, the time of a command that writes a large
    file depends on how much the one before it gave back, and how long ago. It is more than is written, as what is free
    goes on being handed back while the command runs.
    """
    wanted, available = int(_TOUCHED * size), _available()
    touched = wanted if available is None else min(wanted, int(_MOST * available))
    if touched:
        run([PYTHON, "-c", f"import mmap\nm = mmap.mmap(-1, {touched})\nfor i in range(0, {touched}, 4096): m[i] = 1"])


def copy_after_import(sources: Sequence[Path], target: Path, *, synced: bool = False) -> list[str | Path]:
    """A command that starts as long as one that imports torch, and then copies: see `prime`.

    If `synced`, the copy is on the disk at the end, as what wnconvert writes is.
    """
    then = ' && for copy; do :; done && exec sync "$copy"' if synced else ""
    return ["sh", "-c", f'{shlex.join(IMPORT_TORCH)} && cp "$@"{then}', "sh", *sources, target]


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """An empty folder that is removed at the end, however it comes."""

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    folder = Path(tempfile.mkdtemp(prefix="wnconvert-bench-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)


def default_folder() -> Path:
    """Memory where the system has a file system in it, so that no disk is measured; else the temporary folder."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())


def shortage(folder: Path, disk: float, memory: float) -> str | None:
    """What is missing for so many bytes on disk and in memory, in one line, or None.

    Files in a file system that lies in memory count as both.
    """
    free = shutil.disk_usage(folder).free
    if free < disk:
        return f"{folder} has {free / 1e9:.1f} GB free, {disk / 1e9:.1f} GB are needed; choose another --folder"
    needed = memory + (disk if in_memory(folder) else 0)
    available = _available()
    if available is not None and available < needed:
        where = f", {disk / 1e9:.1f} GB of them for files in {folder}" if in_memory(folder) else ""
        return f"{available / 1e9:.1f} GB of memory are available, {needed / 1e9:.1f} GB are needed{where}"
    return None


def describe_machine(folder: Path) -> str:
    """One line for the head of a table."""
    where = "in memory" if in_memory(folder) else "on disk, page cache warm"
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    return f"{os.cpu_count()} processors, OMP_NUM_THREADS {threads}, files in {folder} ({where})"


def in_memory(folder: Path) -> bool:
    """Whether the files of a folder are in memory and not on a disk."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return False
    points = [line.split()[1:3] for line in mounts.read_text().splitlines()]
    parents = {str(folder.resolve()), *(str(parent) for parent in folder.resolve().parents)}
    kinds = {point: kind for point, kind in points if point in parents}
    return kinds[max(kinds, key=len)] == "tmpfs" if kinds else False


def _available() -> int | None:
    """Bytes of memory that a new process can have."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
