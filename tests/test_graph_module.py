"""Networks that are an `fx.GraphModule`: traced, exported and unlifted, or nested in another network."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module

import wnconvert
from tests import reference
from tests.functional_networks import CASES, Case
from tests.graph_tools import TRACERS, assert_same, done, exported, snapshot, traced
from wnconvert import layers, weightnorm

CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-1}


def train(module: nn.Module, x: Tensor) -> None:
    """One step that moves magnitudes and directions, each on its own."""
    module(x).square().sum().backward()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("_g", "_v")):
                assert parameter.grad is not None, f"{name} has no gradient"
                parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter.dtype))


def assert_folds_what_it_computed(module: fx.GraphModule, x: Tensor) -> None:
    """Fold a trained network and compare with float64: each weight within 1 ulp, and the outputs."""
    before = module(x).double()
    pairs = {
        site.name: (module.get_parameter(f"{site.name}_g"), module.get_parameter(f"{site.name}_v"))
        for site in wnconvert.find(module)
        if site.state == "split" and site.groups == 1
    }
    expected = {}
    for name, (g, v) in pairs.items():
        kept = None if g.dim() == 0 else tuple(i for i in range(v.dim()) if g.shape[i] != 1)
        expected[name] = reference.fold(g.detach().clone(), v.detach().clone(), kept)
    wnconvert.fold(module)
    module.graph.lint()
    for name, weight in expected.items():
        # In float64 the reference itself rounds more than once.
        assert reference.ulp(module.get_parameter(name), weight) <= (2 if x.dtype == torch.float64 else 0)
    after = module(x).double()
    assert (before - after).abs().max() <= CLOSE[x.dtype] * before.abs().max()


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_functions(case: Case, tracer: str) -> None:
    network, x = case.make()
    expected = network(x)
    module = TRACERS[tracer](network, x)
    before, code = snapshot(module), module.code
    names = list(case.shapes)
    if tracer == "make_fx":  # it numbers the parameters as the forward pass comes by them
        sites = {site.name for site in wnconvert.find(module)}
        assert len(sites) == len(case.axes)
    else:
        assert {site.name: site.axis for site in wnconvert.find(module)} == case.axes, names
    report = wnconvert.apply(module).report
    assert report.walker == "fx"
    assert set(done(report).values()) == {"split"}
    module.graph.lint()
    assert "wnconvert" not in module.code
    assert reference.same_bits(module(x), expected)
    again = module.code
    assert set(done(wnconvert.apply(module).report).values()) == {"skipped"}
    assert module.code == again
    wnconvert.fold(module)
    module.graph.lint()
    assert_same(snapshot(module), before)
    assert reference.same_bits(module(x), expected)
    if tracer != "make_fx" or case.name not in ("twice", "slice"):  # make_fx reads a weight anew at each use
        assert module.code == code
    assert wnconvert.fold(module).report.rows == []
    wnconvert.apply(module)
    train(module, x)
    assert_folds_what_it_computed(module, x)


@pytest.mark.parametrize("dtype", weightnorm.DTYPES, ids=str)
@pytest.mark.parametrize("dim", ["torch", "out", None, 1], ids=str)
@pytest.mark.parametrize("name", ["mlp", "conv2d", "conv_transpose2d groups 2"])
def test_the_graph_computes_what_a_split_layer_does(name: str, dim: Any, dtype: torch.dtype) -> None:
    network, x = next(case for case in CASES if case.name == name).make(dtype)
    module = fx.symbolic_trace(network)
    twin = copy.deepcopy(network)
    before, expected = snapshot(module), network(x)
    wnconvert.apply(module, dim=dim)
    wnconvert.apply(twin, dim=dim)
    assert reference.same_bits(module(x), expected)
    wnconvert.fold(module)
    assert_same(snapshot(module), before)
    wnconvert.apply(module, dim=dim)
    train(module, x)
    twin.load_state_dict(module.state_dict())
    if dtype == torch.float64:
        # A graph has torch's own norm, which adds in another order.
        torch.testing.assert_close(module(x), twin(x), rtol=1e-13, atol=1e-13)
    else:
        assert reference.same_bits(module(x), twin(x))
    if dim != "out":
        assert_folds_what_it_computed(module, x)


class Mixed(nn.Module):
    """Layers, a weight in a plain holder, a table that is a layer and a matrix, a buffer, a name that is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.w = nn.Parameter(torch.randn(4, 4))
        self.w_again = self.w
        self.inner = nn.Module()
        self.inner.kernel = nn.Parameter(torch.randn(4, 3))
        self.inner.bias = nn.Parameter(torch.randn(3))
        self.layer = nn.Linear(3, 4)
        self.register_buffer("fixed", torch.randn(4, 4))
        self.taken = nn.Parameter(torch.randn(4, 4))
        self.taken_g = nn.Parameter(torch.randn(4))

    def forward(self, ids: Tensor) -> Tensor:
        x = F.linear(F.linear(self.table(ids), self.w), self.w_again)
        x = self.layer(x @ self.inner.kernel + self.inner.bias)
        return F.linear(F.linear(x @ self.fixed, self.taken) * self.taken_g, self.table.weight)


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def mixed() -> tuple[fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    network = Mixed()
    return traced(network), network(IDS)


def test_layers_holders_ties_and_taken_names() -> None:
    module, expected = mixed()
    before, code = snapshot(module), module.code
    report = wnconvert.apply(module).report
    assert done(report) == {
        "table.weight": "split",
        "layer.weight": "split",
        "w": "split",
        "inner.kernel": "split",
        "taken": "skipped",
    }
    assert next(row.reason for row in report.rows if row.site.name == "taken") == "its layer has a taken_g of its own"
    module.graph.lint()
    assert reference.same_bits(module(IDS), expected)
    table = module.table
    assert isinstance(table, nn.Embedding)
    assert type(table).__name__ == "WeightNormEmbedding"
    # One magnitude moves the layer and the matrix.
    with torch.no_grad():
        module.get_parameter("table.weight_g").mul_(2)
    assert not torch.equal(module(IDS), expected)
    with torch.no_grad():
        module.get_parameter("table.weight_g").div_(2)
    wnconvert.fold(module)
    module.graph.lint()
    assert_same(snapshot(module), before)
    assert module.code == code
    assert type(module.table) is nn.Embedding


def test_what_a_converted_graph_must_survive(tmp_path: Path) -> None:
    module, expected = mixed()
    before = snapshot(module)
    wnconvert.apply(module)
    state = module.state_dict()
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = {
        "pickle": torch.load(file, weights_only=False),
        "deepcopy": copy.deepcopy(module),
        "trace": fx.symbolic_trace(copy.deepcopy(module)),  # a trace shares the layers of what it traced
        "export": torch.export.export(module, (IDS,)).module(),
    }
    for made, other in copies.items():
        assert reference.same_bits(other(IDS), expected), made
        if made in ("pickle", "deepcopy"):
            other.load_state_dict(state)
            folded = wnconvert.fold(copy.deepcopy(other)).model
            folded.graph.lint()
            assert {name: tuple(value.shape) for name, value in snapshot(folded).items()} == {
                name: tuple(value.shape) for name, value in before.items()
            }
            assert all(reference.same_bits(before[name], value) for name, value in snapshot(folded).items())
        wnconvert.fold(other)
        assert not [name for name, _ in other.named_parameters() if name.endswith("_v")], made
        assert reference.same_bits(other(IDS), expected), made
    torch.testing.assert_close(torch.compile(module, backend="aot_eager")(IDS), expected)
    assert "table_weight_v" in module.code


def test_two_names_share_one_pair() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 4))
    root = nn.Module()
    root.a, root.b, root.layer = weight, weight, nn.Linear(4, 4, bias=False)
    root.layer.weight = weight
    graph = fx.Graph()
    x = graph.placeholder("x")
    for target in ("a", "b"):
        x = graph.call_function(F.linear, (x, graph.get_attr(target)))
    graph.output(graph.call_module("layer", (x,)))
    module = fx.GraphModule(root, graph)
    x = torch.randn(2, 4)
    before, code, expected = snapshot(module), module.code, module(x)
    (row,) = wnconvert.apply(module).report.rows
    assert {row.site.name, *row.site.tied} == {"a", "b", "layer.weight"}
    pairs = {(id(module.get_parameter(f"{name}_g")), id(module.get_parameter(f"{name}_v"))) for name in before}
    assert len(pairs) == 1
    assert len(list(module.parameters())) == 2
    assert reference.same_bits(module(x), expected)
    assert len(list(copy.deepcopy(module).parameters())) == 2
    (row,) = wnconvert.fold(module).report.rows
    assert {row.site.name, *row.site.tied} == {"a", "b", "layer.weight"}
    assert_same(snapshot(module), before)
    assert len(list(module.parameters())) == 1
    assert module.code == code
    assert reference.same_bits(module(x), expected)


