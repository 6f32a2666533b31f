"""Weights that one eager forward pass shows, and layers that compute in a way of their own."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wnconvert
from tests.test_walk_fx import FUNCTION_CASES, Calls
from wnconvert.carriers.module import ModuleCarrier
from wnconvert.errors import UsageError
from wnconvert.walk import eager, export
from wnconvert.walk.ladder import Example
from wnconvert.walk.trace import TraceFailed


@pytest.mark.parametrize("walker", [eager, export], ids=["eager", "export"])
@pytest.mark.parametrize("case", FUNCTION_CASES, ids=lambda case: f"{case[0]}-{case[2]}")
def test_every_walker_sees_what_a_trace_sees(case: tuple, walker: ModuleType) -> None:  # type: ignore[type-arg]
    _, x_shape, w_shape, call, axis, out_axis = case
    # Without data, torch takes grouped products in this dtype only.
    dtype = torch.bfloat16 if "grouped_mm" in case[0] else torch.float32
    uses = walker.trace(Calls(w_shape, call).to(dtype), (torch.randn(x_shape, dtype=dtype),), {}).uses
    assert {(use.root, use.axis, use.problem) for use in uses} == {("w", axis, None)}
    assert {(0, 2) if use.groups > 1 else use.out_axis for use in uses} == {out_axis}


class Experts(nn.Module):
    """Three-dimensional weights of which a token's value chooses one, which no tracer follows."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 6, 5))
        self.down = nn.Parameter(torch.randn(4, 6, 5))
        self.router = nn.Linear(5, 4)
        self.positions = nn.Parameter(torch.randn(1, 9, 5))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.count += 1
        x = x + self.positions[:, : x.shape[1]]
        chosen = self.router(x).mean(1).argmax(-1)
        out = [F.linear(row, self.up[int(i)]).relu() @ self.down[i] for row, i in zip(x, chosen, strict=True)]
        return torch.stack(out) * scale


def test_experts_get_a_magnitude_for_every_unit_of_every_expert() -> None:
    module, x = Experts(), torch.randn(3, 7, 5)
    inputs: dict[str, Any] = {"x": x, "scale": 2.0}
    before = module(**inputs)
    carrier = ModuleCarrier(module, example=Example.of(inputs))
    assert carrier.walker == "eager"
    assert "torch.fx cannot trace it" in str(carrier.walker_note)
    assert "torch.export cannot either" in str(carrier.walker_note)
    assert int(module.count) == 1  # the pass ran on a copy
    report = wnconvert.apply(module, example_inputs=inputs).report
    found = {row.site.name: (row.site.kind, row.site.axis, row.action) for row in report.rows}
    assert found == {
        "router.weight": ("Linear", 0, "split"),
        "up": ("linear", (0, 1), "split"),
        "down": ("matmul", (0, 2), "split"),
        "positions": ("Unknown", 0, "skipped"),
    }
    assert module.up_g.shape == (4, 6, 1)
    assert module.down_g.shape == (4, 1, 5)
    assert torch.equal(module(**inputs), before)


def test_without_example_inputs_the_report_says_what_they_would_show() -> None:
    carrier = ModuleCarrier(Experts())
    assert carrier.walker == "modules"
    assert "example inputs would show weights that functions use" in str(carrier.walker_note)


def test_example_inputs_that_do_not_fit_are_said_and_the_tree_of_modules_walked() -> None:
    carrier = ModuleCarrier(Experts(), example=Example.of(torch.randn(2, 2)))
    assert carrier.walker == "modules"
    assert "it fails on the example inputs" in str(carrier.walker_note)
    with pytest.raises(TraceFailed):
        eager.trace(Experts(), (torch.randn(2, 2),), {})


def test_example_inputs_of_another_type_are_a_usage_error() -> None:
    with pytest.raises(UsageError, match="not float"):
        wnconvert.find(Experts(), example_inputs=1.0)  # type: ignore[arg-type]


def test_a_trace_changes_neither_random_state_nor_buffers() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    state, buffers = torch.get_rng_state(), {k: v.clone() for k, v in module.state_dict().items()}
    eager.trace(module, (torch.randn(4, 3),), {})
    torch.randn(4, 3)
    assert torch.equal(torch.get_rng_state(), state) is False  # only by the line above
    assert all(torch.equal(module.state_dict()[key], value) for key, value in buffers.items())


