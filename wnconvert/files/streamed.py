"""Write safetensors files from what lies in other files, a block at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from wnconvert.carriers.state_dict import Slots
from wnconvert.files import safetensors_header as header
from wnconvert.files.entries import Entry
from wnconvert.files.raw import Inline, Raw, Scattered
from wnconvert.files.written import Outcomes, Written, refused
from wnconvert.stream.plan import Copy, Fold, Half, Pair, Place, Put, Split, Task
from wnconvert.watch import Watcher


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    """One file to write.

    Attributes:
        path: to write.
        metadata: goes into its header.
        entries: gives its tensors as they stand now, in order.
    """

    path: Path
    metadata: Mapping[str, str] | None
    entries: Callable[[], Iterable[Entry]]


def write(output: Output, carrier: Slots, watcher: Watcher) -> Written:
    """Write one file, and tell the carrier what its deferred splits came to.

    Which weights can be split shows when their values are read, and what cannot stays as it is. That is rare, so the
    file is written as if all could, and once more where one could not.

    Raises:
        PairError: a pair cannot be multiplied.
        InputError: an input cannot be read.
        OSError: the output cannot be written.
    """
    settled: Outcomes = {}
    # Here and not above: listing a file must not import torch.
    from wnconvert.stream import engine, fileio
    from wnconvert.stream.receipts import Receipts

    while True:
        size, tasks = plan(output)
        fileio.create(output.path, size)
        receipts = Receipts(tasks)
        results = engine.run(tasks, watcher)
        found = engine.outcomes(tasks, results)
        for name, outcome in found.items():
            carrier.settle(name, outcome)
        settled |= found
        if not refused(found):
            return Written(settled, receipts=receipts.taken(results))
        output.path.unlink()


def plan(output: Output) -> tuple[int, list[Task]]:
    """The size of a file, and what to do to fill it."""
    entries = list(output.entries())
    first = header.render([(e.name, e.dtype, e.shape, stored_size(e)) for e in entries], output.metadata)
    tasks: list[Task] = [Put(first, Place(output.path, 0))]
    at = len(first)
    halves: dict[Raw | Inline | Scattered, Place] = {}
    for entry in entries:
        place = Place(output.path, at)
        at += stored_size(entry)
        made = entry.made
        if isinstance(entry.raw, Raw):
            tasks.append(Copy(entry.raw, place))
        elif isinstance(made, Pair):
            tasks.append(Fold(made, place))
        elif isinstance(made, Half):
            # g stands before v.
            if made.part == "g":
                halves[made.weight.raw] = place
            else:
                g = halves[made.weight.raw]
                tasks.append(Split(made.name, made.weight, made.axis, made.groups, entry.dtype, g, place))
        else:
            tasks.append(Put(_bytes_of(entry), place))
    return at, merged(tasks)


def stored_size(entry: Entry) -> int:
    """Bytes that a tensor takes in the file."""
    return entry.raw.size if entry.raw else header.size_in_bytes(entry.dtype, entry.shape)


def merged(tasks: Iterable[Task]) -> list[Task]:
    """Make one copy of copies that follow one another on both sides."""
    found: list[Task] = []
    for task in tasks:
        last = found[-1] if found else None
        if isinstance(task, Copy) and isinstance(last, Copy) and _follows(last, task):
            source = Raw(last.source.path, last.source.start, last.source.size + task.source.size)
            found[-1] = Copy(source, last.to)
        else:
            found.append(task)
    return found


def _follows(a: Copy, b: Copy) -> bool:
    return (
        a.source.path == b.source.path
        and a.source.start + a.source.size == b.source.start
        and a.to.path == b.to.path
        and a.to.start + a.source.size == b.to.start
    )


def _bytes_of(entry: Entry) -> bytes:
    import torch

    return entry.load().detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
