"""Fill the holes that `torch_skeleton` leaves: copy what is in a file, write what is in memory, compute the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from wnconvert.files import torch_skeleton
from wnconvert.files.box import Box
from wnconvert.files.checksums import ChecksummedFiles
from wnconvert.files.entries import Raw
from wnconvert.files.torch_skeleton import Hole, Skeleton
from wnconvert.files.written import Outcomes, Written, refused
from wnconvert.sites import RowCounts
from wnconvert.stream import engine
from wnconvert.stream.plan import Copy, Fold, Half, Pair, PartPlace, Place, Split, Task
from wnconvert.stream.receipts import Receipts
from wnconvert.watch import Watcher


@dataclasses.dataclass(frozen=True, slots=True)
class Copied:
    """Bytes of an input. `checksum` is their CRC-32 where the input says it."""

    raw: Raw
    checksum: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Held:
    """A tensor that `load` gives, laid out in memory with these strides."""

    load: Callable[[], Tensor]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class PartOf:
    """A part of a weight that is made, or of a direction whose magnitudes are known."""

    made: Pair | Half
    box: Box


Content = Copied | Held | Pair | Half | PartOf
"""A pair is multiplied, a half is made together with the other one."""


def memory_of(storage: torch.UntypedStorage) -> Held:
    """The bytes of a storage in memory."""
    return Held(lambda: torch.empty(0, dtype=torch.uint8).set_(storage), (1,))


class Filling:
    """Everything that goes into the holes of some files."""

    def __init__(self) -> None:
        self._archives: list[tuple[Path, Skeleton, list[Content]]] = []
        self._copies: list[tuple[Path, int, Raw]] = []

    @property
    def empty(self) -> bool:
        """Whether there is nothing to fill."""
        return not self._archives

    def add(self, path: Path, skeleton: Skeleton, content_of: Callable[[Hole], Content]) -> None:
        """Take one archive of a file."""
        self._archives.append((path, skeleton, [content_of(hole) for hole in skeleton.holes]))

    def copy(self, path: Path, start: int, raw: Raw) -> None:
        """Take bytes that are to be copied to a position."""
        self._copies.append((path, start, raw))

    def run(self, watcher: Watcher) -> Written:
        """Fill every hole and note the checksums.

        Where a weight cannot be split, there is nothing in its place, and the files are to be written once more.
        """
        for path, skeleton, contents in self._archives:
            with path.open("r+b") as file:
                for hole, content in zip(skeleton.holes, contents, strict=True):
                    if isinstance(content, Held):
                        file.seek(hole.start)
                        file.write(_flat(content))
        tasks, opened = self._tasks(), ChecksummedFiles()
        receipts = Receipts(tasks)
        results = engine.run(tasks, watcher, opened=opened)
        outcomes = engine.outcomes(tasks, results)
        if not refused(outcomes):
            self._settle(opened, outcomes)
        return Written(outcomes, receipts=receipts.taken(results))

    def _tasks(self) -> list[Task]:
        tasks: list[Task] = [Copy(raw, Place(path, start)) for path, start, raw in self._copies]
        halves: dict[Half, Place] = {}
        for path, skeleton, contents in self._archives:
            for hole, content in zip(skeleton.holes, contents, strict=True):
                place = Place(path, hole.start)
                if isinstance(content, Copied):
                    tasks.append(Copy(content.raw, place))
                elif isinstance(content, Pair):
                    tasks.append(Fold(content, place))
                elif isinstance(content, Half):
                    halves[content] = place
                elif isinstance(content, PartOf):
                    tasks.append(_part_of(content, place))
        for half, place in halves.items():
            if half.part == "v":
                weight, g = half.weight, halves[dataclasses.replace(half, part="g")]
                tasks.append(Split(half.name, weight, half.axis, half.groups, weight.dtype, g, place))
        return tasks

    def _settle(self, opened: ChecksummedFiles, outcomes: Outcomes) -> None:
        for path, skeleton, contents in self._archives:
            checksums = []
            for hole, content in zip(skeleton.holes, contents, strict=True):
                known = content.checksum if isinstance(content, Copied) else None
                # Rows of zeros are written twice.
                again = isinstance(content, Half) and outcomes[content.name] != RowCounts(0, 0)
                checksums.append(opened.checksum(path, hole.start, hole.size, again=again) if known is None else known)
            with path.open("r+b") as file:
                torch_skeleton.settle(file, skeleton, checksums)


def _part_of(content: PartOf, place: Place) -> Task:
    made, target = content.made, PartPlace(place, content.box)
    if isinstance(made, Pair):
        return Fold(made, target)
    return Split(made.name, made.weight, made.axis, made.groups, made.weight.dtype, None, target)


def _flat(held: Held) -> memoryview[int]:
    tensor = held.load().detach()
    if tensor.stride() != held.strides:
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
        flat.as_strided(tensor.shape, held.strides).copy_(tensor)
    else:
        flat = tensor.as_strided((tensor.numel(),), (1,))
    return memoryview(flat.view(torch.uint8).numpy().data)
