"""The command line of the soak test."""

from __future__ import annotations

import dataclasses
import itertools
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from soak import formats, process, trip
from wnconvert.errors import WnconvertError

WARM = 120
"""Seconds after which memory and files must not grow any more."""
ALLOWED = 64 << 20
"""Bytes of memory that may come on top."""
_SHOWN = 10

Source = tuple[str, Callable[[Path, random.Random], Path]]


@dataclasses.dataclass
class Tally:
    """What was found so far."""

    trips: int = 0
    idle: int = 0
    weights: int = 0
    tensors: int = 0
    differing: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)
    by_format: Counter[str] = dataclasses.field(default_factory=Counter)
    warm: process.Held | None = None

    def add(self, label: str, outcome: trip.Outcome) -> None:
        """Count one trip. Its label tells how to repeat it."""
        self.trips += outcome.idle is None
        self.idle += outcome.idle is not None
        self.weights += outcome.weights
        self.tensors += outcome.tensors
        self.differing += outcome.differing
        self.by_format[label.partition(" ")[0]] += 1
        if outcome.problem:
            self.problems.append(f"{label}: {outcome.problem}")


@click.command()
@click.option("--minutes", default=30.0, show_default=True, help="Every format is tried once in any case.")
@click.option("--seed", type=int, help="Of all random choices.  [default: one that is printed]")
@click.option("--only", type=int, help="Repeat only the trip of this number.")
@click.option("--real", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Also the models in there.")
@click.option("--folder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="For files on the way.")
def main(minutes: float, seed: int | None, only: int | None, real: Path | None, folder: Path | None) -> None:
    """Split random checkpoints of every format, verify, fold them, and compare every bit with the original.

    All of it happens in one process, through the Python API. Exits with 1 if anything differs, or if memory (by more
    than 64 MB) or the number of open files has grown between minute 2 and the end.
    """
    seed = random.SystemRandom().randrange(1 << 31) if seed is None else seed
    console = Console(stderr=True)
    console.print(f"seed {seed}", highlight=False)
    place = Path(tempfile.mkdtemp(prefix="wnconvert-soak-", dir=folder))
    tally = Tally()
    try:
        _run(_Plan(place, seed, 60 * minutes, only, _sources(real, console)), tally, console)
    except KeyboardInterrupt:
        console.print("interrupted")
    finally:
        shutil.rmtree(place, ignore_errors=True)
    sys.exit(_report(tally, seed))


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    place: Path
    seed: int
    seconds: float
    only: int | None
    sources: list[Source]


def _run(plan: _Plan, tally: Tally, console: Console) -> None:
    start = spoken = time.monotonic()
    columns = SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("starting", total=None)
        for number in itertools.count() if plan.only is None else [plan.only]:
            elapsed = time.monotonic() - start
            # What a format imports when it is first used is not counted as growth.
            tried = number >= len(plan.sources)
            if elapsed >= plan.seconds and tried and plan.only is None:
                return
            if tally.warm is None and elapsed >= min(WARM, plan.seconds / 2) and tried:
                tally.warm = process.held()
            _one(plan, tally, number)
            said = f"{tally.trips} round trips, {tally.weights} weights, {len(tally.problems)} problems"
            progress.update(bar, description=said)
            if not console.is_terminal and time.monotonic() - spoken >= 60:
                spoken = time.monotonic()
                console.print(f"{(spoken - start) / 60:.0f} min: {said}", highlight=False)


def _one(plan: _Plan, tally: Tally, number: int) -> None:
    """Do one trip in a folder of its own. Every choice in it hangs on the seed and its number only."""
    rng = random.Random(f"{plan.seed} {number}")
    name, make = plan.sources[number] if number < len(plan.sources) else rng.choice(plan.sources)
    label = f"{name} (--seed {plan.seed} --only {number})"
    folder = Path(tempfile.mkdtemp(dir=plan.place))
    try:
        tally.add(label, trip.there_and_back(make(folder, rng), folder, rng))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what this test is looking for
        tally.add(label, trip.Outcome(problem=f"{type(error).__name__}: {error}"))
    finally:
        shutil.rmtree(folder)


def _sources(real: Path | None, console: Console) -> list[Source]:
    found: list[Source] = [(maker.__name__, maker) for maker in formats.MAKERS]
    for path in _models(real) if real else ():
        with tempfile.TemporaryDirectory() as folder:
            try:
                trip.plain(path, Path(folder))
                formats.contents(path)
            except (WnconvertError, RuntimeError, OSError, ValueError) as error:
                console.print(f"without {path}: {str(error).splitlines()[0]}", highlight=False, markup=False)
                continue
        found.append((path.name.replace(" ", "_"), lambda folder, _rng, path=path: trip.plain(path, folder)))
    return found


def _models(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in formats.REAL and not any(part.startswith(".") for part in path.parts):
            yield path


def _report(tally: Tally, seed: int) -> int:
    now = process.held()
    warm = tally.warm or now
    memory, files = now.memory - warm.memory, now.files - warm.files
    shares = ", ".join(f"{count} {name}" for name, count in sorted(tally.by_format.items()))
    lines = {
        "seed": seed,
        "round trips": f"{tally.trips} ({shares}; {tally.idle} with nothing to convert)",
        "weights": f"{tally.weights} split and folded, {tally.tensors} tensors compared",
        "differing bytes": tally.differing,
        "problems": len(tally.problems),
        "memory": f"{now.memory / 1e6:.0f} MB, {memory / 1e6:+.0f} MB since it was warm",
        "open files": f"{now.files}, {files:+d} since then",
    }
    for name, value in lines.items():
        print(f"{name:16} {value}")
    for problem in tally.problems[:_SHOWN]:
        print(f"  {problem}")
    return int(bool(tally.problems or tally.differing or memory > ALLOWED or files > 0))
