"""Follows the weights of an archive through its code, without running it.

Plain values are computed, values made of weights are recorded as recipes, and everything that the input of the network
flows into is opaque. Both branches of a condition that depends on the input are followed.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from wnconvert.carriers.torchscript import operators
from wnconvert.carriers.torchscript.archive import StoredTensor
from wnconvert.carriers.torchscript.code import NO_LITERAL, Unit, dotted, literal
from wnconvert.carriers.torchscript.frames import UNSET, Frame, Modules, Place, Span
from wnconvert.carriers.torchscript.language import BUILTINS, ERRORS
from wnconvert.carriers.torchscript.pickled import Call as PickledCall
from wnconvert.carriers.torchscript.pickled import Instance
from wnconvert.sites import Use
from wnconvert.walk import recipe
from wnconvert.walk.reader import Computed, Reader
from wnconvert.walk.recipe import OPAQUE, Call, Leaf

_DEEPEST = 100
_LONGEST_LOOP = 64


class Interpreter:
    """One pass over all methods of all modules.

    Attributes:
        norms: each weight norm that the code computes, by the name of its weight.
        missing: attributes that code reads and modules do not have.
        places: for each time a weight norm is computed, the name of its weight and the expressions that have it for
            their value, inner ones first.
    """

    def __init__(
        self,
        modules: Modules,
        leaves: Mapping[tuple[Any, ...], str],
        weights: Mapping[str, Tensor],
        numbers: Mapping[str, Tensor],
    ) -> None:
        """Take what the code works with.

        Args:
            modules: whose methods to follow.
            leaves: names of tensors by identity.
            weights: tensors without data by name.
            numbers: constants that are single numbers.
        """
        self.reader = Reader(weights)
        self.norms: dict[str, Computed] = {}
        self.missing: set[str] = set()
        self.places: list[tuple[str, list[Place]]] = []
        self._modules = modules
        self._names = leaves
        self._numbers = numbers
        self._shapes = operators.Shapes(weights)
        self._leaves = {name: Leaf(name) for name in weights}
        self._computed: dict[int, tuple[Leaf, list[Place]]] = {}
        self._values_at: dict[Place, set[str | None]] = {}
        self._visited: set[tuple[Instance, str]] = set()
        self._frames: list[Frame] = []
        self._untraced: dict[str, None] = {}  # weights that a value of which nothing is known may be
        self._written: tuple[str, str] | None = None  # where such a value is changed in place, and by what

    def run(self) -> None:
        """Follow every method: first what the whole network does, then what nobody has called by then."""
        for only_forward in (True, False):
            for module in self._modules.paths:
                unit = self._modules.unit(module)
                for name in unit.methods if unit else ():
                    if (name == "forward" or not only_forward) and (module, name) not in self._visited:
                        self._call_method(module, name, (), {})
        if self._written is not None:
            where, by = self._written
            problem = f"may be changed in place, by {by}"
            changed = self._untraced.keys() & self.norms.keys()
            self.reader.uses += [
                Use(name, "Unknown", where, None, None, problem=problem, written=True) for name in sorted(changed)
            ]

    def only_value_at(self, place: Place) -> str | None:
        """The weight that an expression always has for its value, or None if it has other values too."""
        values = self._values_at.get(place, set())
        return next(iter(values)) if len(values) == 1 else None

    # Calls

    def _call_method(self, module: Instance, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        unit = self._modules.unit(module)
        function = unit.methods.get(name) if unit else None
        if function is None:
            return OPAQUE
        self._visited.add((module, name))
        norm = self._unscriptable_norm(module, name)
        if norm is not None:
            return norm
        return self._run(function, module, (module, *args), kwargs)

    def _unscriptable_norm(self, module: Instance, name: str) -> Any:
        """The value that torch.jit.script left out: its getter of a parametrized weight only raises an error."""
        leaf = name.removeprefix("__").removesuffix("_getter")
        lists = module.attributes.get("parametrizations")
        held = lists.attributes.get(leaf) if isinstance(lists, Instance) else None
        if name != f"__{leaf}_getter" or not isinstance(held, Instance):
            return None
        norm = held.attributes.get("0")
        if not isinstance(norm, Instance) or norm.cls.name != "_WeightNorm" or "1" in held.attributes:
            return None
        g, v = (self.attribute(held, part) for part in ("original0", "original1"))
        return self._operator("_weight_norm", (v, g, norm.attributes.get("dim", 0)), {})

    def _run(
        self, function: ast.FunctionDef, module: Instance | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if len(self._frames) >= _DEEPEST:
            return OPAQUE
        names = [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]
        values: dict[str, Any] = dict.fromkeys(names, OPAQUE)
        values |= dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in values}
        if args[1 if module else 0 :] or kwargs:
            self._fill_defaults(function, values, given=len(args), named=kwargs)
        frame = Frame(module, function, values, _leaves((args, kwargs)))
        self._frames.append(frame)
        self._body(frame, function.body)
        self._frames.pop()
        return frame.result

    def _where(self) -> str:
        """The module whose method runs, for reports."""
        module = next((frame.module for frame in reversed(self._frames) if frame.module is not None), None)
        return (self._modules.paths.get(module) or module.cls.name) if module is not None else ""

    def _fill_defaults(
        self, function: ast.FunctionDef, values: dict[str, Any], *, given: int, named: Mapping[str, Any]
    ) -> None:
        positional = [argument.arg for argument in function.args.args]
        defaults = function.args.defaults
        for name, default in zip(positional[len(positional) - len(defaults) :], defaults, strict=True):
            if positional.index(name) >= given and name not in named:
                value = literal(default)
                values[name] = OPAQUE if value is NO_LITERAL else value

    # Statements

    def _body(self, frame: Frame, body: list[ast.stmt]) -> None:
        for statement in body:
            if isinstance(statement, ast.Assign):
                self._assign(frame, statement.targets[0], self._value(frame, statement.value))
            elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
                self._assign(frame, statement.target, self._value(frame, statement.value))
            elif isinstance(statement, ast.Return):
                frame.result = None if statement.value is None else self._value(frame, statement.value)
            elif isinstance(statement, ast.Expr):
                self._value(frame, statement.value)
            elif isinstance(statement, ast.If):
                self._if(frame, statement)
            elif isinstance(statement, ast.For):
                self._for(frame, statement)
            elif isinstance(statement, ast.While):
                self._branches(frame, [statement.body, []])
            elif isinstance(statement, ast.With):
                self._body(frame, statement.body)

    def _assign(self, frame: Frame, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            frame.values[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            fits = not isinstance(value, (tuple, list)) or len(value) == len(target.elts)
            for i, part in enumerate(target.elts):
                self._assign(frame, part, self._item(value, i) if fits else self._lost(value))
        else:
            self._lost(value)

    def _if(self, frame: Frame, statement: ast.If) -> None:
        condition = self._value(frame, statement.test)
        if isinstance(condition, bool):
            self._body(frame, statement.body if condition else statement.orelse)
        else:
            self._branches(frame, [statement.body, statement.orelse])

    def _for(self, frame: Frame, statement: ast.For) -> None:
        items = self._value(frame, statement.iter)
        if isinstance(items, (list, tuple, range)) and len(items) <= _LONGEST_LOOP:
            for item in items:
                self._assign(frame, statement.target, item)
                self._body(frame, statement.body)
        else:
            self._assign(frame, statement.target, OPAQUE)
            self._branches(frame, [statement.body, []])

    def _branches(self, frame: Frame, bodies: list[list[ast.stmt]]) -> None:
        before, after = frame.values, []
        for body in bodies:
            frame.values = {name: list(v) if isinstance(v, list) else v for name, v in before.items()}
            self._body(frame, body)
            after.append(frame.values)
        left, right = after
        frame.values = {
            name: self._merged(left.get(name, UNSET), right.get(name, UNSET)) for name in dict.fromkeys((*left, *right))
        }

    def _merged(self, a: Any, b: Any) -> Any:
        """What a variable may be after two branches."""
        if a is UNSET or b is UNSET:
            return b if a is UNSET else a
        plain = (bool, int, float, str, type(None))
        if a is b or (isinstance(a, plain) and type(a) is type(b) and a == b):
            return a
        if isinstance(a, Leaf) and isinstance(b, Leaf) and a.name == b.name:
            return a  # a weight norm that both branches compute
        for leaf in _leaves((a, b)):
            self.reader.others.setdefault(leaf, {})["a condition"] = None
        return self._lost((a, b))

    def _lost(self, values: Any) -> Any:
        """What weights are in goes on as a value of which nothing is known."""
        self._untraced |= dict.fromkeys(_leaves(values))
        return OPAQUE

    # Expressions

    def _value(self, frame: Frame, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return frame.values.get(node.id, OPAQUE)
        if isinstance(node, ast.Attribute):
            return self._named(frame, node)
        if isinstance(node, ast.Tuple):
            return tuple(self._value(frame, item) for item in node.elts)
        if isinstance(node, ast.List):
            return [self._value(frame, item) for item in node.elts]
        if isinstance(node, ast.Dict):
            return self._lost([self._value(frame, item) for item in (*node.keys, *node.values) if item])
        if isinstance(node, ast.UnaryOp):
            value = literal(node)
            return OPAQUE if value is NO_LITERAL else value
        if isinstance(node, ast.Subscript):
            return self._item(self._value(frame, node.value), self._value(frame, node.slice))
        if isinstance(node, ast.Call):
            value = self._call(frame, node)
            self._note(frame, node, value)
            return value
        return OPAQUE

    def _item(self, value: Any, index: Any) -> Any:
        if isinstance(index, int) and isinstance(value, (list, tuple)) and -len(value) <= index < len(value):
            return value[index]
        if isinstance(index, int) and isinstance(value, Call):  # what an operator with several results gives
            return recipe.call("getitem", operator.getitem, (value, index), {})
        return self._lost(value)

    def _note(self, frame: Frame, node: ast.Call, value: Any) -> None:
        if frame.module is None:
            return
        place = Place(frame.module, frame.function.name, Span.of(node))
        leaf, places = self._computed.get(id(value), (None, []))
        self._values_at.setdefault(place, set()).add(leaf.name if leaf else None)
        # Where the pair came in as arguments, it would still be passed.
        if leaf is not None and frame.given.isdisjoint((self.norms[leaf.name].g, self.norms[leaf.name].v)):
            places.append(place)

    def _named(self, frame: Frame, node: ast.Attribute) -> Any:
        name = dotted(node) or ""
        if name.startswith("__torch__."):
            return self._modules.code.find(name) or OPAQUE
        if name.startswith("CONSTANTS."):
            return self._numbers.get(name, self._leaves.get(name, OPAQUE))
        owner = self._value(frame, node.value)
        return self.attribute(owner, node.attr) if isinstance(owner, Instance) else OPAQUE

    def attribute(self, module: Instance, name: str) -> Any:
        """The value of an attribute, or `OPAQUE` if it may change."""
        fields = self._modules.fields_of(module)
        if fields is None or name in fields.assigned or name == "training":
            return OPAQUE
        if name in fields.constants:
            value = fields.constants[name]
            return OPAQUE if value is NO_LITERAL else value
        if name not in module.attributes and isinstance(module.state, dict):
            self.missing.add(f"{self._modules.paths.get(module, '')}.{name}".lstrip("."))
        return self._held(module.attributes.get(name, OPAQUE))

    def _held(self, value: Any) -> Any:
        """A value of the pickle, with its tensors as leaves."""
        stored = StoredTensor.of(value)
        if stored is not None:
            name = self._names.get(stored.identity)
            return OPAQUE if name is None else self._leaves[name]
        if isinstance(value, PickledCall):
            # Lists of one type: build_intlist, build_tensorlist.
            is_list = value.function.module == "torch.jit._pickle" and value.function.name.endswith("list")
            is_tagged = value.function.name == "restore_type_tag"
            return self._held(value.args[0]) if is_list or is_tagged else OPAQUE
        if isinstance(value, (list, tuple)):
            return type(value)(self._held(item) for item in value)
        return value if isinstance(value, (bool, int, float, str, Instance, type(None))) else OPAQUE

    def _call(self, frame: Frame, node: ast.Call) -> Any:
        args = tuple(self._value(frame, argument) for argument in node.args)
        kwargs = {item.arg: self._value(frame, item.value) for item in node.keywords if item.arg}
        name = dotted(node.func) or ""
        space, _, leaf = name.rpartition(".")
        if space in ("torch", "ops.aten"):
            return self._operator(leaf, args, kwargs)
        if space == "ops.prim":
            return self._shapes.metadata(leaf, args) if leaf in operators.METADATA else self._primitive(leaf, args)
        if space.startswith("ops."):
            return self._unknown(leaf, args, kwargs)
        if name in BUILTINS and name not in frame.values:
            return BUILTINS[name](self, args)
        if isinstance(node.func, ast.Attribute):
            owner = self._value(frame, node.func.value)
            if isinstance(owner, Instance):
                return self._call_method(owner, node.func.attr, args, kwargs)
        unit = self._value(frame, node.func)
        if isinstance(unit, Unit) and isinstance(unit.node, ast.FunctionDef):
            return self._run(unit.node, None, args, kwargs)
        return self._unknown(name or "call", args, kwargs)

    def _primitive(self, name: str, args: tuple[Any, ...]) -> Any:
        if name == "type" and args and not isinstance(args[0], (Leaf, Call)) and args[0] is not OPAQUE:
            return str(getattr(args[0], "type", ""))
        return args[0] if name == "data" and args else self._lost(args)

    def _operator(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if name in operators.PLAIN and args and isinstance(args[0], list):
            return self._plain(name, args, kwargs)
        made_of = [part for part in recipe.parts((args, kwargs)) if isinstance(part, (Leaf, Call))]
        if name in operators.METADATA and made_of:
            return self._shapes.metadata(name, args)
        if not made_of:
            if operators.in_place(name):
                self._written = self._where(), name
            return self._plain(name, args, kwargs)
        if name in operators.CHANGING_LISTS and isinstance(args[0], list):
            # Which item is what from here on depends on more than is known.
            self._lost(args)
            args[0][:] = [OPAQUE] * len(args[0])
            return OPAQUE
        if name in ("__is__", "__isnot__"):
            return name == "__isnot__" if None in args else OPAQUE
        function = operators.aten(name)
        if function is None:
            return self._unknown(name, args, kwargs)
        if name == "embedding" and len(args) > 1:
            args = (args[1], args[0], *args[2:])  # as torch.nn.functional has them
        known = "convolution" if name == "_convolution" else name
        result, norm = self.reader.call(known, function, args, kwargs, where=self._where())
        if norm is not None:
            self._shapes.alias(norm.name, norm.v)
            self.norms.setdefault(norm.name, norm)
            places: list[Place] = []
            self._computed[id(result)] = result, places
            self.places.append((norm.name, places))
        return result

    def _plain(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if name not in operators.PLAIN or kwargs or any(argument is OPAQUE for argument in args[:2]):
            return OPAQUE
        try:
            return operators.PLAIN[name](*args)
        except ERRORS:
            return OPAQUE

    def _unknown(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A call that cannot be followed. What weights go in is noted."""
        return self.reader.call(name, _opaque, (*args, OPAQUE), kwargs, where=self._where())[0]


def _opaque(*_: Any, **__: Any) -> Any:
    return OPAQUE


def _leaves(values: Any) -> frozenset[str]:
    """Names of the weights that values are made of."""
    made_of = (part for part in recipe.parts(values) if isinstance(part, (Leaf, Call)))
    return frozenset(name for part in made_of for name in recipe.leaves_of(part))
