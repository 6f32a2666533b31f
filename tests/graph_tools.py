"""What the tests of graphs share: ways to get one, and what to compare."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from tests import reference
from wnconvert.report.model import Report


def exported(module: nn.Module, x: Tensor) -> fx.GraphModule:
    made = torch.export.export(module, (x,)).module()
    assert isinstance(made, fx.GraphModule)
    return made


def traced(module: nn.Module) -> fx.GraphModule:
    made = fx.symbolic_trace(module)
    for node in made.graph.nodes:
        node.type = None  # torch cannot pickle annotations that are strings
    made.recompile()
    return made


TRACERS: dict[str, Callable[[nn.Module, Tensor], fx.GraphModule]] = {
    "symbolic_trace": lambda module, x: traced(module),
    "export": exported,
    "make_fx": lambda module, x: make_fx(lambda value: module(value))(x),
}


def done(report: Report) -> dict[str, str]:
    return {row.site.name: row.action for row in report.rows}


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """The parameters in their order, copied: `v` shares memory with the weight it was."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters(remove_duplicate=False)}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    assert all(reference.same_bits(a[name], b[name]) for name in a)
