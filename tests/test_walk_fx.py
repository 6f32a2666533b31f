"""Weights that only a trace shows: functional uses behind transposes and casts, and how uses combine into sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def _one_convolution(x: Tensor, w: Tensor) -> Tensor:
    return torch.convolution(x, w, None, [1], [0], [1], False, [0], 1)


def _convolution(x: Tensor, w: Tensor) -> Tensor:
    return torch.convolution(x, w, None, [1], [0], [1], True, [0], 2)


def _old_convolution(x: Tensor, w: Tensor) -> Tensor:
    return torch._convolution(x, w, None, [1], [0], [1], False, [0], 1, False, False, False, False)


def _attention(x: Tensor, w: Tensor) -> Tensor:
    projection = torch.eye(4)
    return F.multi_head_attention_forward(
        x, x, x, 4, 2, w, torch.zeros(12), None, None, False, 0.0, projection, torch.zeros(4), need_weights=False
    )[0]


_ONE_LAYER = (False, 1, 0.0, False, False, False)
_NOT_LINEAR = ("multi_head_attention_forward", "lstm", "gru", "rnn_tanh", "lstm_cell", "gru_cell", "rnn_tanh_cell")


def _recurrent(w: Tensor) -> tuple[Any, ...]:
    return torch.zeros(1, 2, 4), [w, torch.ones(w.shape[0], 4)], *_ONE_LAYER


def _cell(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(2, 4), w, torch.ones(w.shape[0], 4)


def _lstm(x: Tensor, params: list[Tensor], biases: bool) -> Tensor:
    return torch.lstm(x, (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)), params, biases, *_ONE_LAYER[1:])[0]


def _grouped_mm(x: Tensor, w: Tensor) -> Tensor:
    return torch._grouped_mm(x, w, offs=torch.tensor([4, 8], dtype=torch.int32))


# An operator of its own, under the name that transformers gives to one.
torch.library.define("wnconvert_tests::grouped_mm_fallback", "(Tensor input, Tensor weight) -> Tensor")
torch.library.impl("wnconvert_tests::grouped_mm_fallback", "CompositeImplicitAutograd", _grouped_mm)


def _lstm_cell(x: Tensor, w: Tensor) -> Tensor:
    return torch.lstm_cell(x, [torch.zeros(2, 4), torch.zeros(2, 4)], w, torch.ones(16, 4))[0]


def _own_grouped_mm(x: Tensor, w: Tensor) -> Tensor:
    return torch.ops.wnconvert_tests.grouped_mm_fallback(x, w)


# function, shape of x, shape of w, call, axis kept by default, axis of the output units
FUNCTION_CASES: list[tuple[str, tuple[int, ...], tuple[int, ...], Callable[[Tensor, Tensor], Tensor], Axis, Axis]] = [
    ("linear", (2, 5), (3, 5), lambda x, w: F.linear(x, w), 0, 0),
    ("linear", (2, 5), (5, 3), lambda x, w: F.linear(x, weight=w.t()), 1, 1),
    ("bilinear", (2, 5), (3, 5, 5), lambda x, w: F.bilinear(x, x, w), 0, 0),
    ("conv1d", (2, 4, 9), (6, 4, 3), lambda x, w: F.conv1d(x, w), 0, 0),
    ("conv2d", (2, 4, 9, 9), (6, 4, 3, 3), lambda x, w: F.conv2d(x, w.half().float()), 0, 0),
    ("conv3d", (1, 2, 5, 5, 5), (3, 2, 3, 3, 3), lambda x, w: F.conv3d(x, w), 0, 0),
    ("conv_transpose1d", (2, 4, 9), (4, 6, 3), F.conv_transpose1d, 0, 1),
    ("conv_transpose2d", (2, 4, 9, 9), (4, 6, 3, 3), F.conv_transpose2d, 0, 1),
    ("conv_transpose3d", (1, 2, 5, 5, 5), (2, 3, 3, 3, 3), F.conv_transpose3d, 0, 1),
    ("conv_transpose1d", (2, 4, 9), (4, 6, 3), _grouped, 0, (0, 2)),
    ("matmul", (2, 5), (5, 3), lambda x, w: torch.matmul(x, w), 1, 1),
    ("matmul", (5, 2), (3, 5), lambda x, w: torch.matmul(w, x), 0, 0),
    ("matmul", (7, 2, 5), (7, 5, 3), lambda x, w: torch.matmul(x, w), (0, 2), (0, 2)),
    ("matmul", (2, 5), (3, 5), lambda x, w: x @ w.transpose(0, 1), 0, 0),
    ("matmul", (2, 5), (3, 5), lambda x, w: x @ w.T, 0, 0),
    ("matmul", (2, 7, 5), (7, 3, 5), lambda x, w: x.transpose(0, 1) @ w.permute(0, 2, 1), (0, 1), (0, 1)),
    ("matmul", (7, 2, 5), (7, 3, 5), lambda x, w: x @ w.mT.contiguous(), (0, 1), (0, 1)),
    ("matmul", (2, 5), (5, 3), lambda x, w: x.matmul(w), 1, 1),
    ("mm", (2, 5), (5, 3), lambda x, w: torch.mm(x, w), 1, 1),
    ("mm", (2, 5), (5, 3), lambda x, w: x.mm(w.detach().clone()), 1, 1),
    ("addmm", (2, 5), (5, 3), lambda x, w: torch.addmm(torch.zeros(3), x, w), 1, 1),
    ("addmm", (2, 5), (5, 3), lambda x, w: torch.zeros(2, 3).addmm(x, w), 1, 1),
    ("mm", (5, 2), (3, 5), lambda x, w: torch.mm(w, x), 0, 0),
    ("bmm", (7, 2, 5), (7, 5, 3), lambda x, w: torch.bmm(x, w), (0, 2), (0, 2)),
    ("bmm", (7, 2, 5), (7, 3, 5), lambda x, w: x.bmm(w.transpose(1, 2)), (0, 1), (0, 1)),
    ("baddbmm", (7, 2, 5), (7, 5, 3), lambda x, w: torch.baddbmm(torch.zeros(7, 2, 3), x, w), (0, 2), (0, 2)),
    ("einsum", (2, 5), (3, 5), lambda x, w: torch.einsum("bi,oi->bo", x, w), 0, 0),
    ("einsum", (2, 9, 5), (4, 5, 3), lambda x, w: torch.einsum("bti,hid->bhtd", x, w), (0, 2), (0, 2)),
    ("einsum", (2, 4, 5), (4, 5, 3), lambda x, w: torch.einsum("bhi, hid -> bhd", x, w), (0, 2), (0, 2)),
    ("convolution", (2, 4, 9), (6, 4, 3), _one_convolution, 0, 0),
    ("convolution", (2, 4, 9), (4, 3, 3), _convolution, 0, (0, 2)),
    ("_convolution", (2, 4, 9), (6, 4, 3), _old_convolution, 0, 0),
    ("embedding", (2, 3), (5, 4), lambda x, w: torch.embedding(w, x.argsort(-1)), 0, 0),
    ("linear", (2, 5), (9, 5), lambda x, w: F.linear(x, w[3:6]), 0, 0),
    ("linear", (2, 5), (9, 5), lambda x, w: torch.cat([F.linear(x, part) for part in w.chunk(3)], 1), 0, 0),
    ("linear", (2, 5), (3, 9), lambda x, w: F.linear(x, w[:, :5]), 0, 0),
    ("linear", (2, 8), (3, 2, 4), lambda x, w: F.linear(x, w.reshape(3, 8)), 0, 0),
    ("linear", (2, 8), (2, 3, 8), lambda x, w: F.linear(x, w.flatten(0, 1)), (0, 1), (0, 1)),
    ("linear", (2, 5), (4, 3, 5), lambda x, w: F.linear(x, w[2]), (0, 1), (0, 1)),
    ("linear", (2, 5), (3, 5), lambda x, w: F.linear(x, torch.cat([w, torch.ones(2, 5)])), 0, 0),
    ("linear", (2, 5), (3, 5), lambda x, w: F.linear(x, w * 0.5), 0, 0),
    ("linear", (2, 5), (3, 5), lambda x, w: F.linear(x, F.pad(w, (0, 0, 0, 2))), 0, 0),
    ("conv2d", (2, 4, 9, 9), (6, 4), lambda x, w: F.conv2d(x, w[:, :, None, None]), 0, 0),
    ("conv1d", (2, 4, 9), (6, 12), lambda x, w: F.conv1d(x, w.view(6, 4, 3)), 0, 0),
    ("matmul", (2, 3, 5), (5, 12), lambda x, w: x @ w.unflatten(1, (3, 4))[:, 1], 1, 1),
    ("embedding", (2, 3), (5, 4), lambda x, w: F.embedding(x.argsort(-1), w), 0, 0),
    ("multi_head_attention_forward", (3, 2, 4), (12, 4), _attention, 0, 0),
    ("lstm", (5, 2, 3), (16, 3), lambda x, w: _lstm(x, [w, torch.ones(16, 4)], False), 0, 0),
    ("lstm", (5, 2, 4), (16, 4), lambda x, w: _lstm(x, [torch.ones(16, 4), w], False), 0, 0),
    ("gru", (5, 2, 3), (12, 3), lambda x, w: torch.gru(x, *_recurrent(w))[0], 0, 0),
    ("rnn_tanh", (5, 2, 3), (4, 3), lambda x, w: torch.rnn_tanh(x, *_recurrent(w))[0], 0, 0),
    ("rnn_relu", (5, 2, 3), (4, 3), lambda x, w: torch.rnn_relu(x, *_recurrent(w))[0], 0, 0),
    ("lstm_cell", (2, 3), (16, 3), _lstm_cell, 0, 0),
    ("gru_cell", (2, 3), (12, 3), lambda x, w: torch.gru_cell(x, *_cell(w)), 0, 0),
    ("rnn_tanh_cell", (2, 3), (4, 3), lambda x, w: torch.rnn_tanh_cell(x, *_cell(w)), 0, 0),
    ("rnn_relu_cell", (2, 3), (4, 3), lambda x, w: torch.rnn_relu_cell(x, *_cell(w)), 0, 0),
    ("grouped_mm_fallback", (8, 16), (2, 16, 16), _own_grouped_mm, (0, 2), (0, 2)),
    ("grouped_mm", (8, 16), (2, 16, 16), lambda x, w: _grouped_mm(x, w), (0, 2), (0, 2)),
    ("_grouped_mm", (8, 16), (2, 16, 16), lambda x, w: _grouped_mm(x, w), (0, 2), (0, 2)),
]  # fmt: skip


def test_every_function_of_the_table_has_a_case() -> None:
    assert {kind.name for kind in FUNCTIONS} <= {case[0] for case in FUNCTION_CASES}


@pytest.mark.parametrize("case", FUNCTION_CASES, ids=lambda case: f"{case[0].rpartition('.')[2]}-{case[2]}")
def test_the_axis_of_a_functional_weight_is_the_one_whose_units_are_independent(case: tuple) -> None:  # type: ignore[type-arg]
    _, x_shape, w_shape, call, axis, out_axis = case
    torch.manual_seed(0)
    module = Calls(w_shape, call)
    x = torch.randn(x_shape)
    for dim, expected in (("torch", axis), ("out", out_axis)):
        (site,) = wnconvert.find(module, dim=dim)  # type: ignore[arg-type]
        assert (site.name, site.axis, site.skip) == ("w", expected, None)
    # Independent of the table: scaling one magnitude along the output axis scales single outputs only.
    expected_output = module(x)
    wnconvert.apply(module, dim="out", kinds="*")
    assert torch.equal(module(x), expected_output)
    if case[0] in _NOT_LINEAR or case[0] == "rnn_relu":
        return
    changes = []
    for i in range(module.w_g.numel()):
        with torch.no_grad():
            module.w_g.view(-1)[i] *= 2
            output = module(x)
            module.w_g.view(-1)[i] /= 2
        changed = output != expected_output
        assert torch.allclose(output[changed], 2 * expected_output[changed], rtol=1e-4, atol=1e-5)
        changes.append(changed.double().mean())
    assert 0 < max(changes) < 1


def test_uses_that_disagree_are_skipped_with_both_reasons() -> None:
    module = Calls((4, 4), lambda x, w: F.linear(x, w) @ w)
    (site,) = wnconvert.find(module)
    assert site.skip == "its uses disagree on the axis: linear needs axis 0, matmul needs axis 1"
    assert wnconvert.find(module, dim=None)[0].skip is None


@pytest.mark.parametrize(
    "call",
    [
        (lambda x, w: x + w, "add"),
        (lambda x, w: x * w[:2].sigmoid(), "mul"),
        (lambda x, w: w @ w, "matmul"),
        (lambda x, w: x + w[torch.tensor([0, 1, 1, 2])], "add"),  # a table of relative positions
    ],
)
def test_parameters_that_are_no_weights_are_listed_and_left_alone(
    call: tuple[Callable[[Tensor, Tensor], Tensor], str],
) -> None:
    function, users = call
    (row,) = wnconvert.apply(Calls((4, 4), function)).report.rows
    assert (row.site.name, row.site.kind, row.action) == ("w", "Unknown", "skipped")
    assert row.reason == (f"nothing tells which layer it belongs to (used by {users}); --kind Unknown splits it")


NO_CHOICE = "no choice of axes gives each output unit a magnitude of its own"


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x, w: x @ w[0], NO_CHOICE),
        (lambda x, w: x @ (w + 1), "computed before use, by add"),
        (lambda x, w: torch.relu(w) @ x.t(), "computed before use, by relu"),
        (lambda x, w: F.linear(x, w.expand(3, 4, 4)[0] + w), "computed before use, by add"),
        (lambda x, w: x @ w.diag().outer(w[0]), "computed before use, by diag, outer"),
        (lambda x, w: F.linear(x, torch.cat([w, w])), NO_CHOICE),
        (
            lambda x, w: F.linear(x, (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)),
            "standardised before use, which cancels its scale: a magnitude would mean nothing",
        ),
        (
            lambda x, w: F.linear(x, F.layer_norm(w, (4,), eps=0)),
            "standardised before use, which cancels its scale: a magnitude would mean nothing",
        ),
        (
            lambda x, w: F.linear(x, F.normalize(w)),
            "standardised before use, which cancels its scale: a magnitude would mean nothing",
        ),
    ],
)  # fmt: skip
def test_weights_that_a_function_takes_in_no_usable_form_are_skipped_with_the_reason(
    call: Callable[[Tensor, Tensor], Tensor], reason: str
) -> None:
    (site,) = wnconvert.find(Calls((4, 4), call))
    assert site.skip == reason


def test_a_weight_with_one_value_for_each_unit_is_skipped() -> None:
    (site,) = wnconvert.find(Calls((1, 4), lambda x, w: x @ w))
    assert site.skip == "each of its units has a single value, so a magnitude would be all of it"
    module = nn.Linear(1, 4)
    wnconvert.apply(module)  # as torch does, which tells the pair by its names
    assert [row.action for row in wnconvert.fold(module).report.rows] == ["folded"]


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
