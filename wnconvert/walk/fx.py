"""Tracing with torch.fx: no input is needed, but the forward pass must not depend on values."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from wnconvert.walk.graph_uses import read
from wnconvert.walk.modules import is_plain_layer, kind_of
from wnconvert.walk.trace import Trace, TraceFailed, failed, weights_of
from wnconvert.walk.twin import twin


def trace(root: nn.Module) -> Trace:
    """Trace a network with torch.fx.

    Raises:
        TraceFailed: its forward pass depends on values, or fails.
    """
    try:
        return _trace(root, into_layers=True)
    except TraceFailed:
        # Layers with a forward pass of their own may use more than their weight, or fail where the network would not.
        return _trace(root, into_layers=False)


def _trace(root: nn.Module, *, into_layers: bool) -> Trace:
    try:
        with torch.random.fork_rng(devices=[]), twin(root, data=False) as copied:
            tracer = Tracer(into_layers=into_layers)
            graph = tracer.trace(copied)
            weights = _constants(tracer, graph) | weights_of(root)
    except Exception as error:
        # The forward pass is somebody's code run on stand-ins, and so may be copying: they may raise anything at all.
        raise failed(error) from error
    leaves = {node: str(node.target) for node in graph.nodes if node.op == "get_attr" and node.target in weights}
    found = read(graph, leaves, weights)
    called = frozenset(str(node.target) for node in graph.nodes if node.op == "call_module")
    return Trace(found.uses, called, found.others, found.formulas)


def _constants(tracer: fx.Tracer, graph: fx.Graph) -> dict[str, Tensor]:
    """Tensors that the forward pass makes up."""
    names = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    held = {name: getattr(tracer.root, name, None) for name in names}
    return {name: value for name, value in held.items() if isinstance(value, Tensor)}


class Tracer(fx.Tracer):
    """Does not trace into layers."""

    def __init__(self, *, into_layers: bool) -> None:
        """Trace into layers with a forward pass of their own, or not."""
        super().__init__()
        self._into_layers = into_layers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = is_plain_layer(m) if self._into_layers else kind_of(m) is not None
        return known or super().is_leaf_module(m, module_qualified_name)
