"""New text for a class of an archive: attributes taken away and added, expressions replaced, what that leaves unused
removed. Everything else stays as it was written.
"""

from __future__ import annotations

import ast
import dataclasses
import keyword
import re
from collections.abc import Iterator, Mapping

from wnconvert.carriers.torchscript import operators
from wnconvert.carriers.torchscript.code import Fields, Unit, dotted
from wnconvert.carriers.torchscript.frames import Span


@dataclasses.dataclass(slots=True)
class ModuleEdit:
    """What changes in the class of one object.

    Attributes:
        replaced: new text of expressions, by method.
        dropped: attributes that go.
        added: tensors that come, by name: `parameter`, `buffer` or `attribute`.
        dropped_methods: methods that go.
    """

    replaced: dict[tuple[str, Span], str] = dataclasses.field(default_factory=dict)
    dropped: set[str] = dataclasses.field(default_factory=set)
    added: dict[str, str] = dataclasses.field(default_factory=dict)
    dropped_methods: set[str] = dataclasses.field(default_factory=set)

    def key(self) -> tuple[object, ...]:
        """Equal for objects that can keep sharing a class."""
        return (
            frozenset(self.replaced.items()),
            frozenset(self.dropped),
            frozenset(self.added.items()),
            frozenset(self.dropped_methods),
        )


class ClassText:
    """The lines of one class, edited from its end to its start so that positions stay valid."""

    def __init__(self, unit: Unit, file: bytes) -> None:
        node = unit.node
        self._unit = unit
        self._first = node.lineno
        self._lines = file.splitlines(keepends=True)[node.lineno - 1 : node.end_lineno]
        if self._lines and not self._lines[-1].endswith(b"\n"):
            self._lines[-1] += b"\n"

    def edited(self, edit: ModuleEdit, renamed: Mapping[str, str], own_name: str | None, gone: frozenset[str]) -> bytes:
        """The text after an edit.

        Args:
            edit: what to change.
            renamed: new qualified names of classes, by attribute whose value is of such a class.
            own_name: new qualified name of this class.
            gone: names of all attributes that go, of this and other classes.
        """
        assert isinstance(self._unit.node, ast.ClassDef)  # noqa: S101
        fields = Fields(self._unit.node)
        changes = list(self._changes(fields, edit, renamed))
        for span, text in sorted(changes, key=lambda change: (change[0].line, change[0].column), reverse=True):
            self._replace(span, text)
        whole = b"".join(self._lines)
        if own_name is not None:
            whole = re.sub(re.escape(self._unit.qualified.encode()) + rb"(?![\w.])", own_name.encode(), whole)
        before = {name: _loaded(node) for name, node in self._unit.methods.items()}
        return _without_unused(whole, before, gone)

    def _changes(self, fields: Fields, edit: ModuleEdit, renamed: Mapping[str, str]) -> Iterator[tuple[Span, str]]:
        for (_, span), text in edit.replaced.items():
            yield span, text
        for name, method in self._unit.methods.items():
            if name in edit.dropped_methods:
                yield _lines_of(method), ""
        added = "".join(f"  {_declaration(name)}\n" for name in edit.added if name not in fields.declared)
        for name, statement in fields.declared.items():
            if name in edit.dropped:
                yield _lines_of(statement), added
                added = ""
            elif name in edit.added:
                yield _lines_of(statement), f"  {_declaration(name)}\n"
            elif name in renamed:
                annotation = statement.annotation if isinstance(statement, ast.AnnAssign) else statement.value  # type: ignore[attr-defined]
                yield Span.of(annotation), renamed[name]
        yield from self._lists(fields, edit, added)

    def _lists(self, fields: Fields, edit: ModuleEdit, added: str) -> Iterator[tuple[Span, str]]:
        for item in self._unit.node.body:
            target = item.targets[0] if isinstance(item, ast.Assign) else None
            if not isinstance(target, ast.Name):
                continue
            if target.id == "__parameters__":
                yield _lines_of(item), _list_line("__parameters__", fields.parameters, edit, "parameter")
            elif target.id == "__buffers__":
                yield _lines_of(item), _list_line("__buffers__", fields.buffers, edit, "buffer") + added

    def _replace(self, span: Span, text: str) -> None:
        first, last = span.line - self._first, span.end_line - self._first
        if last >= len(self._lines):
            last, tail = len(self._lines) - 1, b""
        else:
            tail = self._lines[last][span.end_column :]
        head = self._lines[first][: span.column]
        joined = head + text.encode() + tail
        self._lines[first : last + 1] = [joined, *([b""] * (last - first))]


