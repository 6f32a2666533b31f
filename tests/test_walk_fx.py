"""Weights that only a trace shows: functional uses behind transposes and casts, and how uses combine into sites."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wnconvert
from wnconvert.carriers.module import ModuleCarrier
from wnconvert.kinds import FUNCTIONS
from wnconvert.sites import Axis


class Calls(nn.Module):
    """One parameter `w`, handed to a function."""

    def __init__(self, shape: tuple[int, ...], call: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.w)


def _grouped(x: Tensor, w: Tensor) -> Tensor:
    return F.conv_transpose1d(x, w, groups=2)


# function, shape of x, shape of w, call, axis kept by default, axis of the output units
FUNCTION_CASES: list[tuple[str, tuple[int, ...], tuple[int, ...], Callable[[Tensor, Tensor], Tensor], Axis, Axis]] = [
    ("torch.nn.functional.linear", (2, 5), (3, 5), lambda x, w: F.linear(x, w), 0, 0),
    ("torch.nn.functional.linear", (2, 5), (5, 3), lambda x, w: F.linear(x, weight=w.t()), 1, 1),
    ("torch.nn.functional.bilinear", (2, 5), (3, 5, 5), lambda x, w: F.bilinear(x, x, w), 0, 0),
    ("torch.nn.functional.conv1d", (2, 4, 9), (6, 4, 3), lambda x, w: F.conv1d(x, w), 0, 0),
    ("torch.nn.functional.conv2d", (2, 4, 9, 9), (6, 4, 3, 3), lambda x, w: F.conv2d(x, w.half().float()), 0, 0),
    ("torch.nn.functional.conv3d", (1, 2, 5, 5, 5), (3, 2, 3, 3, 3), lambda x, w: F.conv3d(x, w), 0, 0),
    ("torch.nn.functional.conv_transpose1d", (2, 4, 9), (4, 6, 3), F.conv_transpose1d, 0, 1),
    ("torch.nn.functional.conv_transpose2d", (2, 4, 9, 9), (4, 6, 3, 3), F.conv_transpose2d, 0, 1),
    ("torch.nn.functional.conv_transpose3d", (1, 2, 5, 5, 5), (2, 3, 3, 3, 3), F.conv_transpose3d, 0, 1),
    ("torch.nn.functional.conv_transpose1d", (2, 4, 9), (4, 6, 3), _grouped, 0, (0, 2)),
    ("torch.matmul", (2, 5), (5, 3), lambda x, w: torch.matmul(x, w), 1, 1),
    ("torch.matmul", (5, 2), (3, 5), lambda x, w: torch.matmul(w, x), 0, 0),
    ("torch.matmul", (7, 2, 5), (7, 5, 3), lambda x, w: torch.matmul(x, w), (0, 2), (0, 2)),
    ("operator.matmul", (2, 5), (3, 5), lambda x, w: x @ w.transpose(0, 1), 0, 0),
    ("operator.matmul", (2, 5), (3, 5), lambda x, w: x @ w.T, 0, 0),
    ("operator.matmul", (2, 7, 5), (7, 3, 5), lambda x, w: x.transpose(0, 1) @ w.permute(0, 2, 1), (0, 1), (0, 1)),
    ("operator.matmul", (7, 2, 5), (7, 3, 5), lambda x, w: x @ w.mT.contiguous(), (0, 1), (0, 1)),
    ("method:matmul", (2, 5), (5, 3), lambda x, w: x.matmul(w), 1, 1),
    ("torch.mm", (2, 5), (5, 3), lambda x, w: torch.mm(x, w), 1, 1),
    ("method:mm", (2, 5), (5, 3), lambda x, w: x.mm(w.detach().clone()), 1, 1),
    ("torch.addmm", (2, 5), (5, 3), lambda x, w: torch.addmm(torch.zeros(3), x, w), 1, 1),
    ("method:addmm", (2, 5), (5, 3), lambda x, w: torch.zeros(2, 3).addmm(x, w), 1, 1),
]  # fmt: skip


def test_every_function_of_the_table_has_a_case() -> None:
    assert {kind.path for kind in FUNCTIONS} == {case[0] for case in FUNCTION_CASES}


@pytest.mark.parametrize("case", FUNCTION_CASES, ids=lambda case: f"{case[0].rpartition('.')[2]}-{case[2]}")
def test_the_axis_of_a_functional_weight_is_the_one_whose_units_are_independent(case: tuple) -> None:  # type: ignore[type-arg]
    _, x_shape, w_shape, call, axis, out_axis = case
    module = Calls(w_shape, call)
    x = torch.randn(x_shape)
    for dim, expected in (("torch", axis), ("out", out_axis)):
        (site,) = wnconvert.find(module, dim=dim)  # type: ignore[arg-type]
        assert (site.name, site.axis, site.skip) == ("w", expected, None)
    # Independent of the table: scaling one magnitude along the output axis scales single outputs only.
    expected_output = module(x)
    wnconvert.apply(module, dim="out")
    assert torch.equal(module(x), expected_output)
    if out_axis != (0, 2) or "transpose" not in case[0]:
        magnitude = module.w_g
        with torch.no_grad():
            magnitude.view(-1)[0] *= 2
        changed = module(x) != expected_output
        assert torch.allclose(module(x)[changed], 2 * expected_output[changed], rtol=1e-4)
        assert 0 < changed.double().mean() < 1


def test_uses_that_disagree_are_skipped_with_both_reasons() -> None:
    module = Calls((4, 4), lambda x, w: F.linear(x, w) @ w)
    (site,) = wnconvert.find(module)
    assert site.skip == "its uses disagree on the axis: linear needs axis 0, matmul needs axis 1"
    assert wnconvert.find(module, dim=None)[0].skip is None


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: x @ w[0],
        lambda x, w: x + w,
        lambda x, w: x @ (w + 1),
        lambda x, w: torch.relu(w) @ x.t(),
        lambda x, w: w @ w,
    ],
)
def test_parameters_that_are_no_weights_are_listed_and_left_alone(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    (row,) = wnconvert.apply(Calls((4, 4), call)).report.rows
    assert (row.site.name, row.site.kind, row.action) == ("w", "Unknown", "skipped")
    assert "--kind Unknown splits it" in str(row.reason)


def test_a_vector_is_a_site_that_is_skipped() -> None:
    (site,) = wnconvert.find(Calls((4,), lambda x, w: x @ w))
    assert site.skip == "a vector has no output units to keep"


def test_the_report_says_why_a_weaker_walker_was_used() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.sum() > 0 else x

    carrier = ModuleCarrier(Branching())
    assert carrier.walker == "modules"
    assert "symbolically traced variables" in str(carrier.walker_note)
    assert [site.name for site in carrier.sites("torch")] == ["layer.weight"]


def test_a_layer_that_the_trace_does_not_reach_is_listed_and_marked() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    report = wnconvert.apply(Unused()).report
    assert report.walker == "fx"
    assert [(row.site.uses, row.action) for row in report.rows] == [
        (("used",), "split"),
        (("unused (not in the trace)",), "split"),
    ]
