"""Uses that only a trace shows: a parameter that a forward pass hands to a function, without a layer around it."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from wnconvert.kinds import FUNCTIONS, FunctionKind, Operand
from wnconvert.sites import Axis, Use
from wnconvert.walk.modules import kind_of, output_axis


@dataclasses.dataclass(frozen=True, slots=True)
class Trace:
    """What a trace shows.

    Attributes:
        uses: functional uses of parameters.
        called: names of the modules that the forward pass calls.
    """

    uses: tuple[Use, ...]
    called: frozenset[str]


class TraceFailed(Exception):
    """torch.fx cannot trace this network; the message is its reason in one line."""


def trace(root: nn.Module) -> Trace:
    """Trace a network with torch.fx.

    Raises:
        TraceFailed: its forward pass depends on values, or fails.
    """
    try:
        # Tracing runs the forward pass: what it changes on the way (counters, buffers, caches) must not stay.
        twin = _copy(root)
        with torch.random.fork_rng(devices=[]):
            graph = _Tracer().trace(twin)
    except Exception as error:
        # The forward pass is somebody's code run on stand-ins, and so may be copying: they may raise anything at all.
        lines = str(error).strip().splitlines()
        raise TraceFailed(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__) from error
    called = frozenset(str(node.target) for node in graph.nodes if node.op == "call_module")
    return Trace(tuple(_functional_uses(root, graph)), called)


def _copy(root: nn.Module) -> nn.Module:
    """Copy everything but the parameters, which a forward pass does not write to."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in root.parameters()}
    for module in root.modules():
        # Buffers are small. torch's legacy weight norm keeps a computed weight, which deepcopy refuses.
        held = (*module._buffers.values(), *vars(module).values())
        memo |= {id(value): value.detach().clone() for value in held if isinstance(value, Tensor)}
    twin: nn.Module = copy.deepcopy(root, memo)
    return twin


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return kind_of(m) is not None or super().is_leaf_module(m, module_qualified_name)


def _functional_uses(root: nn.Module, graph: fx.Graph) -> Iterator[Use]:
    parameters = dict(root.named_parameters(remove_duplicate=False))
    for node in graph.nodes:
        kind = _TABLE.get(node.target if node.op == "call_function" else f"method:{node.target}")
        if kind is None or node.op not in ("call_function", "call_method"):
            continue
        found = [(operand, _root(_argument(node, operand), parameters)) for operand in kind.operands]
        weights = [(operand, origin) for operand, origin in found if origin is not None]
        # A product of two parameters has no input to speak of, so neither is a layer's weight.
        if len(weights) == 1:
            yield _use(node, kind, *weights[0])


def _use(node: fx.Node, kind: FunctionKind, operand: Operand, origin: _Origin) -> Use:
    rank = len(origin.axes)
    if rank < 2:
        return Use(origin.name, kind.kind, node.name, None, None, problem="a vector has no output units to keep")
    axis, out_axis = operand.axis % rank, operand.out_axis % rank
    out, groups = output_axis(axis, out_axis, _groups(node) if axis != out_axis else 1)
    if groups > 1 and origin.axes != tuple(range(rank)):
        problem: str | None = "a grouped transposed convolution reads it through a transpose"
        return Use(origin.name, kind.kind, node.name, None, None, problem=problem)
    batch = range(rank - 2) if kind.kind == "matmul" else ()
    keep = origin.map(axis, batch)
    return Use(origin.name, kind.kind, node.name, keep, out if groups > 1 else origin.map(out_axis, batch), groups)


@dataclasses.dataclass(frozen=True, slots=True)
class _Origin:
    """The parameter behind an operand. `axes[i]` is the axis of the parameter that is axis i of the operand."""

    name: str
    axes: tuple[int, ...]

    def map(self, axis: int, batch: range | tuple[()]) -> Axis:
        """An axis of the operand, and its batch axes, as axes of the parameter."""
        kept = sorted(self.axes[i] for i in (*batch, axis))
        return kept[0] if len(kept) == 1 else tuple(kept)


def _root(value: Any, parameters: dict[str, nn.Parameter]) -> _Origin | None:
    """Walk back from an operand to the parameter it is a transposed or cast view of."""
    steps: list[fx.Node] = []
    while isinstance(value, fx.Node) and value.op != "get_attr":
        if _step(value, ()) is None:
            return None
        steps.append(value)
        value = value.args[0]
    if not isinstance(value, fx.Node) or str(value.target) not in parameters:
        return None
    name = str(value.target)
    axes: tuple[int, ...] | None = tuple(range(parameters[name].dim()))
    for node in reversed(steps):
        axes = None if axes is None else _step(node, axes)
    return None if axes is None else _Origin(name, axes)


def _step(node: fx.Node, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes after one node that only permutes or casts; None for any other node. `()` asks whether it is one."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    arguments = node.args[1:]
    if node.target is getattr and arguments[0] in ("T", "mT"):
        name, arguments = "t" if arguments[0] == "T" else "mT", ()
    if name in _CASTS:
        return axes
    if name not in _PERMUTATIONS or node.kwargs:
        return None
    if not axes:
        return ()
    return _PERMUTATIONS[str(name)](axes, arguments)


def _permute(axes: tuple[int, ...], arguments: tuple[Any, ...]) -> tuple[int, ...] | None:
    order = arguments[0] if arguments and isinstance(arguments[0], (tuple, list)) else arguments
    if sorted(i % len(axes) if isinstance(i, int) else -1 for i in order) != list(range(len(axes))):
        return None
    return tuple(axes[i] for i in order)


def _transpose(axes: tuple[int, ...], arguments: tuple[Any, ...]) -> tuple[int, ...] | None:
    if len(arguments) != 2 or not all(isinstance(i, int) for i in arguments):
        return None
    order = list(axes)
    a, b = arguments
    order[a], order[b] = order[b], order[a]
    return tuple(order)


_CASTS = {
    "to",
    "float",
    "half",
    "double",
    "bfloat16",
    "type_as",
    "type",
    "contiguous",
    "clone",
    "detach",
    "cpu",
    "cuda",
}
_PERMUTATIONS: dict[str, Callable[[tuple[int, ...], tuple[Any, ...]], tuple[int, ...] | None]] = {
    "t": lambda axes, _: axes[::-1],
    "mT": lambda axes, _: (*axes[:-2], axes[-1], axes[-2]),
    "transpose": _transpose,
    "swapaxes": _transpose,
    "permute": _permute,
}


def _argument(node: fx.Node, operand: Operand) -> Any:
    if operand.keyword in node.kwargs:
        return node.kwargs[operand.keyword]
    return node.args[operand.position] if operand.position < len(node.args) else None


def _groups(node: fx.Node) -> int:
    """The `groups` argument of a functional transposed convolution."""
    value = node.kwargs.get("groups", node.args[6] if len(node.args) > 6 else 1)
    return value if isinstance(value, int) else 1


def _table() -> dict[Any, FunctionKind]:
    table: dict[Any, FunctionKind] = {}
    for kind in FUNCTIONS:
        package, _, name = kind.path.rpartition(".")
        table[getattr(importlib.import_module(package), name) if package else kind.path] = kind
    return table


_TABLE = _table()
