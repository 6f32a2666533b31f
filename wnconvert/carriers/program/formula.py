"""The formula of weight normalization as ATen nodes: run on stand-ins and recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import default_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from wnconvert import layers
from wnconvert.layers import Spec


def record(g: Tensor, v: Tensor, spec: Spec, mode: FakeTensorMode) -> fx.Graph:
    """A graph that takes a magnitude and a direction and returns the weight, for tensors such as these.

    Every node has `meta["val"]` in `mode`. The operators are those of the core ATen set, functional all, which every
    dialect of exported programs may hold.
    """
    with mode:
        # `like` is another tensor than the direction, so that nothing takes the path for plain tensors.
        stand_in, direction, like = (
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in (g, v, v)
        )

    def weight(g: Tensor, v: Tensor) -> Tensor:
        return layers.compose(spec, g, v, like)

    table: Any = default_decompositions()
    recorded = make_fx(weight, decomposition_table=table, tracing_mode="fake")(stand_in, direction)
    for node in recorded.graph.nodes:
        node.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
    return recorded.graph


def emit(graph: fx.Graph, formula: fx.Graph, g: fx.Node, v: fx.Node, meta: Mapping[str, Any]) -> fx.Node:
    """Copy a recorded formula to the insertion point of a graph, and return the node that is the weight.

    Args:
        graph: of the program.
        formula: what `record` gave.
        g: the magnitude in the graph.
        v: the direction in the graph.
        meta: goes on every new node.
    """
    inputs = [node for node in formula.nodes if node.op == "placeholder"]
    copies: dict[fx.Node, fx.Node] = dict(zip(inputs, (g, v), strict=True))
    weight = graph.graph_copy(formula, copies)
    for node in copies.values():
        node.meta.update({} if node in (g, v) else meta)
    if not isinstance(weight, fx.Node):
        raise TypeError(f"the formula returns {type(weight).__name__}, not one tensor")
    return weight
