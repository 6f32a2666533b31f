"""Insert the nodes of a pair into a graph, and take them out again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from onnx import GraphProto, NodeProto

from wnconvert.carriers.onnx.graphs import Constant, Consumer, Scope, Value
from wnconvert.carriers.onnx.pairs import Pair


class Editor:
    """Edits the graphs of one index, all together in the end.

    Until `finish`, the graphs are what they were: to move everything behind an edit at each of them would take hours in
    a graph of a hundred thousand layers.
    """

    def __init__(self) -> None:
        self._drafts: dict[int, _Draft] = {}

    def insert(self, value: Constant, nodes: Sequence[NodeProto]) -> None:
        """Insert nodes into the graph that owns a value: after what makes it, or before what first reads it."""
        draft = self._draft(value.scope.graph)
        if value.node is not None:
            draft.insert(draft.position(value.node) + 1, nodes)
        else:
            draft.insert(draft.position(_reader_in(value.scope, value.consumers[0])), nodes)

    def remove(self, pair: Pair) -> None:
        """Delete the nodes of a pair and its constants, unless something else reads those."""
        for value in pair.chain:
            self._delete(value)
        own = {id(value.node) for value in pair.chain}
        for constant in (pair.g, *pair.helpers):
            constant.consumers = [consumer for consumer in constant.consumers if id(consumer.node) not in own]
            if not constant.consumers and not constant.is_output:
                self._delete(constant)

    def finish(self) -> None:
        """Make the edits."""
        for draft in self._drafts.values():
            draft.write()
        self._drafts.clear()

    def _delete(self, value: Value) -> None:
        """Delete what makes a value, and what is written down of its type."""
        draft = self._draft(value.scope.graph)
        if value.node is not None:
            draft.delete("node", value.node)
        elif isinstance(value, Constant):
            draft.delete("initializer", value.tensor)
        draft.undescribe(value.name)

    def _draft(self, graph: GraphProto) -> _Draft:
        if id(graph) not in self._drafts:
            self._drafts[id(graph)] = _Draft(graph)
        return self._drafts[id(graph)]


class _Draft:
    """What will be inserted into a graph and deleted from it."""

    def __init__(self, graph: GraphProto) -> None:
        self._graph = graph
        # A proto stays the same object for as long as it is referred to, so that its identity can stand for it.
        self._nodes = list(graph.node)
        self._positions = {id(node): i for i, node in enumerate(self._nodes)}
        self._described = {info.name: info for info in graph.value_info}
        self._new: list[tuple[int, NodeProto]] = []
        self._gone: dict[str, list[Any]] = {"node": [], "initializer": [], "value_info": []}

    def position(self, node: NodeProto) -> int:
        """Where a node is."""
        return self._positions[id(node)]

    def insert(self, position: int, nodes: Iterable[NodeProto]) -> None:
        """Insert nodes before the one at a position, after those that were inserted there already."""
        self._new += [(position, node) for node in nodes]

    def delete(self, field: str, item: object) -> None:
        """Delete an item of a field of the graph."""
        self._gone[field].append(item)

    def undescribe(self, name: str) -> None:
        """Delete what is written down of a value."""
        info = self._described.pop(name, None)
        if info is not None:
            self.delete("value_info", info)

    def write(self) -> None:
        """Make the edits. Sorting moves references to protos, where everything else would copy them."""
        if self._new:
            self._graph.node.extend(node for _, node in self._new)
            order = {id(node): (i, 1) for i, node in enumerate(self._nodes)}
            added = self._graph.node[len(self._nodes) :]
            order |= {id(node): (position, 0) for node, (position, _) in zip(added, self._new, strict=True)}
            self._graph.node.sort(key=lambda node: order[id(node)])
        for field, gone in self._gone.items():
            if gone:
                items, dropped = getattr(self._graph, field), {id(item) for item in gone}
                items.sort(key=lambda item, dropped=dropped: id(item) in dropped)
                del items[len(items) - len(dropped) :]


def _reader_in(owner: Scope, consumer: Consumer) -> NodeProto:
    """The node of the owner's graph that is, or holds, the node that reads."""
    node, scope = consumer.node, consumer.scope
    while scope is not owner and scope.owner is not None and scope.parent is not None:
        node, scope = scope.owner, scope.parent
    return node