class OwnNorm(nn.Module):
    """Computes a weight norm with functions, in parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(3, 1) + 1)
        self.direction = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.gain * self.direction / self.direction.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("example", [None, torch.randn(2, 5)])
def test_the_halves_of_a_networks_own_weight_norm_are_not_split_again(example: Tensor | None) -> None:
    sites = {site.name: site for site in wnconvert.find(OwnNorm(), example_inputs=example)}
    assert set(sites) == {"gain", "direction"}
    assert {site.skip for site in sites.values()} == {"its own forward pass makes a weight norm of it"}


class StandardisedConv2d(nn.Conv2d):
    """As in NFNets and BiT: the scale of the weight cancels."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.view(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True).view_as(self.weight)
        height = x.shape[-1] + 2
        return F.conv2d(F.pad(x, (0, max(height - int(x.shape[-1]), 0))), weight, self.bias)


class TransposedLinear(nn.Linear):
    def __init__(self) -> None:
        super().__init__(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class PaddedConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(F.pad(x, (1, 1)), self.weight, self.bias)


class NeedsMore(nn.Linear):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return F.linear(x, self.weight) + other


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (lambda: PaddedConv2d(2, 3, 3), ("Conv2d", 0, None)),
        (lambda: NeedsMore(4, 5), ("Linear", 0, None)),
        (TransposedLinear, ("Linear", 1, None)),
        (
            lambda: StandardisedConv2d(2, 3, 3),
            ("Conv2d", None, "standardised before use, which cancels its scale: a magnitude would mean nothing"),
        ),
    ],
)
def test_a_subclass_of_a_layer_is_judged_by_what_it_computes(
    layer: Callable[[], nn.Module], expected: tuple[str, Any, str | None]
) -> None:
    for module in (layer(), nn.Sequential(layer())):
        (site,) = wnconvert.find(module)
        assert (site.kind, site.axis, site.skip) == expected


def test_fixed_weights_of_standard_layers_in_timm_style_round_trip() -> None:
    module = nn.Sequential(StandardisedConv2d(2, 3, 3), PaddedConv2d(3, 4, 3))
    x = torch.randn(1, 2, 9, 9)
    before = module(x)
    report = wnconvert.apply(module).report
    assert [row.action for row in report.rows] == ["skipped", "split"]
    assert torch.equal(module(x), before)


class Branches(nn.Sequential):
    """Defeats torch.fx."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if len(x) else x


class Chooses(nn.Sequential):
    """Defeats torch.export too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) else x


@pytest.mark.parametrize(("cls", "walker"), [(nn.Sequential, "fx"), (Branches, "export"), (Chooses, "eager")])
def test_a_trace_keeps_no_weight_alive(cls: type[nn.Sequential], walker: str) -> None:
    # The tracers leave reference cycles behind, and a folded network would need twice its memory.
    module = cls(Calls((4, 4), F.linear), nn.Linear(4, 4), nn.LSTM(4, 4))
    held = [weakref.ref(parameter) for parameter in module.parameters() if parameter.dim() > 1]
    gc.disable()
    try:
        assert wnconvert.apply(module, example_inputs=torch.randn(3, 4)).report.walker == walker
        assert [reference() for reference in held] == [None] * 4
    finally:
        gc.enable()


def test_a_failed_export_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    wnconvert.apply(Chooses(nn.Linear(4, 4)), example_inputs=torch.randn(3, 4))
    assert capfd.readouterr() == ("", "")


