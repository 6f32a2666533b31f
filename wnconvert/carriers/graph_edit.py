"""Edits of one fx graph: a weight read by name becomes a weight norm computed on the spot, and the other way round."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from wnconvert import layers
from wnconvert.walk.graph_uses import Formula, between


class Reads:
    """The nodes of a graph that read parameters and buffers, and the names of all of its nodes.

    A graph has thousands of nodes and weights: going through it for each weight would take minutes.
    """

    def __init__(self, graph: fx.Graph) -> None:
        """Take a graph as it is. Until the next look at it, only the functions of this module may edit it."""
        self.graph = graph
        self._nodes: dict[str, dict[fx.Node, None]] = {}
        self._names: set[str] | None = None
        for node in graph.find_nodes(op="get_attr"):
            self._nodes.setdefault(str(node.target), {})[node] = None

    def of(self, target: str) -> list[fx.Node]:
        """The nodes that read a parameter or a buffer of this name, in their order."""
        return sorted(self._nodes.get(target, ()))

    def insert(self, target: str) -> fx.Node:
        """Read something at the insertion point of the graph."""
        node = self.graph.get_attr(target)
        self._nodes.setdefault(target, {})[node] = None
        return node

    def erase(self, node: fx.Node) -> None:
        """Take a node without users out of the graph."""
        self.graph.erase_node(node)
        if self._names is not None:
            self._names.discard(node.name)
        if node.op == "get_attr":
            self._nodes.get(str(node.target), {}).pop(node, None)

    def forget_names(self) -> None:
        """Note that nodes of other kinds have come."""
        self._names = None

    def name_after_target(self, node: fx.Node) -> None:
        """Give a node the name that it would have in a fresh graph: the erased node that had it does not come back."""
        if self._names is None:
            self._names = {other.name for other in self.graph.nodes}
        fresh: Any = fx.Graph()
        name = fresh.get_attr(node.target).name
        if name not in self._names:
            self._names.discard(node.name)
            node.name = name
        self._names.add(node.name)


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
    reads: Reads, nodes: Sequence[fx.Node], targets: tuple[str, str], spec: layers.Spec, like: Tensor
) -> None:
    """Replace what reads a plain weight by its weight norm, in plain torch functions.

    Args:
        reads: of the graph.
        nodes: every node that reads the weight, in their order. They are erased.
        targets: names of the magnitude and the direction.
        spec: how the weight is split.
        like: the direction itself.
    """
    first = nodes[0]
    with reads.graph.inserting_before(first):
        g, v = (reads.insert(target) for target in targets)
        # Proxies stand for tensors here: what the formula does to them becomes nodes.
        magnitude, direction = (cast("Tensor", fx.Proxy(node)) for node in (g, v))
        computed = cast("fx.Proxy", layers.compose(spec, magnitude, direction, like)).node
    _follow_dtype(computed, v, like.dtype)
    computed.meta = dict(first.meta)
    for node in nodes:
        node.replace_all_uses_with(computed)
        reads.erase(node)
    reads.forget_names()


def _follow_dtype(computed: fx.Node, v: fx.Node, dtype: torch.dtype) -> None:
    """Make the weight go with the dtype that its direction has when the graph runs: `double()` may follow."""
    for norm in between([v], [computed]):
        if norm.kwargs.get("dtype") == torch.float32:
            # It widens half types itself, but refuses to narrow.
            with v.graph.inserting_before(norm):
                wide = v.graph.call_method("to", (norm.args[0], torch.float32))
            norm.args = wide, *norm.args[1:]
    node = computed
    while (node.target, node.args[1:]) != ("to", (dtype,)):
        (node,) = node.all_input_nodes  # groups are flattened after the cast
    with v.graph.inserting_before(node):
        # Not type_as: exporters and torch.jit turn a dtype into a constant.
        node.args = node.args[0], v.graph.call_function(getattr, (v, "dtype"))


def fold_formulas(reads: Reads, formulas: Sequence[fx.Node], targets: tuple[str, str], name: str) -> None:
    """Replace computed weight norms by a node that reads the plain weight, and erase what only they needed.

    Args:
        reads: of the graph.
        formulas: every node at which a weight norm of this pair is computed.
        targets: names of the magnitude and the direction.
        name: of the plain weight.
    """
    halves = [node for target in targets for node in reads.of(target)]
    with reads.graph.inserting_before(min(halves)):
        plain = reads.insert(name)
    plain.meta = dict(formulas[0].meta)
    for node in formulas:
        node.replace_all_uses_with(plain)
    ending = {*between(halves, formulas), *formulas}
    constants = {node for dead in ending for node in dead.all_input_nodes if node.op == "get_attr"} - set(halves)
    for node in sorted(ending, reverse=True):
        reads.erase(node)
    for node in (*halves, *(node for node in constants if not node.users)):
        reads.erase(node)
    reads.name_after_target(plain)


def past_cast(formula: Formula, dtype: torch.dtype, leaves: Mapping[fx.Node, str]) -> fx.Node:
    """The cast to the dtype that the weight has anyway, where that is all that becomes of a computed weight.

    Args:
        formula: the computed weight.
        dtype: of its direction.
        leaves: the nodes of the graph that are parameters, with their names.
    """
    node = formula.node
    users = [user for user in node.users if not _asserts(user)]
    if len(users) != 1 or users[0].args[:1] != (node,) or users[0].kwargs:
        return node
    target, to = users[0].target, users[0].args[1:]
    if target not in ("to", torch.ops.aten.to.dtype) or len(to) != 1:
        return node
    return users[0] if to[0] == dtype or _is_dtype_of(to[0], formula.v, leaves) else node


def _is_dtype_of(argument: Any, name: str, leaves: Mapping[fx.Node, str]) -> bool:
    """Whether an argument is what `split_reads` casts to: the dtype of this parameter."""
    if not isinstance(argument, fx.Node) or argument.target is not getattr:
        return False
    return argument.args[1:] == ("dtype",) and leaves.get(argument.all_input_nodes[0]) == name


def other_reader(reads: Reads, targets: Iterable[str], formulas: Sequence[fx.Node]) -> fx.Node | None:
    """A node that needs the magnitude or the direction for anything but these formulas, if there is one."""
    halves = [node for target in targets for node in reads.of(target)]
    return next((node for node in between(halves, formulas) if _acts(node)), None)


def _acts(node: fx.Node) -> bool:
    """Whether a node does something even where nobody uses its value."""
    in_place = node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__")
    return node.op == "call_module" or in_place or (node.is_impure() and not _asserts(node))


def _asserts(node: fx.Node) -> bool:
    """Whether a node only says what an exporter has seen of a value."""
    return node.target is torch.ops.aten._assert_tensor_metadata.default
