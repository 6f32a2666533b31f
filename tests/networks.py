"""One small network per row of the table of module kinds, and a few that mix them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, inputs for it, and the names of the weights that must be found."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    weights: tuple[str, ...]

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().eval()


class Functional(nn.Module):
    """Weights that no layer owns, some of them behind transposes and casts."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(6, 5))
        self.kernel = nn.Parameter(torch.randn(4, 1, 3))
        self.transposed = nn.Parameter(torch.randn(6, 7))
        self.product = nn.Parameter(torch.randn(7, 3))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.first, self.bias)
        y = F.linear(y, self.transposed.t().to(torch.float32))
        y = torch.matmul(y, self.product)
        return F.conv1d(y.unsqueeze(1), self.kernel, padding=1)


class Subclassed(nn.Linear):
    """A user's own layer with its own forward pass."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias) + 1


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens)))


def _conv1d_of_transformers() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(9, 4)
    nn.init.normal_(layer.weight)
    return nn.Sequential(layer)


def _randn(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(shapes))


_MHA = ("in_proj_weight", "out_proj.weight")
_LSTM = tuple(f"weight_{part}_l{i}{back}" for i in (0, 1) for back in ("", "_reverse") for part in ("ih", "hh", "hr"))

CASES: tuple[Case, ...] = (
    Case("Linear", lambda: nn.Linear(5, 3), _randn((2, 5)), ("weight",)),
    Case("Bilinear", lambda: nn.Bilinear(3, 4, 5), _randn((2, 3), (2, 4)), ("weight",)),
    Case("Conv1d", lambda: nn.Conv1d(4, 6, 3, groups=2), _randn((2, 4, 9)), ("weight",)),
    Case("Conv2d", lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), _randn((2, 3, 8, 8)), ("weight",)),
    Case("Conv3d", lambda: nn.Conv3d(2, 4, 3), _randn((1, 2, 5, 5, 5)), ("weight",)),
    Case("ConvTranspose1d", lambda: nn.ConvTranspose1d(4, 6, 4, 2, groups=2), _randn((2, 4, 5)), ("weight",)),
    Case("ConvTranspose2d", lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), _randn((1, 4, 5, 5)), ("weight",)),
    Case("ConvTranspose3d", lambda: nn.ConvTranspose3d(2, 3, 3), _randn((1, 2, 4, 4, 4)), ("weight",)),
    Case("RNN", lambda: nn.RNN(4, 5, batch_first=True), _randn((2, 3, 4)), ("weight_ih_l0", "weight_hh_l0")),
    Case("LSTM", lambda: nn.LSTM(4, 6, 2, bidirectional=True, proj_size=3), _randn((7, 2, 4)), _LSTM),
    Case("GRU", lambda: nn.GRU(4, 5), _randn((7, 2, 4)), ("weight_ih_l0", "weight_hh_l0")),
    Case("LSTMCell", lambda: nn.LSTMCell(4, 5), _randn((2, 4)), ("weight_ih", "weight_hh")),
    Case("MultiheadAttention", lambda: nn.MultiheadAttention(8, 2), lambda: _randn((3, 2, 8))() * 3, _MHA),
    Case(
        "MultiheadAttention of three widths",
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=5),
        _randn((3, 2, 8), (3, 2, 6), (3, 2, 5)),
        ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"),
    ),
    Case(
        "TransformerEncoder",
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        _randn((2, 3, 8)),
        tuple(
            f"layers.{i}.{name}"
            for i in (0, 1)
            for name in (*(f"self_attn.{n}" for n in _MHA), "linear1.weight", "linear2.weight")
        ),
    ),
    Case("Conv1D", _conv1d_of_transformers, _randn((2, 3, 4)), ("0.weight",)),
    Case("Subclassed", lambda: nn.Sequential(Subclassed(4, 4), nn.ReLU()), _randn((2, 4)), ("0.weight",)),
    Case("Functional", Functional, _randn((2, 5)), ("first", "transposed", "product", "kernel")),
    Case("Tied", Tied, lambda: (torch.tensor([[1, 2, 10], [0, 0, 3]]),), ("embedding.weight", "body.weight")),
)


def tensors(output: Any) -> list[Tensor]:
    """Every tensor in an output, however nested."""
    if isinstance(output, Tensor):
        return [output]
    return [tensor for item in output if item is not None for tensor in tensors(item)]
