"""Outputs of a network: running it, flattening what it returns, and comparing two runs."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MASK = 1e30
"""No activation is as large as that."""


@dataclasses.dataclass(frozen=True, slots=True)
class Inputs:
    """What a network is called with: positional arguments or named ones, not both."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def fresh(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A copy to call with: networks may write to their inputs."""
        return copy.deepcopy((self.args, dict(self.kwargs)))

    def double(self) -> Inputs:
        """The same in float64."""
        args, kwargs = self.fresh()
        return Inputs(_double(args), _double(kwargs))

    def __str__(self) -> str:
        named = [*enumerate(self.args), *self.kwargs.items()]
        return ", ".join(f"{name} {_shapes(value)}" for name, value in named)


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Run a network on a copy of the inputs with fixed seeds, and return every tensor that it returns."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    args, kwargs = inputs.fresh()
    with torch.no_grad():
        return [tensor.detach().clone() for tensor in tensors(model(*args, **kwargs))]


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a nest of containers, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name, None))


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two runs gave the same bits, NaN included."""
    return len(a) == len(b) and all(_same_bits(x, y) for x, y in zip(a, b, strict=True))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor).contiguous().view(torch.uint8) if tensor.is_complex() else _flat(tensor)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def is_finite(outputs: list[Tensor]) -> bool:
    """Whether an output holds numbers that can be compared."""
    floats = [tensor for tensor in outputs if tensor.is_floating_point() and tensor.numel()]
    return not floats or any(bool(tensor.isfinite().any()) for tensor in floats)


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference between two runs, relative to the largest value of that output."""
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return float("inf")
    return max((_distance(x, y) for x, y in zip(a, b, strict=True) if x.numel()), default=0.0)


def _distance(a: Tensor, b: Tensor) -> float:
    if not (a.is_floating_point() or a.is_complex()):
        return 0.0 if torch.equal(a, b) else float("inf")
    a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (a, b))
    a, b = a.double(), b.double()
    # Masked scores hold infinity or the lowest number there is.
    finite = a.abs() < MASK
    if not torch.equal(finite, b.abs() < MASK):
        return float("inf")
    a, b = a[finite], b[finite]
    if not a.numel():
        return 0.0
    largest = float(a.abs().max())
    return float((a - b).abs().max()) / largest if largest else float((a - b).abs().max())


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _double(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_double(item) for item in value)
    return value


def _shapes(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_shapes(item) for item in value) + "]"
    return str(value)
