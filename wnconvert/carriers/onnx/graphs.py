"""An index of all graphs of a model: which name means which value, who makes it and who reads it.

The index refers to the protos of the model and owns none of them. It is built once and then read; whoever edits the
model builds it again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeGuard

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from wnconvert.errors import InputError

DEFAULT_DOMAINS = ("", "ai.onnx")

IR_WITH_INITIALIZERS = 4
"""From here on an initializer need not be an input; one that is can be overridden."""


@dataclasses.dataclass(eq=False, slots=True)
class Scope:
    """One graph: the main one, or the body of an If, Loop or Scan.

    Attributes:
        graph: its proto.
        parent: the scope whose values it can read, or None for the main graph.
        owner: the node of the parent that holds it.
        path: names the graph in a way that editing other nodes does not change; empty for the main graph.
        values: what this graph itself defines.
    """

    graph: GraphProto
    parent: Scope | None
    owner: NodeProto | None
    path: str
    values: dict[str, Value] = dataclasses.field(default_factory=dict)

    def find(self, name: str) -> Value | None:
        """Return the value that `name` means here, looking outward through the enclosing graphs."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.values:
                return scope.values[name]
            scope = scope.parent
        return None


class Consumer(NamedTuple):
    """A node that reads a value, and at which input."""

    scope: Scope
    node: NodeProto
    position: int


@dataclasses.dataclass(eq=False, slots=True)
class Value:
    """One named value of one graph.

    Attributes:
        scope: the graph that defines it.
        name: unique in its scope.
        node: what computes it, None for inputs and initializers.
        is_input: of its graph.
        is_output: of its graph, or of a body that returns it.
        fixed: it depends on no input of the model.
        consumers: in the order of the nodes, inner graphs included.
    """

    scope: Scope
    name: str
    node: NodeProto | None = None
    is_input: bool = False
    is_output: bool = False
    fixed: bool = False
    consumers: list[Consumer] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False, slots=True)
class Constant(Value):
    """A value with dense data of its own: an initializer, or what a Constant node makes.

    Attributes:
        tensor: its data.
    """

    tensor: TensorProto = dataclasses.field(default_factory=TensorProto)


class GraphIndex:
    """All scopes of a model, outer before inner.

    Raises:
        InputError: a name is not text.

    Attributes:
        model: the proto that is indexed.
        opset: version of the default operator set, 0 if the model does not import it.
        scopes: every graph but those of local functions and of training_info.
        names: every name in use, of values and of nodes.
    """

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.opset = next((o.version for o in model.opset_import if o.domain in DEFAULT_DOMAINS), 0)
        self.scopes: list[Scope] = []
        self.names: set[str] = set()
        self._enter(Scope(model.graph, None, None, ""))
        self._labels = self._label()

    def constants(self) -> dict[str, Constant]:
        """Every constant under a name that is unique in the model."""
        return {label: value for value, label in self._labels.items()}

    def label(self, value: Constant) -> str:
        """The name of a constant: its own, after the path of its graph where several graphs use that name."""
        return self._labels[value]

    def new_name(self, base: str) -> str:
        """Take a name that nothing in the model has."""
        name, count = base, 1
        while name in self.names:
            count += 1
            name = f"{base}_{count}"
        self.names.add(name)
        return name

    def _enter(self, scope: Scope) -> None:
        self.scopes.append(scope)
        graph = scope.graph
        inputs = {info.name for info in graph.input}
        for name in inputs:
            self._define(Value(scope, name, is_input=True))
        _require_single(scope, [tensor.name for tensor in graph.initializer])
        for tensor in graph.initializer:
            self._define(Constant(scope, tensor.name, is_input=tensor.name in inputs, fixed=True, tensor=tensor))
        for sparse in graph.sparse_initializer:
            self._define(Value(scope, sparse.values.name, fixed=True))
        for info in graph.value_info:
            self.names.add(info.name)
        for node in graph.node:
            self._add(scope, node)
        for info in graph.output:
            self.names.add(info.name)
            returned = scope.find(info.name)
            if returned is not None:
                returned.is_output = True

    def _define(self, value: Value) -> None:
        _require_text(value.name)
        value.scope.values[value.name] = value
        self.names.add(value.name)

    def _add(self, scope: Scope, node: NodeProto) -> None:
        # Asked for once: there are many nodes, and protobuf makes a new object for every answer.
        name, given, made = node.name, [*node.input], [*node.output]
        _require_text(node.op_type, node.domain, name, *given, *made)
        self.names.add(name)
        bodies = list(_bodies(node))
        fixed = any(given) and not bodies
        for position, read in enumerate(given):
            value = scope.find(read) if read else None
            if value is not None:
                value.consumers.append(Consumer(scope, node, position))
            fixed = fixed and (not read or (value is not None and value.fixed))
        constant = is_op(node, "Constant")
        tensor = attribute(node, "value") if constant else None
        for written in made:
            if tensor is not None and written:
                self._define(Constant(scope, written, node, fixed=True, tensor=tensor.t))
            elif written:
                self._define(Value(scope, written, node, fixed=fixed or constant))
        for part, graph in bodies:
            path = f"{scope.path}{name or next(iter(made), node.op_type)}.{part}/"
            self._enter(Scope(graph, scope, node, path))

    def _label(self) -> dict[Constant, str]:
        values = [value for scope in self.scopes for value in scope.values.values() if isinstance(value, Constant)]
        count: dict[str, int] = {}
        for value in values:
            count[value.name] = count.get(value.name, 0) + 1
        labels: dict[Constant, str] = {}
        taken = {name for name, n in count.items() if n == 1}
        for value in values:
            label = value.name
            if count[label] > 1:
                base = label = value.scope.path + label
                number = 1
                while label in taken:
                    number += 1
                    label = f"{base}_{number}"
                taken.add(label)
            labels[value] = label
        return labels