def test_dead_code_of_others_stays() -> None:
    module, _ = mixed()
    with module.graph.inserting_before(next(iter(module.graph.find_nodes(op="output")))):
        module.graph.call_function(torch.ones, (3,))
    module.recompile()
    code = module.code
    wnconvert.fold(wnconvert.apply(module).model)
    assert module.code == code


class Around(nn.Module):
    """A network that holds a graph, twice, and cannot itself be traced."""

    def __init__(self, inner: fx.GraphModule) -> None:
        super().__init__()
        self.inner, self.again, self.head = inner, inner, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return self.head(self.again(self.inner(x).mean(-1, keepdim=True).expand(-1, 5)))


@pytest.mark.parametrize("trace", [True, False])
def test_graphs_inside_a_network(trace: bool) -> None:
    network, x = CASES[0].make()
    inner = traced(network)
    whole: nn.Module = Around(inner) if not trace else nn.Sequential(inner, nn.Linear(3, 2))
    before, expected, code = snapshot(whole), whole(x), inner.code
    report = wnconvert.apply(whole).report
    assert sorted(done(report).values()) == ["split"] * 3
    assert reference.same_bits(whole(x), expected)
    assert reference.same_bits(copy.deepcopy(whole)(x), expected)
    file = io.BytesIO()
    torch.save(whole, file)
    assert set(done(wnconvert.apply(whole).report).values()) == {"skipped"}
    assert sorted(done(wnconvert.fold(whole).report).values()) == ["folded"] * 3
    assert_same(snapshot(whole), before)
    assert reference.same_bits(whole(x), expected)
    assert inner.code == code


