"""Edits of one fx graph: a weight read by name becomes a weight norm computed on the spot, and the other way round."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from wnconvert import layers


def reads(graph: fx.Graph, target: str) -> list[fx.Node]:
    """The nodes that read a parameter or a buffer of this name, in their order."""
    return [node for node in graph.find_nodes(op="get_attr") if node.target == target]


def calls(module: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, dict[fx.Node, fx.Node]]]:
    """The graphs that a graph calls, with what it hands to their placeholders."""
    for node in module.graph.nodes:
        if node.op == "call_module":
            branches, operands = [node.target], node.args
        elif node.target is torch.ops.higher_order.cond:
            branches, operands = [branch.target for branch in node.args[1:3]], node.args[3]
        else:
            continue
        for target in branches:
            called = module.get_submodule(str(target))
            if isinstance(called, fx.GraphModule):
                inputs = called.graph.find_nodes(op="placeholder")
                yield called, {a: b for a, b in zip(inputs, operands, strict=False) if isinstance(b, fx.Node)}


def split_reads(
    graph: fx.Graph, nodes: Sequence[fx.Node], targets: tuple[str, str], spec: layers.Spec, like: Tensor
) -> None:
    """Replace what reads a plain weight by its weight norm, in plain torch functions.

    Args:
        graph: the graph.
        nodes: every node that reads the weight, in their order. They are erased.
        targets: names of the magnitude and the direction.
        spec: how the weight is split.
        like: the direction itself.
    """
    first = nodes[0]
    with graph.inserting_before(first):
        g, v = (fx.Proxy(graph.get_attr(target)) for target in targets)
        # Proxies stand for tensors here: what the formula does to them becomes nodes.
        computed = cast("fx.Proxy", layers.compose(spec, cast("Tensor", g), cast("Tensor", v), like)).node
    computed.meta = dict(first.meta)
    for node in nodes:
        node.replace_all_uses_with(computed)
        graph.erase_node(node)


def fold_formulas(graph: fx.Graph, formulas: Sequence[fx.Node], targets: tuple[str, str], name: str) -> None:
    """Replace computed weight norms by a node that reads the plain weight, and erase what only they needed.

    Args:
        graph: the graph.
        formulas: every node at which a weight norm of this pair is computed.
        targets: names of the magnitude and the direction.
        name: of the plain weight.
    """
    halves = [node for target in targets for node in reads(graph, target)]
    order = {node: i for i, node in enumerate(graph.nodes)}
    with graph.inserting_before(min(halves, key=order.__getitem__)):
        plain = graph.get_attr(name)
    plain.meta = dict(formulas[0].meta)
    for node in formulas:
        node.replace_all_uses_with(plain)
    ending = {*_behind(halves, formulas), *formulas}
    constants = {node for dead in ending for node in dead.all_input_nodes if node.op == "get_attr"} - set(halves)
    for node in sorted(ending, key=order.__getitem__, reverse=True):
        graph.erase_node(node)
    for node in (*halves, *(node for node in constants if not node.users)):
        graph.erase_node(node)
    _name_after_target(graph, plain)


def past_cast(formula: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The cast to the dtype that the weight has anyway, where that is all that becomes of a computed weight."""
    users = [user for user in formula.users if not _asserts(user)]
    if len(users) != 1 or users[0].args != (formula, dtype) or users[0].kwargs:
        return formula
    return users[0] if users[0].target in ("to", torch.ops.aten.to.dtype) else formula


def other_reader(graph: fx.Graph, targets: Iterable[str], formulas: Sequence[fx.Node]) -> fx.Node | None:
    """A node that needs the magnitude or the direction for anything but these formulas, if there is one."""
    halves = [node for target in targets for node in reads(graph, target)]
    return next((node for node in _behind(halves, formulas) if _acts(node)), None)


def _behind(nodes: Iterable[fx.Node], ends: Sequence[fx.Node]) -> list[fx.Node]:
    """Every node that a value flows to from these nodes, not past the ends, and without the ends."""
    found: dict[fx.Node, None] = {}
    ahead: list[fx.Node] = list(nodes)
    while ahead:
        for user in ahead.pop().users:
            if user not in found and user not in ends:
                found[user] = None
                ahead.append(user)
    return list(found)


def _acts(node: fx.Node) -> bool:
    """Whether a node does something even where nobody uses its value."""
    in_place = node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__")
    return node.op == "call_module" or in_place or (node.is_impure() and not _asserts(node))


def _asserts(node: fx.Node) -> bool:
    """Whether a node only says what an exporter has seen of a value."""
    return node.target is torch.ops.aten._assert_tensor_metadata.default


def _name_after_target(graph: fx.Graph, node: fx.Node) -> None:
    """Give a node the name that it would have in a fresh graph: the erased node that had it does not come back."""
    fresh: Any = fx.Graph()
    name = fresh.get_attr(node.target).name
    if all(other.name != name for other in graph.nodes):
        node.name = name
