"""The nodes that stand for `g * v / ||v||`: written by `apply`, recognised by `fold`.

    float32, float64    ReduceL2(v) -> Div(g, .) -> Mul(v, .)
    float16, bfloat16   the same on Cast(v) in float32, with g in float32, and a Cast back
    grouped             Reshape(v) before (and after a Cast), Reshape back (before a Cast)

This order is what ONNX Runtime folds into a plain weight when it loads the model.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from onnx import NodeProto, TensorProto, helper, numpy_helper

from wnconvert.carriers.onnx import tensors
from wnconvert.carriers.onnx.graphs import IR_WITH_INITIALIZERS, Constant, GraphIndex, Value, attribute, integer, is_op
from wnconvert.sites import Axis, g_shape

MAX_RANK = 64
"""No weight has as many axes; a longer list of integers is something else."""


@dataclasses.dataclass(eq=False, frozen=True, slots=True)
class Pair:
    """One recognised pair.

    Attributes:
        v: the direction, which keeps the name of the plain weight.
        g: the magnitude.
        result: what the layers read.
        chain: what the nodes of the formula make, in no order.
        helpers: constants that only say which axes and shapes.
        axis: what `g` keeps, as in a `Site`.
        groups: as in a `Site`.
        problem: why the pair cannot be folded, or None.
    """

    v: Constant
    g: Constant
    result: Value
    chain: tuple[Value, ...]
    helpers: tuple[Constant, ...]
    axis: Axis
    groups: int
    problem: str | None = None


@dataclasses.dataclass(slots=True)
class Emission:
    """What has to be added to a graph for one pair.

    Attributes:
        nodes: in topological order.
        constants: new tensors that the nodes read, g first.
        result: name of the value that takes the weight's place.
    """

    nodes: list[NodeProto]
    constants: list[TensorProto]
    result: str = ""


def emit(index: GraphIndex, v: Constant, g: TensorProto, axis: Axis, groups: int) -> Emission:
    """Make the nodes for a pair of a direction that is there and a magnitude that is not yet."""
    made = Emission([], [g])
    name, half = v.name, v.tensor.data_type in tensors.HALF
    shape = list(v.tensor.dims)
    view = [groups, shape[0] // groups, *shape[1:]] if groups > 1 else shape
    kept = () if axis is None else (axis,) if isinstance(axis, int) else axis
    reduced = [i for i in range(len(view)) if i not in kept]

    def node(op_type: str, inputs: list[str], suffix: str, **attributes: Any) -> str:
        output = index.new_name(name + suffix)
        made.nodes.append(helper.make_node(op_type, inputs, [output], name=output, **attributes))
        return output

    def integers(values: list[int], suffix: str) -> str:
        constant = helper.make_tensor(index.new_name(name + suffix), TensorProto.INT64, [len(values)], values)
        made.constants.append(constant)
        return constant.name

    x = node("Cast", [name], "_f32", to=TensorProto.FLOAT) if half else name
    if groups > 1:
        x = node("Reshape", [x, integers(view, "_group_shape")], "_groups")
    if index.opset < 18:
        norm = node("ReduceL2", [x], "_norm", axes=reduced, keepdims=1)
    else:
        norm = node("ReduceL2", [x, integers(reduced, "_norm_axes")], "_norm", keepdims=1)
    ratio = node("Div", [g.name, norm], "_ratio")
    last = half or groups > 1
    x = node("Mul", [x, ratio], "_scaled" if last else "_wn")
    if groups > 1:
        x = node("Reshape", [x, integers(shape, "_shape")], "_wn_f32" if half else "_wn")
    made.result = node("Cast", [x], "_wn", to=v.tensor.data_type) if half else x
    return made


def find_pairs(index: GraphIndex) -> dict[Value, Pair]:
    """Recognise every pair by its structure, whatever the names, keyed by the value that layers read."""
    found = {}
    for scope in index.scopes:
        for value in list(scope.values.values()):
            if is_op(value.node, "Mul"):
                pair = _match(index, value)
                if pair is not None:
                    found[pair.result] = pair
    return found


def _match(index: GraphIndex, product: Value) -> Pair | None:
    """Read a Mul as the end of the formula: `product = x * (g / ||x||)`."""
    x, ratio = _inputs(product, "Mul", 2)
    g, norm = _inputs(ratio, "Div", 2)
    if x is None or ratio is None or norm is None or x is not _inputs(norm, "ReduceL2")[0]:
        return None
    chain, result, groups = [product, ratio, norm], product, 1
    view = shape = None
    if is_op(x.node, "Reshape"):
        (plain, view), back = _inputs(x, "Reshape", 2), _only_reader(result, "Reshape")
        shape = _inputs(back, "Reshape", 2)[1]
        groups = _read_groups(view, shape)
        if plain is None or back is None or not groups:
            return None
        chain += [x, back]
        x, result = plain, back
    if is_op(x.node, "Cast"):
        narrow, back = _inputs(x, "Cast", 1)[0], _only_reader(result, "Cast")
        if narrow is None or back is None:
            return None
        chain += [x, back]
        x, result = narrow, back
    if not isinstance(x, Constant) or not isinstance(g, Constant) or not _types_fit(x, g, result):
        return None
    reduced, axes = _reduced(norm)
    axis = _kept(x, g, groups, reduced, view)
    if axis is False:
        return None
    helpers = tuple(value for value in (view, shape, axes) if isinstance(value, Constant))
    pair = Pair(x, g, result, tuple(chain), helpers, axis, groups)
    return dataclasses.replace(pair, problem=_problem(index, pair))


def _types_fit(v: Constant, g: Constant, result: Value) -> bool:
    """Whether `v` is narrow and cast to float32 and back, or wide and not cast, and `g` is as wide as the formula."""
    if v.tensor.data_type not in tensors.FLOATS:
        return False
    if v.tensor.data_type not in tensors.HALF:
        return not is_op(result.node, "Cast") and g.tensor.data_type == v.tensor.data_type
    back = is_op(result.node, "Cast") and integer(result.node, "to", 0) == v.tensor.data_type
    return back and g.tensor.data_type == TensorProto.FLOAT


def _kept(
    v: Constant, g: Constant, groups: int, reduced: tuple[int, ...] | None, view: Value | None
) -> Axis | Literal[False]:
    """The axes that the norm leaves, or False where `g` has another shape than `emit` gives it."""
    shape = tuple(v.tensor.dims)
    if groups > 1:
        if not shape or shape[0] % groups or _integers(view) != (groups, shape[0] // groups, *shape[1:]):
            return False
        rank = len(shape) + 1
    else:
        rank = len(shape)
    if reduced is None or not all(-rank <= i < rank for i in reduced):
        return False
    kept = tuple(i for i in range(rank) if i not in {j % rank for j in reduced})
    axis: Axis = None if not g.tensor.dims and not kept else kept[0] if len(kept) == 1 else kept
    return axis if tuple(g.tensor.dims) == g_shape(shape, axis, groups) else False


def _problem(index: GraphIndex, pair: Pair) -> str | None:
    """Why a pair cannot be folded although it has the right structure: something else depends on its parts."""
    own = {id(value.node) for value in pair.chain}
    inner = (value for value in pair.chain if value is not pair.result)
    for value in (pair.v, pair.g, *inner):
        if value.is_output:
            return f"{value.name}, a part of its weight norm, is an output of the graph"
        if value.is_input and index.model.ir_version >= IR_WITH_INITIALIZERS:
            return f"{value.name} can be overridden from outside: it is an input of the graph"
        others = [c.node for c in value.consumers if id(c.node) not in own]
        if others and value is not pair.g:
            return f"{value.name}, a part of its weight norm, is also read by {describe(others[0])}"
    if pair.result.is_output:
        return f"{pair.result.name} is an output of the graph"
    for consumer in pair.result.consumers:
        if consumer.scope.find(pair.v.name) is not pair.v:
            return f"{describe(consumer.node)} reads it where {pair.v.name} is the name of something else"
    return None


def describe(node: NodeProto) -> str:
    """A node as a person finds it: by its name, or by what it makes."""
    return node.name or f"{node.op_type} -> {next(iter(node.output), '?')}"


def _inputs(value: Value | None, op_type: str, count: int | None = None) -> list[Value | None]:
    """The inputs of the node that computes a value; at least two Nones if it is not of this type and input count."""
    node = None if value is None else value.node
    if value is None or not is_op(node, op_type) or not node.input or count not in (None, len(node.input)):
        return [None, None]
    return [value.scope.find(name) if name else None for name in node.input]


def _only_reader(value: Value, op_type: str) -> Value | None:
    """The output of the one node that reads a value, if it is of this type and in the same graph."""
    if len(value.consumers) != 1:
        return None
    reader = value.consumers[0]
    if not is_op(reader.node, op_type) or reader.scope is not value.scope or reader.position or not reader.node.output:
        return None
    return reader.scope.values.get(reader.node.output[0])


def _read_groups(view: Value | None, shape: Value | None) -> int:
    """The number of groups that a Reshape adds as a leading axis, or 0 if it does something else."""
    seen, plain = _integers(view), _integers(shape)
    if not seen or plain != (seen[0] * seen[1], *seen[2:]):
        return 0
    return seen[0] if seen[0] > 1 else 0


def _reduced(norm: Value) -> tuple[tuple[int, ...] | None, Value | None]:
    """The axes that a ReduceL2 names, and the constant that holds them. No axes where it names none or drops them."""
    if norm.node is None or integer(norm.node, "keepdims", 1) != 1:
        return None, None
    given = attribute(norm.node, "axes")
    if given is not None:
        return tuple(given.ints) or None, None
    axes = _inputs(norm, "ReduceL2", 2)[1]
    return _integers(axes) or None, axes


def _integers(value: Value | None) -> tuple[int, ...] | None:
    """The content of a small integer constant."""
    if not isinstance(value, Constant):
        return None
    tensor = value.tensor
    if tensor.data_type != TensorProto.INT64 or tensor.data_location == TensorProto.EXTERNAL:
        return None
    if len(tensor.dims) != 1 or tensor.dims[0] > MAX_RANK:
        return None
    return tuple(int(i) for i in numpy_helper.to_array(tensor))