class LowRank(nn.Linear):
    """As LoRA libraries write it: a layer with more weights than its class has."""

    def __init__(self) -> None:
        super().__init__(4, 5)
        self.a = nn.Parameter(torch.randn(2, 4))
        self.b = nn.Parameter(torch.randn(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + x @ self.a.t() @ self.b.t()


@pytest.mark.parametrize("module", [LowRank(), nn.Sequential(LowRank())], ids=["alone", "inside"])
def test_other_weights_of_a_subclass_of_a_layer_are_found(module: nn.Module) -> None:
    x = torch.randn(3, 4)
    before = module(x)
    found = {row.site.name.rpartition(".")[2]: row.action for row in wnconvert.apply(module).report.rows}
    assert found == {"weight": "split", "a": "split", "b": "split"}
    assert torch.equal(module(x), before)


class Momentum(nn.Module):
    """Assigns to the data of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for a, b in zip(self.query.parameters(), self.key.parameters(), strict=True):
            b.data = b.data * 0.5 + a.data * 0.5
        return self.query(x) + self.key(x)


class MaxNorm(nn.Conv1d):
    """As in EEGNet."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.01)
        return super().forward(x)


class Decays(nn.Module):
    """Writes into its parameter, itself and through a view, where no tracer follows."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.code.data.mul_(0.9)
        with torch.no_grad():
            self.code.t()[0] = 1.0
        return F.linear(x, self.code) if float(x.sum()) else x


@pytest.mark.parametrize("module", [Momentum(), nn.Sequential(MaxNorm(4, 4, 1)), MaxNorm(4, 4, 1), Decays()])
@pytest.mark.parametrize("x", [None, torch.ones(4, 4)], ids=["alone", "example"])
def test_looking_at_a_network_that_writes_to_its_parameters_does_not_change_them(
    module: nn.Module, x: Tensor | None
) -> None:
    before = {name: value.clone() for name, value in module.state_dict().items()}
    wnconvert.find(module, example_inputs=x)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_example_inputs_are_not_written_to() -> None:
    class Doubles(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2) if float(x.sum()) else x

    x = torch.ones(2)
    wnconvert.find(Doubles(), example_inputs=x)
    assert torch.equal(x, torch.ones(2))


def test_what_cannot_be_copied_is_no_reason_not_to_trace() -> None:
    module = Calls((4, 4), F.linear)
    module.lock = threading.Lock()  # type: ignore[assignment]
    (site,) = wnconvert.find(module)
    assert (site.name, site.axis) == ("w", 0)


def test_a_hook_sees_no_stand_in() -> None:
    module, seen = nn.Sequential(nn.Linear(2, 2)), []
    module[0].register_forward_hook(lambda *_: seen.append(1))
    wnconvert.find(module)
    assert seen == []


class CollectedByHook(nn.Module):
    """Takes its result from a hook, and cannot do without."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 5))
        self.inner = nn.Linear(5, 5)
        self.seen: list[Tensor] = []
        self.inner.register_forward_hook(lambda module, _, output: module.seen.append(output))
        self.inner.seen = self.seen  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        self.seen.clear()
        if self.inner(x).sum().item() == float("inf"):  # no tracer follows that
            return x
        return F.linear(self.seen[0], self.w)


def test_a_network_that_needs_its_hooks_is_walked_with_them() -> None:
    module, x = CollectedByHook(), torch.randn(2, 5)
    before = module(x)
    assert ModuleCarrier(module, example=Example.of(x)).walker == "eager"
    assert len(module.seen) == 1  # the copy has a list of its own
    report = wnconvert.apply(module, example_inputs=x).report
    assert {row.site.name for row in report.rows if row.action == "split"} == {"w", "inner.weight"}
    assert torch.equal(module(x), before)


@pytest.mark.parametrize(
    "formula",
    [
        lambda g, v: g * v * torch.rsqrt(v.pow(2).sum(1, keepdim=True) + 1e-5),
        lambda g, v: g * v / (v.norm(dim=1, keepdim=True) + 1e-6),
        lambda g, v: g * v / (v.pow(2).sum(1, keepdim=True) + 1e-12).sqrt(),
        lambda g, v: g * F.normalize(v, dim=1, eps=1e-2),
        lambda g, v: g.abs() * v / v.norm(dim=1, keepdim=True),
        lambda g, v: F.softplus(g) * v / v.norm(dim=1, keepdim=True),
    ],
)
@pytest.mark.parametrize("shape", [(3, 1), (1, 1)])
def test_what_is_nearly_a_weight_norm_is_not_folded(
    formula: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, int]
) -> None:
    class Near(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g = nn.Parameter(-torch.ones(shape))
            self.v = nn.Parameter(torch.randn(3, 64) * 1e-3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, formula(self.g, self.v if shape == (3, 1) else self.v[:1]))

    graph = torch.fx.symbolic_trace(Near())
    x = torch.randn(2, 64)
    before = graph(x)
    assert not wnconvert.fold(graph).report.rows
    assert torch.equal(graph(x), before)
