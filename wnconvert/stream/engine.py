"""Do the tasks of a plan on several threads, each of which reads, computes and writes in memory of its own.

While one thread waits for the disk or the kernel copies for it, another computes: both Python's file functions and
torch's operators release the lock of the interpreter.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from wnconvert.files.raw import Raw
from wnconvert.sites import RowCounts
from wnconvert.stream import batches, work
from wnconvert.stream.batches import Job
from wnconvert.stream.fileio import Files
from wnconvert.stream.plan import Checksum, Split, Task
from wnconvert.stream.work import Result
from wnconvert.stream.workspace import Workspace
from wnconvert.watch import SILENT, Watcher

_POLL = 0.1
"""Seconds between two looks at the workers."""


def run(
    tasks: Sequence[Task], watcher: Watcher = SILENT, *, workers: int | None = None, opened: Files | None = None
) -> dict[int, list[Result]]:
    """Do all tasks. Output files must exist, in their final size.

    Args:
        tasks: what to do. Their order says nothing about what comes first.
        watcher: is told the bytes gone through.
        workers: number of threads; as many as there are processors if None, but 2 to 4.
        opened: does the reading and writing, and is closed at the end.

    Returns:
        What the pieces of a task came to, in their order, by the number of the task, where there is anything to say.

    Raises:
        PairError: a pair cannot be multiplied; of several, one of the first.
        InputError: an input cannot be read.
        OSError: an output cannot be written.
    """
    state, total = _State(tasks), size(tasks)
    threads = torch.get_num_threads()
    with opened or Files() as files:
        crew = [
            threading.Thread(target=_work, args=(state, files), name=f"wnconvert-{i}", daemon=True)
            for i in range(workers or _workers())
        ]
        for worker in crew:
            worker.start()
        try:
            for worker in crew:
                while worker.is_alive():
                    worker.join(_POLL)
                    watcher.bytes(state.done, total)
        finally:
            state.stop = True
            for worker in crew:
                worker.join()
            # The workers' own setting reaches further than their threads in some builds of torch.
            torch.set_num_threads(threads)
    return state.outcome()


def size(tasks: Sequence[Task]) -> int:
    """Bytes that `run` goes through, for a progress bar."""
    return sum(map(batches.size, tasks))


def outcomes(tasks: Sequence[Task], results: Mapping[int, Sequence[Result]]) -> dict[str, RowCounts | str]:
    """What the splits among some tasks came to, by the name of the weight. See `outcome_of`."""
    return {task.name: outcome_of(results.get(i, [])) for i, task in enumerate(tasks) if isinstance(task, Split)}


def outcome_of(parts: Sequence[Result]) -> RowCounts | str:
    """What the pieces of a split came to: the rows that were changed, or why it cannot be split."""
    split = [part for part in parts if isinstance(part, work.SplitPart)]
    problem = next((part.problem for part in split if part.problem is not None), None)
    if problem is not None:
        return problem
    return RowCounts(sum(part.counts.zero for part in split), sum(part.counts.scaled for part in split))


def checksum(path: Path) -> int:
    """The CRC-32 of a file, found on several threads.

    Raises:
        InputError: it cannot be read.
    """
    parts = run([Checksum(Raw(path, 0, path.stat().st_size))]).get(0, [])
    return sum_of(parts).crc


def sum_of(parts: Sequence[Result]) -> work.Sum:
    """What the pieces of a `Checksum` came to."""
    return work.whole(part for part in parts if isinstance(part, work.Sum))


class _State:
    """What the workers share."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.stop = False
        self.done = 0
        self._lock = threading.Lock()
        self._jobs = batches.jobs(tasks)
        self._results: dict[int, list[tuple[int, Result]]] = {}
        self._errors: list[tuple[int, int, BaseException]] = []

    def take(self) -> Job | None:
        with self._lock:
            return None if self.stop else next(self._jobs, None)

    def finish(self, job: Job, results: Sequence[Result]) -> None:
        with self._lock:
            self.done += job.size
            for (task, number), result in zip(job.parts, results, strict=True):
                if result is not None:
                    self._results.setdefault(task, []).append((number, result))

    def fail(self, part: tuple[int, int], error: BaseException) -> None:
        with self._lock:
            self.stop = True
            self._errors.append((*part, error))

    def outcome(self) -> dict[int, list[Result]]:
        if self._errors:
            raise min(self._errors, key=lambda found: found[:2])[2]
        return {
            task: [result for _, result in sorted(found, key=lambda item: item[0])]
            for task, found in self._results.items()
        }


def _work(state: _State, files: Files) -> None:
    torch.set_num_threads(1)
    space = Workspace(files)
    job: Job | None = None
    with torch.inference_mode():
        try:
            while (job := state.take()) is not None:
                state.finish(job, job.run(space))
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            state.fail(job.parts[0] if job else (0, 0), error)


def _workers() -> int:
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, max(2, processors))
