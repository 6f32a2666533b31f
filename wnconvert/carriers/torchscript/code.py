"""The code in a TorchScript archive: classes and functions, found by their qualified names. It is parsed, never run."""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

from wnconvert.errors import InputError


@dataclasses.dataclass(frozen=True, slots=True)
class Unit:
    """A class or a function.

    Attributes:
        qualified: `__torch__.torch.nn.modules.conv.Conv1d`.
        record: the file that defines it.
        node: as parsed. Positions in it are lines and UTF-8 bytes of that file.
    """

    qualified: str
    record: str
    node: ast.ClassDef | ast.FunctionDef

    @property
    def methods(self) -> dict[str, ast.FunctionDef]:
        """Of a class, by name."""
        return {item.name: item for item in self.node.body if isinstance(item, ast.FunctionDef)}

    @property
    def is_module(self) -> bool:
        """Whether its objects are modules."""
        bases = self.node.bases if isinstance(self.node, ast.ClassDef) else []
        return any(isinstance(base, ast.Name) and base.id == "Module" for base in bases)


class Code:
    """All code of one archive. Files are parsed when something in them is asked for."""

    def __init__(self, files: Mapping[str, bytes], name: str) -> None:
        self.files = files
        self._name = name
        self._units: dict[str, dict[str, Unit]] = {}

    def find(self, qualified: str) -> Unit | None:
        """The class or function of this name, or None if the archive does not define it."""
        prefix, _, leaf = qualified.rpartition(".")
        return self._in_file(record_of(prefix)).get(leaf)

    def _in_file(self, record: str) -> dict[str, Unit]:
        if record not in self._units:
            self._units[record] = {unit.node.name: unit for unit in self._parse(record)}
        return self._units[record]

    def _parse(self, record: str) -> Iterator[Unit]:
        if record not in self.files:
            return
        try:
            tree = ast.parse(self.files[record])
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise InputError(f"{self._name}: its code in {record} cannot be read: {error}") from error
        prefix = record.removeprefix("code/").removesuffix(".py").replace("/", ".")
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                yield Unit(f"{prefix}.{node.name}", record, node)


class Fields:
    """What a class says of the attributes of its objects.

    Attributes:
        declared: the statement that declares each attribute, in order.
        constants: values that belong to the class.
        parameters, buffers: names of the attributes that are parameters and buffers.
        assigned: attributes that a method assigns.
    """

    def __init__(self, node: ast.ClassDef) -> None:
        self.declared: dict[str, ast.stmt] = {}
        self.constants: dict[str, object] = {}
        self.parameters: list[str] = []
        self.buffers: list[str] = []
        for item in node.body:
            self._take(item)
        self.assigned = frozenset(
            target.attr
            for item in ast.walk(node)
            if isinstance(item, ast.Assign)
            for target in item.targets
            if isinstance(target, ast.Attribute)
        )

    def _take(self, item: ast.stmt) -> None:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            self.declared[item.target.id] = item
            if item.value is not None:
                self.constants[item.target.id] = literal(item.value)
        elif isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Subscript):
            # An attribute whose name is no identifier: __annotations__["0"] = T.
            key = item.targets[0].slice
            if isinstance(key, ast.Constant):
                self.declared[str(key.value)] = item
        elif isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name):
            names = literal(item.value)
            if item.targets[0].id == "__parameters__" and isinstance(names, list):
                self.parameters = names
            elif item.targets[0].id == "__buffers__" and isinstance(names, list):
                self.buffers = names


class _NoLiteral:
    """Stands for an expression that is no plain value."""


NO_LITERAL = _NoLiteral()


def literal(node: ast.expr) -> object:
    """The plain value that an expression spells, or `NO_LITERAL`."""
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return NO_LITERAL


def record_of(prefix: str) -> str:
    """The file that defines what is qualified by `prefix`."""
    return f"code/{prefix.replace('.', '/')}.py"


def class_name(qualified: str) -> str:
    """The name of a class without what torch adds to tell classes of one name apart."""
    return re.sub(r"\.___torch_mangle_\d+", "", qualified)


@functools.lru_cache(maxsize=1024)
def dotted(node: ast.expr) -> str | None:
    """`a.b.c` for such an expression, else None."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    return ".".join(reversed([*parts, node.id]))
