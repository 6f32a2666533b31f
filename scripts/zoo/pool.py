"""Worker processes that try one name after another, and are killed and replaced when they take too long or die."""

from __future__ import annotations

import dataclasses
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from zoo import environment

Task = tuple[str, str]
"""Library and name."""

LIBRARIES = {
    "timm": "zoo.timm_models",
    "torchvision": "zoo.torchvision_models",
    "transformers": "zoo.transformers_models",
}


@dataclasses.dataclass(slots=True)
class _Worker:
    process: Any
    pipe: Connection
    task: Task | None = None
    since: float = 0.0


def run(tasks: Iterable[Task], *, workers: int, timeout: float, memory: int) -> Iterator[dict[str, Any]]:
    """Try every task, and yield what became of it as plain data, in the order in which they finish.

    Args:
        tasks: what to try.
        workers: number of processes.
        timeout: seconds for one task.
        memory: bytes for one process.
    """
    waiting = iter(tasks)
    crew = [_start(memory) for _ in range(workers)]
    try:
        for worker in crew:
            _give(worker, waiting)
        while any(worker.task for worker in crew):
            busy = [worker for worker in crew if worker.task]
            ready = wait([worker.pipe for worker in busy], timeout=1)
            for worker in busy:
                if worker.pipe in ready:
                    result = _receive(worker)
                elif time.monotonic() - worker.since > timeout:
                    result = _failure(worker, f"took longer than {timeout:.0f} s")
                else:
                    continue
                yield result
                if not worker.process.is_alive() or "failure" in result:
                    _stop(worker)
                    fresh = _start(memory)
                    worker.process, worker.pipe = fresh.process, fresh.pipe
                _give(worker, waiting)
    finally:
        for worker in crew:
            _stop(worker)


def _start(memory: int) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, memory), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _give(worker: _Worker, waiting: Iterator[Task]) -> None:
    worker.task = next(waiting, None)
    worker.since = time.monotonic()
    if worker.task:
        worker.pipe.send(worker.task)


def _receive(worker: _Worker) -> dict[str, Any]:
    try:
        result: dict[str, Any] = worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join(timeout=5)
        return _failure(worker, f"the process died (exit code {worker.process.exitcode})")
    return result


def _failure(worker: _Worker, reason: str) -> dict[str, Any]:
    library, name = worker.task or ("", "")
    return {"library": library, "name": name, "failure": reason, "seconds": time.monotonic() - worker.since}


def _stop(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.pipe.close()


def _work(pipe: Connection, memory: int) -> None:
    """What a worker process does, until it is killed or its pipe closes."""
    # Libraries print; the terminal belongs to the progress bar.
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 it stays open to the end
    environment.prepare(memory=memory)
    from zoo import trial

    while True:
        try:
            library, name = pipe.recv()
        except EOFError:
            return
        outcome = trial.Outcome(library, name)
        trial.attempt(outcome, importlib.import_module(LIBRARIES[library]).attempts(name))
        pipe.send(dataclasses.asdict(outcome))
