"""Plans the folding of weights in a TorchScript archive, and makes the records of the result."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from wnconvert.carriers.torchscript.archive import Archive, StoredTensor
from wnconvert.carriers.torchscript.code import Unit, record_of
from wnconvert.carriers.torchscript.frames import Modules, Place
from wnconvert.carriers.torchscript.pickled import Call, Global, Instance, Storage, dump
from wnconvert.carriers.torchscript.rewrite import ClassText, ModuleEdit, reach
from wnconvert.carriers.torchscript.walk import Found, Weight
from wnconvert.names import plain_name
from wnconvert.walk.reader import Computed


@dataclasses.dataclass(frozen=True, slots=True)
class Fold:
    """One weight norm, and where it is.

    Attributes:
        norm: names of the weight and its pair.
        owners: the modules whose attribute the weight becomes, with its name there.
        pairs: the attributes that go.
        places: the expressions to replace.
    """

    norm: Computed
    owners: tuple[tuple[Instance, str], ...]
    pairs: tuple[tuple[Instance, str], ...]
    places: tuple[tuple[Place, str], ...]


class Obstacle(Exception):
    """Why a weight norm cannot be folded in the code."""


def plan(found: Found, norm: Computed) -> Fold:
    """Find out what must change to fold one weight.

    Raises:
        Obstacle: it cannot be done.
    """
    owners: dict[tuple[Instance, str], None] = {}
    pairs: dict[tuple[Instance, str], None] = {}
    for half in (norm.g, norm.v):
        for name in found.aliases(half):
            weight = found.weights[name]
            spelled = plain_name(name)
            plain = norm.v if norm.name == norm.v else spelled[0] if spelled else None
            if weight.module is None or plain is None:
                raise Obstacle(f"{half} is also {name}")
            path, _, leaf = plain.rpartition(".")
            owner = found.modules.at(path)
            if owner is None:
                raise Obstacle(f"no module {path} to hold it")
            owners[owner, leaf] = None
            pairs[weight.module, weight.leaf] = None
    for owner, leaf in owners:
        _require_free(found.modules, owner, leaf, pairs)
    for half in (norm.g, norm.v):
        others = found.interpreter.reader.others.get(half)
        if others or (found.uses.get(half) and half != norm.name):
            raise Obstacle(f"{half} is also used by {', '.join(others or ('a layer',))}")
    return Fold(norm, tuple(owners), tuple(pairs), tuple(_places(found, norm, list(owners))))


def _require_free(modules: Modules, owner: Instance, leaf: str, pairs: Mapping[tuple[Instance, str], None]) -> None:
    unit, fields = modules.unit(owner), modules.fields_of(owner)
    if (owner, leaf) in pairs or unit is None or fields is None:
        return
    if leaf in unit.methods:
        raise Obstacle(f"{leaf} is the name of a method of {modules.paths.get(owner) or owner.cls.name}")
    held = leaf in fields.parameters or leaf in fields.buffers or leaf in fields.constants
    if held or (leaf in owner.attributes and StoredTensor.of(owner.attributes[leaf]) is None):
        raise Obstacle(f"{leaf} is the name of another attribute of {modules.paths.get(owner) or owner.cls.name}")


def _places(found: Found, norm: Computed, owners: list[tuple[Instance, str]]) -> Iterator[tuple[Place, str]]:
    for name, places in found.places:
        if name != norm.name:
            continue
        for place in places:
            way = _way(found.modules, place.module, owners)
            if way is not None and found.interpreter.only_value_at(place) == name:
                yield place, way
                break
        else:
            raise Obstacle("its weight norm is computed where its module is out of reach")


def _way(modules: Modules, start: Instance, owners: list[tuple[Instance, str]]) -> str | None:
    unit = modules.unit(start)
    if unit is None:
        return None
    for owner, leaf in owners:
        way = modules.way(start, owner)
        if way is not None:
            return reach([*way, leaf], "{self}")
    return None


@dataclasses.dataclass(frozen=True, slots=True)
class Records:
    """What to write.

    Attributes:
        changed: new bytes by record, None for one that goes.
        added: new records: bytes, or a tensor that is computed when it is written.
        code: all code as it is then.
    """

    changed: dict[str, bytes | None]
    added: dict[str, bytes | Callable[[], Tensor]]
    code: dict[str, bytes]
    root: Any


class Folder:
    """Makes the records of an archive after some weights are folded."""

    def __init__(self, archive: Archive, found: Found, folds: Mapping[str, tuple[Fold, Callable[[], Tensor]]]) -> None:
        self._archive = archive
        self._found = found
        self._modules = found.modules
        self._folds = folds
        self._edits: dict[Instance, ModuleEdit] = {}
        self._keys: dict[Instance, Any] = {}
        self._next_mangle = 1 + max(
            (int(n) for record in archive.code for n in re.findall(r"___torch_mangle_(\d+)", record)), default=0
        )

    def records(self) -> Records:
        """Everything that differs from the archive."""
        copies: dict[int, Any] = {}
        root = copy.deepcopy(self._archive.root, copies)
        added: dict[str, bytes | Callable[[], Tensor]] = dict(self._put_tensors(copies))
        kept = self._reachable(root)
        originals = {id(copies[id(module)]): module for module in self._modules.paths if id(module) in copies}
        code = self._code([originals[key] for key in kept if key in originals], copies)
        changed: dict[str, bytes | None] = {"data.pkl": dump(root)}
        for record in self._archive.code.keys() | code.keys():
            if code.get(record) != self._archive.code.get(record):
                if record in self._archive.code:
                    changed[record] = code.get(record)
                    # It says which line of whose source each piece of the old text came from.
                    changed[f"{record}.debug_pkl"] = None
                else:
                    added[record] = code[record]
        gone = _storages(self._archive.root) - _storages(root)
        changed |= {f"data/{key}": None for key in gone}
        return Records(changed, added, code, root)

    def _put_tensors(self, copies: dict[int, Any]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        numbers = [int(key) for key in _storages(self._archive.root) if key.isdecimal()]
        key = 1 + max(numbers, default=-1)
        for fold, weight in self._folds.values():
            g, v = self._found.weights[fold.norm.g], self._found.weights[fold.norm.v]
            stored = _contiguous(v, str(key), trains=g.stored.requires_grad or v.stored.requires_grad)
            for module, leaf in fold.pairs:
                self._drop(module, leaf, copies)
            for module, leaf in fold.owners:
                _put(copies[id(module)], leaf, stored.pickled())
                self._edit(module).added[leaf] = v.role
                self._edit(module).dropped.discard(leaf)
            for place, text in fold.places:
                self._replace(place, text)
            yield f"data/{key}", weight
            key += 1

    def _edit(self, module: Instance) -> ModuleEdit:
        return self._edits.setdefault(module, ModuleEdit())

    def _replace(self, place: Place, text: str) -> None:
        unit = self._modules.unit(place.module)
        if unit is not None:
            own = unit.methods[place.method].args.args[0].arg
            self._edit(place.module).replaced[place.method, place.span] = text.replace("{self}", own)

    def _drop(self, module: Instance, leaf: str, copies: dict[int, Any]) -> None:
        path = self._modules.paths[module]
        head, _, name = path.rpartition(".")
        parent, _, middle = head.rpartition(".")
        if leaf in ("original0", "original1") and middle == "parametrizations":
            self._drop_parametrization(parent, name, copies)
            return
        self._edit(module).dropped.add(leaf)
        copies[id(module)].attributes.pop(leaf, None)

    def _drop_parametrization(self, path: str, name: str, copies: dict[int, Any]) -> None:
        """Take the list of parametrizations of one weight away, and the dict of them when it is empty."""
        owner, lists = self._modules.at(path), self._modules.at(f"{path}.parametrizations".lstrip("."))
        if owner is None or lists is None:
            return
        self._edit(owner).dropped_methods |= {f"__{name}_getter", f"__{name}_setter"}
        self._edit(lists).dropped.add(name)
        copies[id(lists)].attributes.pop(name, None)
        if not any(isinstance(value, Instance) for value in copies[id(lists)].attributes.values()):
            self._edit(owner).dropped.add("parametrizations")
            copies[id(owner)].attributes.pop("parametrizations", None)

    def _reachable(self, root: Any) -> dict[int, None]:
        found: dict[int, None] = {}
        stack = [root]
        while stack:
            module = stack.pop()
            if isinstance(module, Instance) and id(module) not in found:
                found[id(module)] = None
                stack += module.attributes.values()
        return found

    # Code

    def _code(self, kept: list[Instance], copies: dict[int, Any]) -> dict[str, bytes]:
        """Write every class that changed; objects of one class that no longer agree get classes of their own."""
        code, names = dict(self._archive.code), self._variants(kept)
        texts: dict[Unit, bytes] = {}
        gone = frozenset(leaf for edit in self._edits.values() for leaf in edit.dropped - edit.added.keys())
        for (qualified, _), (new_name, module) in names.items():
            unit = self._modules.code.find(qualified)
            if unit is None:
                continue
            text = ClassText(unit, self._archive.code[unit.record]).edited(
                self._edits.get(module, ModuleEdit()),
                self._renamed_children(module, names),
                new_name if new_name != qualified else None,
                gone,
            )
            if new_name == qualified:
                texts[unit] = text
            else:
                code[record_of(new_name.rpartition(".")[0])] = text
        for module in kept:
            new_name = names[module.cls.qualified, self._key(module)][0]
            if new_name != module.cls.qualified:
                prefix, _, leaf = new_name.rpartition(".")
                copies[id(module)].cls = Global(prefix, leaf)
        unused = self._unused(kept)
        for record in {unit.record for unit in (*texts, *unused)}:
            replaced = {unit: text for unit, text in texts.items() if unit.record == record}
            replaced |= {unit: b"" for unit in unused if unit.record == record}
            code[record] = _with_classes(code[record], replaced)
        return {record: text for record, text in code.items() if text.strip()}

    def _variants(self, kept: list[Instance]) -> dict[tuple[str, Any], tuple[str, Instance]]:
        """The new name of each class in each form that its objects need, and an object of that form."""
        names: dict[tuple[str, Any], tuple[str, Instance]] = {}
        taken: set[str] = set()
        for module in kept:
            qualified, key = module.cls.qualified, self._key(module)
            if (qualified, key) in names:
                continue
            name = qualified
            if qualified in taken:
                prefix = re.sub(r"\.___torch_mangle_\d+$", "", qualified.rpartition(".")[0])
                name = f"{prefix}.___torch_mangle_{self._next_mangle}.{module.cls.name}"
                self._next_mangle += 1
            taken.add(qualified)
            names[qualified, key] = name, module
        return names

    def _key(self, module: Instance) -> Any:
        """Equal for objects of one class that can keep sharing it."""
        if module not in self._keys:
            edit = self._edits.get(module)
            keys = ((name, self._key(child)) for name, child in self._modules.children(module))
            below = tuple((name, key) for name, key in keys if key is not None)
            self._keys[module] = (edit.key() if edit else None, below) if edit or below else None
        return self._keys[module]

    def _renamed_children(
        self, module: Instance, names: Mapping[tuple[str, Any], tuple[str, Instance]]
    ) -> dict[str, str]:
        renamed = {}
        for name, child in self._modules.children(module):
            new, _ = names.get((child.cls.qualified, self._key(child)), (child.cls.qualified, child))
            if new != child.cls.qualified:
                renamed[name] = new
        return renamed

    def _unused(self, kept: list[Instance]) -> list[Unit]:
        """Classes that no object has any more."""
        used = {module.cls.qualified for module in kept}
        gone = {module.cls.qualified for module in self._modules.paths} - used
        return [unit for unit in map(self._modules.code.find, sorted(gone)) if unit is not None]


def _put(module: Instance, leaf: str, value: Call) -> None:
    module.state[leaf] = value


def _contiguous(v: Weight, key: str, *, trains: bool) -> StoredTensor:
    shape, size = v.stored.shape, 1
    strides: list[int] = []
    for n in reversed(shape):
        strides.insert(0, size)
        size *= max(n, 1)
    storage = dataclasses.replace(v.stored.storage, key=key, size=size)
    return StoredTensor(storage, 0, shape, tuple(strides), trains)


def _storages(value: Any) -> set[str]:
    found: set[str] = set()
    seen: set[int] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Storage):
            found.add(item.key)
        elif isinstance(item, Call):
            stack += item.args
        elif isinstance(item, Instance):
            stack += (item.state, item.args)
        elif isinstance(item, dict):
            stack += (*item.keys(), *item.values())
        elif isinstance(item, (list, tuple)):
            stack += item
    return found


def _with_classes(file: bytes, texts: Mapping[Unit, bytes]) -> bytes:
    lines = file.splitlines(keepends=True)
    for unit in sorted(texts, key=lambda unit: unit.node.lineno, reverse=True):
        lines[unit.node.lineno - 1 : unit.node.end_lineno] = [texts[unit]]
    return b"".join(lines)
