"""Networks without layers: parameters handed to functions, by themselves or behind views, casts and concatenations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """Parameters of the given shapes, and a forward pass that uses them."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, the shape of its input, and the axes that each of its weights keeps."""

    name: str
    forward: Callable[[Any, Tensor], Tensor]
    x: tuple[int, ...]
    shapes: dict[str, tuple[int, ...]]
    axes: dict[str, int | tuple[int, ...]]

    def make(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        return Net(self.forward, self.shapes).to(dtype), torch.randn(self.x).to(dtype)


def _attention(s: Any, x: Tensor) -> Tensor:
    zeros, out = torch.zeros(12), torch.zeros(4)
    return F.multi_head_attention_forward(
        *(x, x, x, 4, 2, s.w, zeros, None, None, False, 0.0, s.u, out), training=False, need_weights=False
    )[0]


def _convolution(n: int) -> Case:
    function = getattr(F, f"conv{n}d")
    shapes = {"w": (6, 2, *[3] * n), "b": (6,)}
    return Case(f"conv{n}d", lambda s, x: function(x, s.w, s.b, groups=2), (2, 4, *[5] * n), shapes, {"w": 0})


def _transposed(n: int, groups: int) -> Case:
    function, shapes = getattr(F, f"conv_transpose{n}d"), {"w": (4, 3, *[3] * n)}
    name = f"conv_transpose{n}d groups {groups}"
    return Case(name, lambda s, x: function(x, s.w, groups=groups), (2, 4, *[5] * n), shapes, {"w": 0})


CASES: tuple[Case, ...] = (
    Case(
        "mlp",
        lambda s, x: F.linear(F.relu(F.linear(x, s.w, s.b)), s.u),
        (2, 5),
        {"w": (7, 5), "b": (7,), "u": (3, 7)},
        {"w": 0, "u": 0},
    ),
    *(_convolution(n) for n in (1, 2, 3)),
    *(_transposed(n, groups) for n in (1, 2, 3) for groups in (1, 2)),
    Case("matmul", lambda s, x: torch.matmul(x, s.w), (2, 5), {"w": (5, 3)}, {"w": 1}),
    Case("left", lambda s, x: s.w @ x, (5, 2), {"w": (3, 5)}, {"w": 0}),
    Case("method", lambda s, x: x.matmul(s.w), (4, 2, 5), {"w": (4, 5, 3)}, {"w": (0, 2)}),
    Case("mm", lambda s, x: torch.mm(x, s.w), (2, 5), {"w": (5, 3)}, {"w": 1}),
    Case("addmm", lambda s, x: torch.addmm(s.b, x, s.w), (2, 5), {"w": (5, 3), "b": (3,)}, {"w": 1}),
    Case("bmm", lambda s, x: torch.bmm(x, s.w), (4, 2, 5), {"w": (4, 5, 3)}, {"w": (0, 2)}),
    Case("baddbmm", lambda s, x: torch.baddbmm(s.b, x, s.w), (4, 2, 5), {"w": (4, 5, 3), "b": (3,)}, {"w": (0, 2)}),
    Case("einsum", lambda s, x: torch.einsum("bi,oi->bo", x, s.w), (2, 5), {"w": (3, 5)}, {"w": 0}),
    Case("heads", lambda s, x: torch.einsum("bi,hio->bho", x, s.w), (2, 5), {"w": (3, 5, 4)}, {"w": (0, 2)}),
    Case("attention", _attention, (3, 2, 4), {"w": (12, 4), "u": (4, 4)}, {"w": 0, "u": 0}),
    Case("transpose", lambda s, x: F.linear(x, s.w.transpose(0, 1)), (2, 5), {"w": (5, 3)}, {"w": 1}),
    Case("permute", lambda s, x: F.conv1d(x, s.w.permute(2, 0, 1)), (2, 3, 5), {"w": (3, 2, 4)}, {"w": 2}),
    Case("reshape", lambda s, x: F.linear(x, s.w.reshape(6, 5)), (2, 5), {"w": (2, 3, 5)}, {"w": (0, 1)}),
    Case("flatten", lambda s, x: F.linear(x, s.w.flatten(1)), (2, 15), {"w": (2, 3, 5)}, {"w": 0}),
    Case("cast", lambda s, x: F.linear(x.double(), s.w.double()).to(x.dtype), (2, 5), {"w": (3, 5)}, {"w": 0}),
    Case("slice", lambda s, x: F.linear(x, s.w[:2]) + F.linear(x, s.w[2:]), (2, 5), {"w": (4, 5)}, {"w": 0}),
    Case("cat", lambda s, x: F.linear(x, torch.cat([s.w, s.u])), (2, 5), {"w": (2, 5), "u": (3, 5)}, {"w": 0, "u": 0}),
    Case("twice", lambda s, x: F.linear(F.linear(x, s.w), s.w), (2, 5), {"w": (5, 5)}, {"w": 0}),
)
