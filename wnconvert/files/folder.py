"""What documents of several files in a folder have in common. Nothing here imports torch."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from wnconvert.carriers.state_dict import StateDictCarrier
from wnconvert.files import index as indices
from wnconvert.files import parts
from wnconvert.files.finished import mark_of, mark_of_inputs
from wnconvert.files.parts import Part
from wnconvert.files.written import Written
from wnconvert.ranks import ALONE, Ranks
from wnconvert.sites import RowCounts
from wnconvert.watch import SILENT, Watcher

if TYPE_CHECKING:
    from wnconvert.files import Document
    from wnconvert.report.model import OutputCheck
    from wnconvert.stream.receipts import Receipts


class File(NamedTuple):
    """One file of the result.

    Attributes:
        content: gives what goes into it, for `finished.mark_of`.
        write: writes it under a path.
    """

    content: Callable[[], Iterable[object]]
    write: Callable[[Path], Written]


class FolderDocument(abc.ABC):
    """An open folder: a description, and the files that it names. See `Document`, `Shared` and `Watched`.

    The result has files of the same names.
    """

    def __init__(self, folder: Path, carrier: StateDictCarrier) -> None:
        self.carrier = carrier
        self.notes: list[str] = []
        self._folder = folder
        self._watcher: Watcher = SILENT
        self._crew = ALONE

    def join(self, crew: Ranks) -> None:
        """See `Shared.join`."""
        self._crew = crew

    def watch(self, watcher: Watcher) -> None:
        """See `Watched.watch`."""
        self._watcher = watcher

    def save(self, folder: Path, name: str) -> Receipts:
        """See `Document.save`. Files that do not belong to the checkpoint (configuration, tokenizer) are copied."""
        indices.require_outside(folder, self._folder)
        target = folder / name
        target.mkdir(exist_ok=True)
        inputs = mark_of_inputs(self._folder / own for own in self._own())
        todo = {
            path: Part(
                target / path,
                (self._folder / path).stat().st_size,
                functools.partial(_mark, inputs, file),
                functools.partial(file.write, target / path),
            )
            for path, file in self._files().items()
        }
        written = parts.write(folder, todo, self._crew)
        for of_file in written.values():
            self._settle(of_file.outcomes)
        self._crew.first(lambda: self._finish(target, written))
        return _receipts_of(written.values())

    def compare_outputs(self, other: Document) -> OutputCheck | None:  # noqa: ARG002
        """None: a checkpoint cannot be run."""
        return None

    @abc.abstractmethod
    def _own(self) -> Sequence[str]:
        """The paths of the files of the checkpoint in its folder, the description first."""

    @abc.abstractmethod
    def _files(self) -> Mapping[str, File]:
        """What to write, by path."""

    @abc.abstractmethod
    def _describe(self, target: Path, written: Mapping[str, Written]) -> None:
        """Write the description of a folder whose files are all there."""

    def _settle(self, outcomes: Mapping[str, RowCounts | str]) -> None:
        for weight, outcome in outcomes.items():
            self.carrier.settle(weight, outcome)

    def _finish(self, target: Path, written: Mapping[str, Written]) -> None:
        indices.copy_others(self._folder, target, set(self._own()))
        self._describe(target, written)


def _receipts_of(written: Iterable[Written]) -> Receipts:
    # Here and not above: listing a folder must not import torch.
    from wnconvert.stream.receipts import Receipts

    return Receipts.together(of_file.receipts for of_file in written if of_file.receipts is not None)


def _mark(inputs: int, file: File) -> str:
    return mark_of(inputs, file.content())
