"""Folders of torch.distributed.checkpoint: `.metadata` and the `.distcp` files that it describes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from wnconvert.carriers.state_dict import StateDictCarrier
from wnconvert.errors import InputError
from wnconvert.files import dcp_metadata, dcp_save, dcp_split, tree
from wnconvert.files.dcp_items import Items
from wnconvert.files.dcp_plan import Input, Plan, Record
from wnconvert.files.entries import Entry
from wnconvert.files.folder import File, FolderDocument
from wnconvert.files.magnitudes import of_tensors
from wnconvert.files.written import Outcomes, Written, refused
from wnconvert.walk.arch import walker_for

if TYPE_CHECKING:
    from wnconvert.files import ReadOptions
    from wnconvert.report.model import MagnitudeStatistics

Path_ = tuple[Any, ...]


def read(path: Path, options: ReadOptions) -> DcpDocument:
    """Open a folder. Only its description is read now.

    Raises:
        InputError: the description is damaged or asks for Python objects, or a file is missing or cut short.
    """
    document = DcpDocument(path, dcp_metadata.read(path), options)
    if not document.has_weights():
        raise InputError(f"{path}: holds no tensors of a network")
    return document


class DcpDocument(FolderDocument):
    """One open folder. See `Document`."""

    format = "dcp"

    def __init__(self, folder: Path, metadata: Metadata, options: ReadOptions) -> None:
        self._metadata = metadata
        self._items = Items(folder, metadata)
        self._paths = _paths(metadata)
        self._optimizers = _optimizers(self._paths)
        self._dropped = set(self._of_optimizers()) if options.drop_optimizer else set[str]()
        entries = list(self._entries())
        others = self._of_optimizers() - self._dropped
        self._weights = [entry for entry in entries if entry.name not in others]
        carrier = StateDictCarrier(
            self._weights,
            others=[entry for entry in entries if entry.name in others],
            walker=walker_for(options.arch, folder),
            streamed=True,
        )
        super().__init__(folder, carrier)
        self.notes += self._notes()

    def has_weights(self) -> bool:
        """Whether it holds anything but optimizer state."""
        return bool(self._weights)

    def magnitudes(self) -> Mapping[str, MagnitudeStatistics]:
        """See `Document.magnitudes`."""
        return of_tensors((name, entry.load()) for name, entry in self.carrier.magnitudes().items())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of its networks by its flat name."""
        return {entry.name: entry.load() for entry in self.carrier.entries()}

    def _own(self) -> Sequence[str]:
        return dcp_metadata.NAME, *sorted(self._items.files())

    def _files(self) -> dict[str, File]:
        dcp_split.split(self.carrier, self._watcher, self._crew)
        return {
            file: File(functools.partial(map, Record.described, records), functools.partial(self._write, file, records))
            for file, records in self._plan().files.items()
        }

    def _describe(self, target: Path, written: Mapping[str, Written]) -> None:
        dcp_save.describe(target, self._plan(), {file: of_file.places for file, of_file in written.items()})

    def _plan(self) -> Plan:
        source = Input(self._metadata, self._items, self._weights, frozenset(self._dropped), self._paths)
        return Plan(source, self.carrier.slots())

    def _write(self, file: str, records: Sequence[Record], path: Path) -> Written:
        settled: Outcomes = {}
        while True:
            written = dcp_save.write(path, records, self._watcher)
            self._settle(written.outcomes)
            settled |= written.outcomes
            if not refused(written.outcomes):
                return dataclasses.replace(written, outcomes=settled)
            known = self.carrier.outcomes()
            if any(isinstance(found, str) and known[name] != found for name, found in written.outcomes.items()):
                # The magnitudes of a weight in parts are found before, and it could be split then.
                raise InputError(f"{self._folder}: changed while it was converted")
            # Which weights can be split shows when their values are read: once more where one could not.
            records = self._plan().files[file]

    def _entries(self) -> Iterator[Entry]:
        for name, described in self._metadata.state_dict_metadata.items():
            if isinstance(described, TensorStorageMetadata) and name not in self._dropped:
                path = self._paths[name]
                yield Entry(
                    name,
                    tuple(described.size),
                    str(described.properties.dtype).removeprefix("torch."),
                    load=functools.partial(self._items.read, name),
                    prefix="".join(f"{part}." for part in path[:-1]),
                    home=path[:-1],
                    locate=functools.partial(self._items.place, name),
                    fixed=not isinstance(path[-1], str),
                )

    def _of_optimizers(self) -> set[str]:
        return {name for name, path in self._paths.items() if any(path[: len(o)] == o for o in self._optimizers)}

    def _notes(self) -> Iterator[str]:
        where = ", ".join(repr(".".join(map(str, path))) for path in self._optimizers)
        if where and self._dropped:
            yield f"optimizer state at {where} is left out"
        elif where:
            yield (
                f"optimizer state at {where} is kept but refers to parameters that changed; "
                "--optimizer drop leaves it out"
            )


def _paths(metadata: Metadata) -> dict[str, Path_]:
    """Where each name of the flat state dict is in the nested one."""
    planned = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    found: dict[str, Path_] = {}
    for name in metadata.state_dict_metadata:
        path = planned.get(name)
        if isinstance(path, tuple) and path and ".".join(map(str, path)) == name:
            found[name] = path
        else:
            found[name] = (name,)
    return found


def _optimizers(paths: Mapping[str, Path_]) -> list[Path_]:
    """The outermost parts of the nested state dict that are optimizer state."""
    nested: dict[Any, Any] = {}
    for path in paths.values():
        holder = nested
        for key in path[:-1]:
            holder = holder.setdefault(key, {})
            if not isinstance(holder, dict):
                break
        else:
            holder[path[-1]] = None
    found: list[Path_] = []
    stack: list[tuple[Path_, Any]] = [((), nested)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, dict):
            if tree.is_optimizer(str(path[-1]) if path else "", value):
                found.append(path)
            else:
                stack.extend(reversed([((*path, key), item) for key, item in value.items()]))
    return found