def reach(way: list[str], start: str) -> str:
    """An expression for what the attributes of `way` lead to."""
    text = start
    for name in way:
        plain = name.isidentifier() and name not in _KEYWORDS
        text = f"{text}.{name}" if plain else f"getattr({text}, {_quoted(name)})"
    return text


def _quoted(name: str) -> str:
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'


_KEYWORDS = frozenset({*keyword.kwlist, "print"})


def _declaration(name: str) -> str:
    if name.isidentifier() and name not in _KEYWORDS:
        return f"{name} : Tensor"
    return f"__annotations__[{_quoted(name)}] = Tensor"


def _list_line(what: str, names: list[str], edit: ModuleEdit, role: str) -> str:
    new = [name for name, its in edit.added.items() if its == role]
    kept = [name for name in names if name not in edit.dropped and name not in edit.added]
    at = next((i for i, name in enumerate(names) if name in edit.dropped or name in edit.added), 0)
    at = sum(name in kept for name in names[:at])
    listed = "".join(f"{_quoted(name)}, " for name in [*kept[:at], *new, *kept[at:]])
    return f"  {what} = [{listed}]\n"


def _lines_of(node: ast.stmt) -> Span:
    """The whole lines of a statement. One never shares a line with another."""
    return Span(node.lineno, 0, (node.end_lineno or node.lineno) + 1, 0)


def _loaded(node: ast.AST) -> set[str]:
    return {item.id for item in ast.walk(node) if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Load)}


def _without_unused(text: bytes, before: Mapping[str, set[str]], gone: frozenset[str]) -> bytes:
    """Remove from methods what an edit has left unused, and what was unused before but still asks for what is gone."""
    while True:
        methods = [item for item in ast.parse(text).body[0].body if isinstance(item, ast.FunctionDef)]  # type: ignore[attr-defined]
        dead: list[tuple[ast.stmt, bool]] = []
        for method in methods:
            dead += _dead(method.body, (before[method.name] | _asking(method, gone)) - _loaded(method))
        if not dead:
            return text
        lines = text.splitlines(keepends=True)
        for statement, alone in sorted(dead, key=lambda item: item[0].lineno, reverse=True):
            filler = [b" " * statement.col_offset + b"pass\n"] if alone else []
            lines[statement.lineno - 1 : statement.end_lineno] = filler
        text = b"".join(lines)


def _asking(method: ast.FunctionDef, gone: frozenset[str]) -> set[str]:
    """Variables whose values come from attributes that are gone."""
    found: set[str] = set()
    for statement in ast.walk(method):
        if not isinstance(statement, ast.Assign):
            continue
        parts = list(ast.walk(statement.value))
        asks = any(isinstance(part, ast.Attribute) and part.attr in gone for part in parts)
        if asks or any(isinstance(part, ast.Name) and part.id in found for part in parts):
            found |= {part.id for part in ast.walk(statement.targets[0]) if isinstance(part, ast.Name)}
    return found


def _dead(body: list[ast.stmt], unused: set[str]) -> list[tuple[ast.stmt, bool]]:
    """Statements whose results nobody uses any more, and whether the block would be empty without them."""
    found = [statement for statement in body if _only_assigns(statement, unused)]
    dead = [(statement, len(found) == len(body) and statement is found[0]) for statement in found]
    for statement in body:
        if statement not in found:
            for block in ("body", "orelse"):
                dead += _dead(getattr(statement, block, []), unused)
    return dead


def _only_assigns(statement: ast.stmt, unused: set[str]) -> bool:
    if isinstance(statement, ast.If):
        inside = [*statement.body, *statement.orelse]
        does_something = [item for item in inside if not isinstance(item, ast.Pass)]
        return bool(does_something) and all(_only_assigns(item, unused) for item in does_something)
    targets: list[ast.expr]
    if isinstance(statement, ast.AnnAssign):
        targets, value = [statement.target], statement.value
    elif isinstance(statement, ast.Assign):
        first = statement.targets[0]
        targets, value = list(first.elts) if isinstance(first, ast.Tuple) else [first], statement.value
    else:
        return False
    return value is not None and all(isinstance(t, ast.Name) and t.id in unused for t in targets) and _is_pure(value)


def _is_pure(value: ast.expr) -> bool:
    for item in ast.walk(value):
        name = dotted(item.func) if isinstance(item, ast.Call) else None
        if name is not None and name.startswith(("torch.", "ops.")):
            leaf = name.rpartition(".")[2]
            if not operators.may_run(leaf) or leaf in ("append", "RaiseException"):
                return False
    return True
