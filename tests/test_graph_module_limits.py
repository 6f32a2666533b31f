"""Graphs in other hands: code around them that reads their weights, writes in place, changes of dtype, sheer size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import wnconvert
from tests import reference
from tests.functional_networks import Net
from tests.graph_tools import done
from wnconvert import weightnorm
from wnconvert.carriers import graph_edit

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def graph_of(forward: Callable[[Any, Tensor], Tensor], **shapes: tuple[int, ...]) -> fx.GraphModule:
    torch.manual_seed(0)
    return fx.symbolic_trace(Net(forward, shapes))


class Reader(nn.Module):
    """Multiplies by a weight of its graph once more."""

    def __init__(self, reads: bool, branches: bool) -> None:
        super().__init__()
        self.enc: Any = graph_of(lambda s, x: F.linear(F.linear(x, s.w), s.u), w=(3, 4), u=(3, 3))
        self.reads, self.branches = reads, branches

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.enc(x)
        if self.branches and x.sum() > 1e9:
            return y
        return F.linear(y, self.enc.w.t()) if self.reads else y


@pytest.mark.parametrize("dim", ["torch", None], ids=str)
@pytest.mark.parametrize(
    ("branches", "example", "reason"),
    [
        (False, None, "the forward pass around its graph reads it too"),
        (True, X, "the forward pass around its graph reads it too"),
        (True, None, "the forward pass around its graph may read it too, and no trace shows whether it does"),
    ],
    ids=["traced", "run", "neither"],
)
def test_a_weight_of_a_graph_that_the_network_around_it_reads(
    branches: bool, example: Tensor | None, reason: str, dim: Any
) -> None:
    network = Reader(reads=True, branches=branches)
    expected = network(X)
    rows = {r.site.name: r for r in wnconvert.apply(network, dim=dim, example_inputs=example).report.rows}
    assert (rows["enc.w"].action, rows["enc.w"].reason) == ("skipped", reason)
    assert rows["enc.u"].action == "split"
    assert reference.same_bits(network(X), expected)


def test_a_weight_of_a_graph_that_only_the_graph_reads() -> None:
    network = Reader(reads=False, branches=False)
    expected = network(X)
    assert done(wnconvert.apply(network).report) == {"enc.w": "split", "enc.u": "split"}
    assert reference.same_bits(network(X), expected)


def test_a_half_that_the_network_around_its_graph_reads() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            formula = lambda s, x: F.linear(x, torch._weight_norm(s.w_v, s.w_g, 0))  # noqa: E731
            self.enc = graph_of(formula, w_g=(3, 1), w_v=(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.enc(x) + self.enc.get_parameter("w_g").sum()
            return y

    network = Around()
    expected = network(X)
    (row,) = wnconvert.fold(network).report.rows
    assert (row.action, row.reason) == ("skipped", "the forward pass around its graph reads it too")
    assert reference.same_bits(network(X), expected)


class WritesToALayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight.mul_(0.5)
        y: Tensor = self.layer(x)
        return y


@pytest.mark.parametrize("by", ["function", "layer"])
def test_a_weight_that_a_graph_changes_in_place(by: str) -> None:
    written = graph_of(lambda s, x: (s.w.mul_(0.5), F.linear(x, s.w))[1], w=(3, 4))
    module = written if by == "function" else fx.symbolic_trace(WritesToALayer())
    module.requires_grad_(False)
    twin = copy.deepcopy(module)
    (row,) = wnconvert.apply(module).report.rows
    assert (row.action, row.reason) == ("skipped", "changed in place, by mul_")
    for _ in range(2):
        assert reference.same_bits(module(X), twin(X))


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda w: w.mul_(2),
    "a view": lambda w: (w.t().mul_(2), w)[1],
}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("write", WRITES)
def test_a_norm_that_is_changed_in_place_stays(write: str, half: bool) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        if half:
            WRITES[write](s.w_v)
        w = torch._weight_norm(s.w_v, s.w_g, 0)
        return F.linear(x, w if half else WRITES[write](w))

    module = graph_of(forward, w_g=(3, 1), w_v=(3, 4)).requires_grad_(False)
    code = module.code
    (row,) = wnconvert.fold(module).report.rows
    assert (row.action, row.reason) == ("skipped", "changed in place, by mul_")
    assert module.code == code


@pytest.mark.parametrize("dim", ["torch", "out", None], ids=str)
@pytest.mark.parametrize("before", weightnorm.DTYPES, ids=str)
def test_a_split_graph_changes_its_dtype(before: torch.dtype, dim: Any) -> None:
    module = graph_of(lambda s, x: F.conv_transpose1d(x, s.w, groups=2), w=(4, 4, 3)).to(before)
    wnconvert.apply(module, dim=dim)
    x = torch.randn(2, 4, 5)
    for after in weightnorm.DTYPES:
        changed = copy.deepcopy(module).to(after)
        y = changed(x.to(after))
        assert y.dtype == after
        torch.testing.assert_close(y.double(), module(x.to(before)).double(), rtol=5e-2, atol=5e-2)
    wnconvert.fold(module)
    assert module.get_parameter("w").dtype == before


def test_folding_looks_at_every_node_of_a_graph_once(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 30

    def forward(s: Any, x: Tensor) -> Tensor:
        for i in range(count):
            x = F.linear(x, getattr(s, f"w{i}"))
        return x

    module = graph_of(forward, **{f"w{i}": (4, 4) for i in range(count)})
    wnconvert.apply(module)
    graph, passes = module.graph, []
    nodes: Any = vars(fx.Graph)["nodes"]
    find = fx.Graph.find_nodes

    def noted(s: fx.Graph) -> Any:
        passes.append(s)
        return nodes.fget(s)

    def found(s: fx.Graph, **given: Any) -> Any:
        passes.append(s)
        return find(s, **given)

    monkeypatch.setattr(fx.Graph, "nodes", property(noted))
    monkeypatch.setattr(fx.Graph, "find_nodes", found)
    wnconvert.fold(module)
    monkeypatch.undo()
    assert sum(seen is graph for seen in passes) < count
    assert len(graph_edit.Reads(graph).of("w0")) == 1
    graph.lint()