def _require_single(scope: Scope, initializers: Sequence[str]) -> None:
    """Refuse a name that means two tensors: which of them a runtime takes is up to it."""
    seen: set[str] = set()
    for name in initializers:
        if name in seen or (scope.parent is not None and scope.parent.find(name) is not None):
            raise InputError(f"damaged: there are two tensors of the name {name!r}")
        seen.add(name)


def _require_text(*names: str | bytes) -> None:
    """Refuse what protobuf gives back as bytes."""
    for name in names:
        if isinstance(name, bytes):
            raise InputError(f"damaged: {name.decode(errors='replace')!r} is a name in the graph, and not in UTF-8")


def is_op(node: NodeProto | None, *op_types: str) -> TypeGuard[NodeProto]:
    """Whether a node is one of these operators of the default domain."""
    return node is not None and node.op_type in op_types and node.domain in DEFAULT_DOMAINS


def attribute(node: NodeProto, name: str) -> AttributeProto | None:
    """Return an attribute of a node, if it is given."""
    return next((a for a in node.attribute if a.name == name), None)


def integer(node: NodeProto, name: str, default: int) -> int:
    """Return an integer attribute of a node, or its default."""
    found = attribute(node, name)
    return default if found is None else found.i


def all_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every dense tensor anywhere in the model: those of local functions and training_info too."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)
        for default in function.attribute_proto:
            yield from _attribute_tensors(default)
    for training in model.training_info:
        yield from _graph_tensors(training.initialization)
        yield from _graph_tensors(training.algorithm)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for found in node.attribute:
            yield from _attribute_tensors(found)


def _attribute_tensors(found: AttributeProto) -> Iterator[TensorProto]:
    if found.HasField("t"):
        yield found.t
    yield from found.tensors
    for sparse in [*([found.sparse_tensor] if found.HasField("sparse_tensor") else []), *found.sparse_tensors]:
        yield from (sparse.values, sparse.indices)
    for graph in _graphs(found):
        yield from _graph_tensors(graph)


def _bodies(node: NodeProto) -> Iterator[tuple[str, GraphProto]]:
    for found in node.attribute:
        graphs = list(_graphs(found))
        for i, graph in enumerate(graphs):
            yield (found.name if len(graphs) == 1 else f"{found.name}.{i}"), graph


def _graphs(found: AttributeProto) -> Iterator[GraphProto]:
    if found.HasField("g"):
        yield found.g
    yield from found.graphs
