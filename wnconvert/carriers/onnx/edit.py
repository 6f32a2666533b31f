"""Insert the nodes of a pair into a graph, and take them out again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from onnx import GraphProto, NodeProto

from wnconvert.carriers.onnx.graphs import Constant, Consumer, Scope, Value
from wnconvert.carriers.onnx.pairs import Pair


@dataclasses.dataclass(slots=True)
class _Place:
    """Where in a graph the last edit was, and which of its values have a type or a shape written down."""

    last: dict[str, int]
    described: dict[str, Any]


class Editor:
    """Edits the graphs of one index.

    Weights come in the order of the nodes, so a search starts where the last one in that graph ended: from the first
    node on, it would take minutes in a graph of ten thousand layers.
    """

    def __init__(self) -> None:
        self._places: dict[int, _Place] = {}

    def insert(self, value: Constant, nodes: Sequence[NodeProto]) -> None:
        """Insert nodes into the graph that owns a value: after what makes it, or before what first reads it."""
        graph = value.scope.graph
        if value.node is not None:
            position = self._position(graph, "node", value.node) + 1
        else:
            position = self._position(graph, "node", _reader_in(value.scope, value.consumers[0]))
        for i, node in enumerate(nodes):
            graph.node.insert(position + i, node)

    def remove(self, pair: Pair) -> None:
        """Delete the nodes of a pair and its constants, unless something else reads those."""
        for value in pair.chain:
            self._delete(value)
        own = {id(value.node) for value in pair.chain}
        for constant in (pair.g, *pair.helpers):
            constant.consumers = [consumer for consumer in constant.consumers if id(consumer.node) not in own]
            if not constant.consumers and not constant.is_output:
                self._delete(constant)

    def _delete(self, value: Value) -> None:
        """Delete what makes a value, and what is written down of its type."""
        graph = value.scope.graph
        if value.node is not None:
            del graph.node[self._position(graph, "node", value.node)]
        elif isinstance(value, Constant):
            del graph.initializer[self._position(graph, "initializer", value.tensor)]
        info = self._place(graph).described.pop(value.name, None)
        if info is not None:
            del graph.value_info[self._position(graph, "value_info", info)]

    def _position(self, graph: GraphProto, field: str, wanted: object) -> int:
        """Where an item is. The protos stay the same objects while the index refers to them."""
        items, last = getattr(graph, field), self._place(graph).last
        found = next(i for i in _outward(last.get(field, 0), len(items)) if items[i] is wanted)
        last[field] = found
        return found

    def _place(self, graph: GraphProto) -> _Place:
        if id(graph) not in self._places:
            self._places[id(graph)] = _Place({}, {info.name: info for info in graph.value_info})
        return self._places[id(graph)]


def _reader_in(owner: Scope, consumer: Consumer) -> NodeProto:
    """The node of the owner's graph that is, or holds, the node that reads."""
    node, scope = consumer.node, consumer.scope
    while scope is not owner and scope.owner is not None and scope.parent is not None:
        node, scope = scope.owner, scope.parent
    return node


def _outward(start: int, count: int) -> Iterator[int]:
    """Every index below `count`, the nearest to `start` first."""
    for distance in range(count + 1):
        if start + distance < count:
            yield start + distance
        if 0 <= start - distance - 1 < count:
            yield start - distance - 1
