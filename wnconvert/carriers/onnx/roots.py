"""From the operand of a layer back to the tensor that holds its weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from wnconvert.carriers.onnx.graphs import Constant, Value, attribute, is_op
from wnconvert.carriers.onnx.pairs import Pair

OTHER_FORM = "the weight is computed with a norm, in a form that this version does not fold"
"""What the problem of a root begins with if it looks split by another tool."""


@dataclasses.dataclass(frozen=True, slots=True)
class Root:
    """The tensor behind an operand.

    Attributes:
        value: the tensor, which is the direction if it is split.
        axes: for each axis of the operand, the axis of the tensor that it is.
        problem: why the tensor cannot be split for this operand, or None.
    """

    value: Constant
    axes: tuple[int, ...]
    problem: str | None = None


def trace(operand: Value, pairs: Mapping[Value, Pair]) -> Root | None:
    """Walk an operand back through Identity, Cast and Transpose.

    Args:
        operand: what a layer reads.
        pairs: the pairs of the model by the value that they compute; they stand for one tensor.

    Returns:
        The root; for an operand computed from constants in another way, the largest of them with that as the problem;
        None for one that depends on the model's inputs.
    """
    value, orders = operand, []
    while value not in pairs and is_op(value.node, "Identity", "Cast", "Transpose") and value.node.input:
        if value.node.op_type == "Transpose":
            perm = attribute(value.node, "perm")
            orders.append(None if perm is None else tuple(perm.ints))
        before = value.scope.find(value.node.input[0])
        if before is None:
            return None
        value = before
    if value in pairs:
        value = pairs[value].v
    if not isinstance(value, Constant):
        return _largest(value) if value.fixed else None
    rank = len(value.tensor.dims)
    straight = axes = tuple(range(rank))
    for perm in reversed(orders):
        order = straight[::-1] if perm is None else perm
        if sorted(order) != list(straight):
            return Root(value, straight, "a Transpose before it does not fit its shape")
        axes = tuple(axes[i] for i in order)
    return Root(value, axes)


def _largest(value: Value) -> Root | None:
    """The largest tensor that a constant expression is computed from. It is reported, never converted."""
    seen, pending = {value}, [value]
    leaves: list[Constant] = []
    ops: list[str] = []
    while pending:
        found = pending.pop()
        if isinstance(found, Constant):
            leaves.append(found)
        elif found.node is not None:
            ops.append(found.node.op_type)
            inputs = [found.scope.find(name) for name in found.node.input if name]
            new = [v for v in inputs if v is not None and v not in seen]
            seen.update(new)
            pending += new
    if not leaves:
        return None
    largest = max(leaves, key=lambda leaf: math.prod(leaf.tensor.dims))
    what = "it is quantized" if "DequantizeLinear" in ops else "the weight is computed from it"
    if {"ReduceL2", "Div", "Mul"} <= set(ops):
        what = OTHER_FORM
    straight = tuple(range(len(largest.tensor.dims)))
    return Root(largest, straight, f"{what} ({', '.join(dict.fromkeys(ops))})")
