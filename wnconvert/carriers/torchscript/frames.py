"""What the interpreter of TorchScript code works on: modules of an archive, frames, and places in the code."""

from __future__ import annotations

import ast
import dataclasses
import enum
from collections.abc import Iterator
from typing import Any

from wnconvert.carriers.torchscript.archive import StoredTensor
from wnconvert.carriers.torchscript.code import Code, Fields, Unit
from wnconvert.carriers.torchscript.pickled import Instance


class _Unset(enum.Enum):
    UNSET = "what a branch that raises leaves behind"


UNSET = _Unset.UNSET


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """An expression: lines and UTF-8 bytes of its file, as `ast` counts them."""

    line: int
    column: int
    end_line: int
    end_column: int

    @classmethod
    def of(cls, node: ast.expr | ast.stmt) -> Span:
        """Where a node is."""
        return cls(node.lineno, node.col_offset, node.end_lineno or node.lineno, node.end_col_offset or 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """An expression in a method, as one object runs it."""

    module: Instance
    method: str
    span: Span


@dataclasses.dataclass(slots=True)
class Frame:
    """A call of a method or function.

    Attributes:
        module: whose method it is; None for a function.
        function: as parsed.
        values: of variables.
        given: names of the weights that its arguments are made of.
        result: what it returns.
    """

    module: Instance | None
    function: ast.FunctionDef
    values: dict[str, Any]
    given: frozenset[str] = frozenset()
    result: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Modules:
    """The modules of an archive.

    Attributes:
        code: of the archive.
        paths: every module, with its first path.
        fields: of their classes, by qualified name.
    """

    code: Code
    paths: dict[Instance, str]
    fields: dict[str, Fields]

    @classmethod
    def of(cls, root: Any, code: Code) -> Modules:
        """Walk the tree of modules below the value of a pickle."""
        found = cls(code, {}, {})
        if isinstance(root, Instance):
            found._walk(root, "")
        return found

    def _walk(self, module: Instance, path: str) -> None:
        if module in self.paths or self.unit(module) is None:
            return
        self.paths[module] = path
        for name, child in self.children(module):
            self._walk(child, f"{path}.{name}" if path else name)

    def unit(self, module: Instance) -> Unit | None:
        """The class of a module; None for an object that is no module."""
        unit = self.code.find(module.cls.qualified)
        return unit if unit is not None and unit.is_module else None

    def fields_of(self, module: Instance) -> Fields | None:
        """What its class says of its attributes."""
        unit, name = self.unit(module), module.cls.qualified
        if name not in self.fields and unit is not None and isinstance(unit.node, ast.ClassDef):
            self.fields[name] = Fields(unit.node)
        return self.fields.get(name)

    def children(self, module: Instance) -> Iterator[tuple[str, Instance]]:
        """The modules directly inside one, by attribute."""
        for name, value in module.attributes.items():
            if isinstance(value, Instance) and self.unit(value) is not None:
                yield name, value

    def tensors(self, module: Instance) -> Iterator[tuple[str, StoredTensor, str]]:
        """The tensors of one module: name, tensor, and `parameter`, `buffer` or `attribute`."""
        fields = self.fields_of(module)
        if fields is None:
            return
        kinds = dict.fromkeys(fields.parameters, "parameter") | dict.fromkeys(fields.buffers, "buffer")
        # In the order in which torch lists a state dict.
        named = [*kinds, *(name for name in module.attributes if name not in kinds)]
        for name in named:
            stored = StoredTensor.of(module.attributes.get(name))
            if stored is not None:
                yield name, stored, kinds.get(name, "attribute")

    def way(self, start: Instance, goal: Instance) -> list[str] | None:
        """The attributes that lead from one module to another, or None if it is not inside it."""
        if start is goal:
            return []
        for name, child in self.children(start):
            below = self.way(child, goal)
            if below is not None:
                return [name, *below]
        return None

    def at(self, path: str) -> Instance | None:
        """The module at a path, also one that is not its first."""
        module: Any = next(iter(self.paths))
        for name in path.split(".") if path else ():
            module = module.attributes.get(name) if isinstance(module, Instance) else None
        return module if isinstance(module, Instance) else None


def join(path: str, name: str) -> str:
    """The name of an attribute of the module at a path."""
    return f"{path}.{name}" if path else name
