"""Tracing with torch.fx: no input is needed, but the forward pass must not depend on values."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from wnconvert.walk.graph_uses import read
from wnconvert.walk.modules import kind_of
from wnconvert.walk.trace import Trace, failed, twin, weights_of


def trace(root: nn.Module) -> Trace:
    """Trace a network with torch.fx.

    Raises:
        TraceFailed: its forward pass depends on values, or fails.
    """
    try:
        with torch.random.fork_rng(devices=[]), twin(root) as copied:
            tracer = _Tracer()
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


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return kind_of(m) is not None or super().is_leaf_module(m, module_qualified_name)
