"""What `torch.save` writes: state dicts, nested training checkpoints, and whole pickled modules."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from wnconvert.carriers import Carrier
from wnconvert.carriers.composite import CompositeCarrier
from wnconvert.carriers.module import ModuleCarrier
from wnconvert.carriers.shared_storage import SharedStorageCarrier
from wnconvert.carriers.state_dict import StateDictCarrier
from wnconvert.errors import InputError, UsageError
from wnconvert.files import torch_load, torch_map, torch_save, tree
from wnconvert.files.file_map import NotMappable
from wnconvert.files.magnitudes import of_tensors
from wnconvert.files.refill import refill
from wnconvert.files.torch_map import TorchMap
from wnconvert.files.tree import Tree
from wnconvert.walk.arch import walker_for
from wnconvert.watch import SILENT, Watcher

if TYPE_CHECKING:
    from wnconvert.files import Document, ReadOptions
    from wnconvert.report.model import MagnitudeStatistics, OutputCheck
    from wnconvert.stream.receipts import Receipts


def recognise(path: Path) -> bool:
    """Whether the file starts like a zip archive or a pickle."""
    return torch_load.is_zip(path) or torch_load.is_pickle(path)


def read(path: Path, options: ReadOptions) -> TorchDocument:
    """Open a file. Where the format allows it, tensors are mapped and not read.

    Raises:
        InputError: it is damaged, holds Python objects and `unsafe_load` is not set, needs a class that cannot be
            imported, is TorchScript or an exported program, or holds no network.
    """
    opened = open_file(path, options)
    root = opened.root
    if isinstance(root, Tensor):
        raise InputError(f"{path}: holds a single tensor without a name, not a network")
    found = tree.explore(root, drop_optimizer=options.drop_optimizer, source=opened)
    if found.modules and isinstance(opened, TorchMap):
        # Modules are changed in place, which a map cannot be.
        root = torch_load.load(path, unsafe=options.unsafe_load)
        found = tree.explore(root, drop_optimizer=options.drop_optimizer)
    if not found.entries and not found.modules:
        what = "only optimizer state" if found.kept or found.dropped else "no tensors"
        raise InputError(f"{path}: holds {what}")
    return TorchDocument(path, root, found, _carrier(found, path, options), opened)


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded(tree.Memory):
    """The contents of a file in memory, or mapped as torch does it."""

    root: object


def open_file(path: Path, options: ReadOptions) -> TorchMap | Loaded:
    """Open a file without reading its tensors if its kind allows it.

    Raises:
        InputError: see `read`.
    """
    try:
        return torch_map.load(path)
    except NotMappable:
        return Loaded(torch_load.load(path, unsafe=options.unsafe_load))


@dataclasses.dataclass(frozen=True, slots=True)
class _Carriers:
    """The carrier of the whole file, and the part of it that holds bare tensors."""

    whole: Carrier
    state: StateDictCarrier
    modules: tuple[ModuleCarrier, ...] = ()


class TorchDocument:
    """One open file. See `Document`."""

    def __init__(self, path: Path, root: object, found: Tree, carriers: _Carriers, opened: TorchMap | Loaded) -> None:
        self.format = "torch-module" if found.modules else "torch"
        self.notes = list(_notes(found))
        self.carrier = carriers.whole
        self._path = path
        self._root = root
        self._tree = found
        self._carriers = carriers
        self._opened = opened
        self._watcher = SILENT

    def magnitudes(self) -> Mapping[str, MagnitudeStatistics]:
        """See `Document.magnitudes`."""
        split = (site for site in self.carrier.sites("torch") if site.state == "split" and not site.skip)
        return of_tensors((site.name, self.carrier.read_pair(site)[0]) for site in split)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of its networks by dotted path."""
        state = self._carriers.state
        if isinstance(self._opened, TorchMap):
            # A map cannot be written to, and whoever gets these may train them.
            state = StateDictCarrier(tree.explore(torch_load.load(self._path, unsafe=False)).entries)
        found = {entry.name: entry.load() for entry in state.entries()}
        for path, module in self._tree.modules.items():
            prefix = f"{path}." if path else ""
            found |= {prefix + name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
        return found

    def watch(self, watcher: Watcher) -> None:
        """See `Watched.watch`."""
        self._watcher = watcher

    def save(self, folder: Path, name: str) -> Receipts | None:
        """See `Document.save`."""
        for part in self._carriers.modules:
            part.clean()
        maps = [self._opened] if isinstance(self._opened, TorchMap) else []
        job = torch_save.Job({folder / name: self._root}, self._tree, self._carriers.state, maps)
        return torch_save.save(job, self._watcher).receipts

    def compare_outputs(self, other: Document) -> OutputCheck | None:  # noqa: ARG002
        """None: a checkpoint cannot be run."""
        return None


class DictCarrier(StateDictCarrier):
    """A state dict in memory, nested or not. The dict that it was made from is left alone."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._root = _copy_containers(state, {})
        self._tree = tree.explore(self._root)
        super().__init__(self._tree.entries, others=self._tree.kept)

    def rebuild(self) -> Any:
        """The converted dict, of the same type. Call it once, when everything is converted."""
        refill(self._tree, self)
        return self._root


def carrier_of(state: Mapping[str, Any]) -> DictCarrier:
    """Make a carrier of a state dict in memory."""
    return DictCarrier(state)


def _copy_containers(value: Any, copies: dict[int, Any]) -> Any:
    """Copy dicts and what holds dicts, attributes such as `_metadata` included, but nothing else."""
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, dict):
        new = copies[id(value)] = copy.copy(value)
        for key, item in value.items():
            new[key] = _copy_containers(item, copies)
        return new
    if type(value) in (list, tuple):
        return type(value)(_copy_containers(item, copies) for item in value)
    return value


def _carrier(found: Tree, path: Path, options: ReadOptions) -> _Carriers:
    walker = walker_for(options.arch, path)
    state = SharedStorageCarrier(found.entries, others=found.kept, walker=walker, streamed=not found.modules)
    if not found.modules:
        return _Carriers(state, state)
    modules = {f"{name}." if name else "": ModuleCarrier(module) for name, module in found.modules.items()}
    if list(modules) == [""]:
        if walker is not None:
            raise UsageError(f"{path}: holds the module itself, so --arch has nothing to add")
        return _Carriers(modules[""], state, (modules[""],))
    parts: dict[str, Carrier] = dict(modules)
    if found.entries or found.kept:
        parts[""] = state
    return _Carriers(CompositeCarrier(parts), state, tuple(modules.values()))


def _notes(found: Tree) -> Iterator[str]:
    if found.optimizers:
        where = ", ".join(repr(path) for path in found.optimizers)
        yield (
            f"optimizer state at {where} is kept but refers to parameters that changed; --optimizer drop leaves it out"
        )
    if found.dropped:
        yield f"optimizer state at {', '.join(repr(path) for path in found.dropped)} is left out"
