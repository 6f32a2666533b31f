"""Which nodes consume a weight, by the table of kinds."""

from __future__ import annotations

from collections.abc import Mapping

from onnx import NodeProto

from wnconvert.carriers.onnx.graphs import DEFAULT_DOMAINS, Constant, GraphIndex, Scope, Value, integer
from wnconvert.carriers.onnx.pairs import Pair, describe
from wnconvert.carriers.onnx.roots import Root, trace
from wnconvert.kinds import ONNX, ONNX_LISTED, OnnxKind, Operand
from wnconvert.sites import Axis, Use

MIN_OPSET = 7
"""The first operator set whose Mul and Div broadcast by shape."""

_KINDS = {kind.op_type: kind for kind in ONNX}


def find_uses(index: GraphIndex, pairs: Mapping[Value, Pair]) -> dict[Constant, list[Use]]:
    """Find every use of every weight, in the order of the nodes.

    A tensor that layers use keeps only those uses; looking up rows of it as well (a tied embedding) has no say.
    """
    layers: dict[Constant, list[Use]] = {}
    lookups: dict[Constant, list[Use]] = {}
    for scope in index.scopes:
        for node in scope.graph.node:
            for value, use in _node_uses(index, scope, node, pairs):
                (lookups if use.kind == "Embedding" else layers).setdefault(value, []).append(use)
    return layers | {value: uses for value, uses in lookups.items() if value not in layers}


def _node_uses(
    index: GraphIndex, scope: Scope, node: NodeProto, pairs: Mapping[Value, Pair]
) -> list[tuple[Constant, Use]]:
    domain = "" if node.domain in DEFAULT_DOMAINS else node.domain
    kind = None if domain else _KINDS.get(node.op_type)
    listed = ONNX_LISTED.get(f"{domain}.{node.op_type}" if domain else node.op_type)
    positions = [o.position for o in kind.operands] if kind else list(listed.positions) if listed else []
    found = []
    for i, position in enumerate(positions):
        operand = scope.find(node.input[position]) if position < len(node.input) and node.input[position] else None
        root = None if operand is None else trace(operand, pairs)
        if root is None:
            continue
        if kind is not None:
            use = _layer_use(index, node, kind, kind.operands[i], root)
        elif listed is not None and len(root.axes) >= 2:
            use = Use(index.label(root.value), node.op_type, describe(node), None, None, problem=listed.reason)
        else:
            continue
        if use is not None:
            found.append((root.value, use))
    return found


def _layer_use(index: GraphIndex, node: NodeProto, kind: OnnxKind, operand: Operand, root: Root) -> Use | None:
    name, rank = index.label(root.value), len(root.axes)
    problem, groups = root.problem, 1
    if problem is None and index.opset < MIN_OPSET:
        problem = f"operator set {index.opset} has no broadcasting Mul; {MIN_OPSET} is the first that can hold a pair"
    if kind.op_type == "Gather" and (rank != 2 or integer(node, "axis", 0) != 0):
        return None
    if rank < 2:
        # A scalar or a vector that was only found behind something else is not a weight worth a line.
        vector = f"a weight with {rank} axes has no output units to keep a magnitude for"
        return None if root.problem else Use(name, kind.op_type, describe(node), None, None, problem=vector)
    axis = out_axis = _mapped((operand.axis % rank,), root)
    if operand.position in kind.transpose and integer(node, kind.transpose[operand.position], 0):
        axis = out_axis = _mapped((1 - operand.axis,), root)
    if kind.batched:
        axis = out_axis = _mapped((*range(rank - 2), operand.axis % rank), root)
    if operand.out_axis != operand.axis:
        groups = integer(node, "group", 1)
        out_axis = _mapped((operand.out_axis,), root)
        if groups > 1:
            out_axis = (0, operand.out_axis + 1)
            if root.axes != tuple(range(rank)):
                problem = problem or f"a grouped {kind.op_type} behind a Transpose"
    return Use(name, kind.name or kind.op_type, describe(node), axis, out_axis, groups, problem)


def _mapped(kept: tuple[int, ...], root: Root) -> Axis:
    """The axes of the root that these axes of the operand are."""
    axes = tuple(sorted(root.axes[i] for i in kept))
    return axes[0] if len(axes) == 1 else axes