def test_a_pickled_graph_in_a_file(tmp_path: Path) -> None:
    module, expected = mixed()
    path = tmp_path / "model.pt"
    torch.save(module, path)
    report = wnconvert.convert_file(path, command="apply", unsafe_load=True)
    assert report.weights_verified
    split = torch.load(tmp_path / "model.wn.pt", weights_only=False)
    assert "w_v" in dict(split.named_parameters())
    assert reference.same_bits(split(IDS), expected)
    wnconvert.convert_file(tmp_path / "model.wn.pt", tmp_path / "back.pt", unsafe_load=True)
    back = torch.load(tmp_path / "back.pt", weights_only=False)
    assert_same(snapshot(back), snapshot(module))
    assert back.code == torch.load(path, weights_only=False).code
    assert wnconvert.verify(path, tmp_path / "model.wn.pt", unsafe_load=True).same


def test_an_interrupted_conversion_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    module, expected = mixed()
    split, calls = weightnorm.split, []

    def interrupted(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return split(*args, **kwargs)

    monkeypatch.setattr(weightnorm, "split", interrupted)
    with pytest.raises(KeyboardInterrupt):
        wnconvert.apply(module)
    assert reference.same_bits(module(IDS), expected)
    assert any(name.endswith("_v") for name, _ in module.named_parameters())


def test_frozen_weights_stay_frozen() -> None:
    module, _ = mixed()
    module.get_parameter("w").requires_grad_(False)
    wnconvert.apply(module)
    assert not module.get_parameter("w_g").requires_grad
    assert not module.get_parameter("w_v").requires_grad
    wnconvert.fold(module)
    assert not module.get_parameter("w").requires_grad
    assert module.get_parameter("inner.kernel").requires_grad
    assert isinstance(module.get_submodule("inner"), nn.Module)
    assert not isinstance(module, layers.WeightNormLayer)


class Branches(nn.Module):
    """Weights that only the two sides of a condition use."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda t: F.linear(t, self.w), lambda t: t @ self.u, (x,))


def test_weights_handed_to_the_graphs_of_a_condition() -> None:
    torch.manual_seed(0)
    network, x = Branches(), torch.randn(2, 5)
    module = exported(network, x)
    expected, code = [network(x), network(-x)], module.code
    assert {site.name: site.axis for site in wnconvert.find(module)} == {"w": 0, "u": 1}
    assert done(wnconvert.apply(module).report) == {"w": "split", "u": "split"}
    assert all(map(reference.same_bits, [module(x), module(-x)], expected))
    wnconvert.fold(module)
    assert module.code == code


def test_weights_handed_to_the_parts_of_a_graph() -> None:
    network, x = CASES[0].make()
    count = iter(range(100))
    module = split_module(traced(network), nn.Module(), lambda _: next(count) // 2)
    expected, parts = module(x), dict(module.named_children())
    assert len(parts) > 1
    assert "w" in dict(module.named_parameters())
    assert {site.name: site.axis for site in wnconvert.find(module)} == {"w": 0, "u": 0}
    assert done(wnconvert.apply(module).report) == {"w": "split", "u": "split"}
    assert reference.same_bits(module(x), expected)


def test_split_checkpoints_load_into_a_graph() -> None:
    network, x = CASES[0].make()
    state = copy.deepcopy(wnconvert.apply(copy.deepcopy(network)).model.state_dict())
    state["w_g"] *= 2
    module = traced(CASES[0].make()[0])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    wnconvert.load_into(module, state)
    module.graph.lint()
    with torch.no_grad():
        network.w.mul_(2)
    assert reference.same_bits(module(x), network(x))
    assert reference.same_bits(copy.deepcopy(module)(x), network(x))
    # Once more, into a graph that computes its weights already, from plain weights.
    wnconvert.load_into(module, CASES[0].make()[0].state_dict())
    assert reference.same_bits(module(x), CASES[0].make()[0](x))
