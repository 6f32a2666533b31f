"""Weight norms that a trace has turned into nodes: which ones fold, and which stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as legacy_weight_norm

import wnconvert
from tests import reference
from tests.graph_tools import TRACERS, done, traced


class Owner(nn.Module):
    """A module of no known kind, whose weight torch splits."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3, 4))
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight, self.bias)


class Nested(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Everything(fx.Tracer):
    """Goes into every module, also those of torch."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False


def traced_through(module: nn.Module, x: Tensor) -> fx.GraphModule:
    return fx.GraphModule(module, Everything().trace(module))


NORMS = {
    "legacy": lambda module, dim: legacy_weight_norm(module, dim=dim),
    "parametrized": lambda module, dim: parametrizations.weight_norm(module, dim=dim),
    "wnconvert": lambda module, dim: wnconvert.apply(module, dim=dim, kinds="*").model,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("dim", [0, 1, 2, None], ids=str)
@pytest.mark.parametrize("tracer", ["traced", "export", "make_fx"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_that_was_traced_into_nodes(norm: str, tracer: str, dim: int | None) -> None:
    torch.manual_seed(0)
    network, x = Nested(Owner()), torch.randn(2, 3, 8)
    NORMS[norm](network.inner, dim)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    expected = network(x)
    g, v = [p.detach().clone() for n, p in network.named_parameters() if not n.endswith("bias")]
    module = {**TRACERS, "traced": traced_through}[tracer](network, x)
    torch.testing.assert_close(module(x), expected)
    before = sum(1 for _ in module.graph.nodes)
    report = wnconvert.fold(module).report
    assert list(done(report).values()) == ["folded"]
    (name,) = done(report)
    assert tracer == "make_fx" or name == "inner.weight"
    module.graph.lint()
    assert sum(1 for _ in module.graph.nodes) < before
    assert len(list(module.parameters())) == 2
    kept = None if dim is None else (dim,)
    assert reference.same_bits(module.get_parameter(name), reference.fold(g, v, kept))
    assert not [path for path, _ in module.named_modules() if "parametrizations" in path]
    torch.testing.assert_close(module(x), expected)
    assert wnconvert.fold(module).report.rows == []
    wnconvert.apply(module)
    torch.testing.assert_close(module(x), expected)


FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "_weight_norm": lambda g, v: torch._weight_norm(v, g, 0),
    "norm_except_dim": lambda g, v: v * (g / torch.norm_except_dim(v, 2, 0)),
    "torch.norm": lambda g, v: g * v / torch.norm(v, dim=1, keepdim=True),
    "method": lambda g, v: v.div(v.norm(2, 1, True)).mul(g),
    "linalg.norm": lambda g, v: v / torch.linalg.norm(v, dim=1, keepdim=True) * g,
    "by hand": lambda g, v: g * v * v.pow(2).sum(1, keepdim=True).rsqrt(),
    "normalize": lambda g, v: F.normalize(v, dim=1) * g,
    "flat": lambda g, v: F.normalize(v, dim=1) * g.view(-1, 1),
}


@pytest.mark.parametrize("formula", FORMULAS)
def test_formulas(formula: str) -> None:
    class Hand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w_g, self.w_v = nn.Parameter(torch.rand(4, 1)), nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, FORMULAS[formula](self.w_g, self.w_v))

    torch.manual_seed(0)
    network, x = Hand(), torch.randn(2, 3)
    module, plain = fx.symbolic_trace(network), reference.fold(network.w_g.detach(), network.w_v.detach(), (0,))
    assert done(wnconvert.fold(module).report) == {"w": "folded"}
    assert reference.same_bits(module.get_parameter("w"), plain)
    torch.testing.assert_close(module(x), network(x))
    assert [node.op for node in module.graph.nodes] == ["placeholder", "get_attr", "call_function", "output"]


def test_halves_with_other_uses_are_left_alone() -> None:
    class Regularised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w_g, self.w_v = nn.Parameter(torch.rand(4, 1)), nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return F.linear(x, torch._weight_norm(self.w_v, self.w_g, 0)), self.w_g.sum()

    module = fx.symbolic_trace(Regularised())
    code = module.code
    (row,) = wnconvert.fold(module).report.rows
    assert (row.action, row.reason) == (
        "skipped",
        "the graph uses its magnitude or direction by itself, in output",
    )
    assert module.code == code
    module(torch.randn(2, 3))


def test_one_direction_with_two_magnitudes_is_left_alone() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.rand(3, 1)), nn.Parameter(torch.rand(3, 1))
            self.v = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            y = F.linear(x, torch._weight_norm(self.v, self.a, 0))
            return F.linear(y, torch._weight_norm(self.v, self.b, 0))

    module = fx.symbolic_trace(Shared())
    code = module.code
    assert set(done(wnconvert.fold(module).report).values()) == {"skipped"}
    assert module.code == code


def test_a_pair_handed_to_a_part_of_a_graph_is_left_alone() -> None:
    class Hand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w_g, self.w_v = nn.Parameter(torch.rand(4, 1)), nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, torch._weight_norm(self.w_v, self.w_g, 0))

    module = split_module(traced(Hand()), nn.Module(), lambda _: 0)
    (row,) = wnconvert.fold(module).report.rows
    assert (row.action, row.reason) == (
        "skipped",
        "the graph uses its magnitude or direction by itself, in submod_0",
    )
    module(torch.randn(2, 3))
