"""Uses of weights in an fx graph, of torch functions or of ATen operators."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from wnconvert.sites import Use
from wnconvert.walk.reader import Computed, Reader
from wnconvert.walk.recipe import OPAQUE, Leaf, Method, rebuild


@dataclasses.dataclass(frozen=True, slots=True)
class Formula(Computed):
    """A node at which a graph has computed a weight norm.

    Attributes:
        node: its value is the weight.
    """

    node: fx.Node


@dataclasses.dataclass(frozen=True, slots=True)
class GraphUses:
    """What a graph does with its weights.

    Attributes:
        uses: by layers and layer-like functions. A weight that a formula computes goes by the formula's name.
        formulas: weight norms that the graph computes.
        others: for every weight the names of other functions that take it.
    """

    uses: tuple[Use, ...]
    formulas: tuple[Formula, ...]
    others: Mapping[str, tuple[str, ...]]


def read(graph: fx.Graph, leaves: Mapping[fx.Node, str], weights: Mapping[str, Tensor]) -> GraphUses:
    """Find out what a graph does with its weights.

    Args:
        graph: of a `GraphModule` or an exported program.
        leaves: the nodes that are parameters or buffers, with their names.
        weights: every one of them by name.
    """
    reader = Reader(weights)
    known: dict[fx.Node, Any] = {node: Leaf(name) for node, name in leaves.items()}
    formulas = []
    for node in graph.nodes:
        if node in known or node.op in ("placeholder", "get_attr", "output", "call_module"):
            continue
        size = node.meta.get("val")
        if isinstance(size, torch.SymInt):
            # A dynamic size stands for any number; the one that the example had will do.
            known[node] = size.node.hint
            continue

        def value_of(part: Any) -> Any:
            return known.get(part, OPAQUE) if isinstance(part, fx.Node) else part

        args, kwargs = rebuild(tuple(node.args), value_of), rebuild(dict(node.kwargs), value_of)
        function = Method(str(node.target)) if node.op == "call_method" else node.target
        known[node], pair = reader.call(function_name(function, args), function, args, kwargs, where=node.name)
        if pair is not None:
            formulas.append(Formula(pair.name, pair.g, pair.v, node))
    others = {name: tuple(functions) for name, functions in reader.others.items()}
    return GraphUses(tuple(reader.uses), tuple(formulas), others)


def between(inputs: Iterable[fx.Node], ends: Iterable[fx.Node]) -> list[fx.Node]:
    """Every node that a value flows to from the inputs, not past the ends and without them."""
    ends, ahead, found = set(ends), list(inputs), dict[fx.Node, None]()
    while ahead:
        for user in ahead.pop().users:
            if user not in found and user not in ends:
                found[user] = None
                ahead.append(user)
    return list(found)


def function_name(function: Any, args: tuple[Any, ...]) -> str:
    """One name for a torch function, the tensor method and the ATen operator that do the same."""
    if isinstance(function, Method):
        return function.name
    if function is getattr:
        return str(args[1])
    schema = getattr(function, "_schema", None)
    name = schema.name.partition("::")[2] if schema is not None else getattr(function, "__name__", "")
    if name == "__get__":  # a property such as `.T`, seen from a TorchFunctionMode
        name = function.__self__.__name__
    return name[2:-2] if name.startswith("__") and name.endswith("__") else str(name)
