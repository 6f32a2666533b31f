"""Uses of weights in an exported program: its graph, and the graphs of its higher-order operators."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx
from torch._ops import HigherOrderOperator
from torch.export.graph_signature import ExportGraphSignature, InputKind
from torch.utils import _pytree as pytree

from wnconvert.sites import Use
from wnconvert.walk import graph_uses
from wnconvert.walk.graph_uses import Formula

_TRANSPARENT = ("cond", "wrap_with_set_grad_enabled", "wrap_with_autocast")
"""Higher-order operators that hand their operands to their graphs as they are. Loops hand over slices and states."""


@dataclasses.dataclass(frozen=True, slots=True)
class ProgramUses:
    """What a program does with its weights.

    Attributes:
        uses: see `GraphUses`.
        formulas: in the program's own graph.
        inner: weight norms that the graph of a higher-order operator computes.
        others: see `GraphUses`.
        written: names of weights that the program changes in place.
    """

    uses: tuple[Use, ...]
    formulas: tuple[Formula, ...]
    inner: tuple[Formula, ...]
    others: Mapping[str, tuple[str, ...]]
    written: frozenset[str]


def inputs_of(graph: fx.Graph) -> list[fx.Node]:
    """The placeholders, in the order of the signature."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def leaves_of(graph: fx.Graph, signature: ExportGraphSignature) -> dict[fx.Node, str]:
    """The placeholders of parameters and buffers, with their names."""
    specs = zip(inputs_of(graph), signature.input_specs, strict=True)
    return {node: str(spec.target) for node, spec in specs if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)}


def read(module: fx.GraphModule, leaves: Mapping[fx.Node, str], weights: Mapping[str, Tensor]) -> ProgramUses:
    """Find out what a program does with its weights.

    Args:
        module: its graph, with the graphs of its higher-order operators.
        leaves: the nodes that are parameters or buffers, with their names.
        weights: every one of them by name.
    """
    found = graph_uses.read(module.graph, leaves, weights)
    uses, inner = list(found.uses), []
    others = {name: dict.fromkeys(functions) for name, functions in found.others.items()}
    known = {**leaves, **{formula.node: formula.name for formula in found.formulas}}
    weights = {**weights, **{formula.name: weights[formula.v] for formula in found.formulas}}
    written = {name for node, name in known.items() if is_written(node)}
    for node, graph, handed in _inner_graphs(module, known):
        below = read(graph, handed, weights)
        uses += [dataclasses.replace(use, where=f"{node.name}.{use.where}") for use in below.uses]
        inner += [*below.formulas, *below.inner]
        written |= below.written
        for name, functions in below.others.items():
            others.setdefault(name, {}).update(dict.fromkeys(functions))
    taken = {name: tuple(functions) for name, functions in others.items()}
    return ProgramUses(tuple(uses), found.formulas, tuple(inner), taken, frozenset(written))


def _inner_graphs(
    module: fx.GraphModule, known: Mapping[fx.Node, str]
) -> Iterator[tuple[fx.Node, fx.GraphModule, dict[fx.Node, str]]]:
    """Every graph that an operator runs, with the placeholders of it that are weights."""
    for node in module.graph.nodes:
        if not isinstance(node.target, HigherOrderOperator) or node.target.__name__ not in _TRANSPARENT:
            continue
        graphs = {i: graph for i, graph in enumerate(map(_graph_of(module), node.args)) if graph is not None}
        operands = pytree.tree_leaves(node.args[max(graphs, default=-1) + 1 :])
        for graph in graphs.values():
            inputs = [inner for inner in graph.graph.nodes if inner.op == "placeholder"]
            if len(inputs) == len(operands):
                pairs = zip(inputs, operands, strict=True)
                yield node, graph, {inner: known[outer] for inner, outer in pairs if outer in known}


def _graph_of(module: fx.GraphModule) -> Any:
    def graph_of(arg: Any) -> fx.GraphModule | None:
        if not isinstance(arg, fx.Node) or arg.op != "get_attr":
            return None
        held = getattr(module, str(arg.target), None)
        return held if isinstance(held, fx.GraphModule) else None

    return graph_of


def is_written(node: fx.Node) -> bool:
    """Whether an operator of the graph writes into a tensor, or into a view of it."""
    for user in node.users:
        schema = getattr(user.target, "_schema", None)
        if schema is None:
            continue
        named = zip(schema.arguments, user.args, strict=False)
        given = [argument for argument, value in named if value is node]
        given += [argument for argument in schema.arguments if user.kwargs.get(argument.name) is node]
        aliases = [argument.alias_info for argument in given if argument.alias_info is not None]
        if any(alias.is_write for alias in aliases) or (aliases and is_written(user)):
            return True
    return False
